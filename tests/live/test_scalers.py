"""The scalers that need no permission, and the choice between all of them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator

import pytest

from sponge import CgroupUnavailable, CpuControlError
from sponge.live.scalers import AffinityScaler, CpuScaler, ThreadScaler, best_scaler, is_whole
from tests.live.cgroup_here import PROBE, burners, native_ids

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture
def scaler() -> Iterator[AffinityScaler]:
    """Give an affinity scaler over all CPUs in ascending order."""
    with AffinityScaler(cpus=CPUS) as one:
        yield one


@pytest.mark.parametrize("kind", [ThreadScaler, AffinityScaler])
def test_scalers_fit_the_port(kind: type[CpuScaler]) -> None:
    """The scheduler knows only the protocol."""
    scaler = kind()
    assert isinstance(scaler, CpuScaler)
    assert scaler.cores == math.inf
    assert scaler.scale(1) == 1 == scaler.cores
    with pytest.raises(ValueError, match="cores"):
        scaler.scale(0)
    scaler.close()
    scaler.close()


def test_adopted_threads_stay_on_as_many_cpus_as_cores(scaler: AffinityScaler) -> None:
    """Rounded up: half a core cannot be expressed."""
    with burners(2) as threads:
        first, second = native_ids(threads)
        scaler.adopt([first])
        scaler.scale(0.5)
        assert os.sched_getaffinity(first) == {CPUS[0]}
        assert os.sched_getaffinity(second) == set(CPUS)
        scaler.scale(len(CPUS))
        assert os.sched_getaffinity(first) == set(CPUS)


def test_thread_adopted_later_gets_the_share_in_force(scaler: AffinityScaler) -> None:
    """A new lane must not run free until the next change."""
    scaler.scale(1)
    with burners(1) as threads:
        scaler.adopt(native_ids(threads))
        assert os.sched_getaffinity(native_ids(threads)[0]) == {CPUS[0]}


def test_affinity_is_given_back(scaler: AffinityScaler) -> None:
    """Each thread gets its own mask again, not a common one."""
    with burners(2) as threads:
        first, second = native_ids(threads)
        os.sched_setaffinity(second, {CPUS[-1]})
        scaler.adopt([first, second])
        scaler.scale(1)
        assert os.sched_getaffinity(second) == {CPUS[0]}
        scaler.adopt([first])
        assert os.sched_getaffinity(second) == {CPUS[-1]}
        scaler.close()
        assert os.sched_getaffinity(first) == set(CPUS)


def test_more_cores_than_cpus_gives_all_cpus(scaler: AffinityScaler) -> None:
    """The value in force is what there is."""
    assert scaler.scale(10_000) == len(CPUS)


def test_ended_and_foreign_threads(scaler: AffinityScaler) -> None:
    """As with the quota: one that ended is passed over, another process's is refused."""
    with burners(1) as threads:
        scaler.adopt(native_ids(threads))
    scaler.scale(1)
    with pytest.raises(ValueError, match="thread_ids"):
        scaler.adopt([os.getppid()])


def test_closed_affinity_scaler_says_so(scaler: AffinityScaler) -> None:
    """Rather than pinning threads that nobody will release."""
    scaler.close()
    with pytest.raises(CpuControlError, match="closed"):
        scaler.scale(1)
    with pytest.raises(CpuControlError, match="closed"):
        scaler.adopt([threading.get_native_id()])


@pytest.mark.parametrize("cpus", [[], [10_000]])
def test_cpus_must_be_allowed(cpus: list[int]) -> None:
    """An empty or foreign choice would fail at the first change, in the middle of serving."""
    with pytest.raises(ValueError, match="cpus"):
        AffinityScaler(cpus=cpus)


def test_all_cpus_are_used_in_some_order() -> None:
    """The default order only decides which come first."""
    with AffinityScaler() as scaler, burners(1) as threads:
        scaler.adopt(native_ids(threads))
        scaler.scale(len(CPUS))
        assert os.sched_getaffinity(native_ids(threads)[0]) == set(CPUS)


def test_choice_by_name() -> None:
    """An explicit choice is never replaced by another."""
    assert best_scaler("threads").how == "threads"
    assert best_scaler("affinity", cpus=CPUS[:1]).how == "affinity"
    with pytest.raises(ValueError, match="how must be"):
        best_scaler("cgroups")  # type: ignore[arg-type]


def test_quota_is_never_replaced_silently(caplog: pytest.LogCaptureFixture) -> None:
    """Asked for explicitly it fails; automatically it warns, with the reason."""
    with pytest.raises(CgroupUnavailable):
        best_scaler("quota", path="/tmp")
    assert best_scaler("auto", path="/tmp").how == "threads"
    assert "no CPU quota: /tmp is not a control group" in caplog.text


def test_automatic_choice_takes_the_quota_where_it_is_allowed() -> None:
    """The best first."""
    scaler = best_scaler()
    try:
        assert scaler.how == PROBE.how
    finally:
        scaler.close()


@pytest.mark.parametrize(
    ("cores", "whole"), [(1, True), (3 * 0.1 / 0.3, True), (1.5, False), (0.2, False), (1e-9, False)]
)
def test_whole_allocations_are_recognised_despite_rounding(cores: float, whole: bool) -> None:
    """A solver's 0.9999999999 is one core."""
    assert is_whole(cores) is whole
