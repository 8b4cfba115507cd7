"""`CgroupScaler.probe`: what it says is what happens, in words and as JSON."""

from __future__ import annotations

import json
import os

import pytest

from sponge import CgroupScaler
from sponge.live.scalers import best_scaler
from tests.live.cgroup_here import HOME, PROBE, group_above, groups_of, needs_quota, run_python


def test_probe_agrees_with_what_is_used() -> None:
    """``sponge doctor`` must not promise what serving then refuses."""
    with best_scaler("auto") as scaler:  # type: ignore[attr-defined]
        assert PROBE.how == scaler.how


def test_probe_leaves_nothing_behind() -> None:
    """It tries for real, so it has to tidy up for real."""
    before = groups_of(os.getpid())
    CgroupScaler.probe()
    assert groups_of(os.getpid()) == before


def test_explanation_names_the_facts() -> None:
    """A person reads this to decide what to ask the administrator for."""
    text = PROBE.explain()
    assert os.uname().release in text
    assert "sponge will limit" in text
    assert (PROBE.how in text) if PROBE.quota_allowed else (PROBE.reason in text)


def test_probe_as_json() -> None:
    """Infinity is not JSON."""
    again = json.loads(json.dumps(PROBE.to_dict(), allow_nan=False))
    assert again["uses"] in ("quota", "threads")
    assert again["quota_allowed"] == PROBE.quota_allowed
    assert again["cpus"] == len(os.sched_getaffinity(0))


@needs_quota
def test_groups_of_killed_processes_are_told_and_removed() -> None:
    """Somebody may wonder about their names; the attempt tidies up as a start would."""
    name = f"sponge-4194304-{os.getpid()}-1"
    os.mkdir(f"{HOME}/{name}")
    probe = CgroupScaler.probe()
    assert name in probe.leftovers
    assert f"{name} (removed)" in probe.explain() or len(probe.leftovers) > 1
    assert not os.path.exists(f"{HOME}/{name}")


@needs_quota
def test_quota_of_the_container_is_told() -> None:
    """A service planned for all CPUs would throttle inside a smaller container."""
    with group_above(5_000) as directory:
        threads = "cgroup.threads" if PROBE.cgroup_version == 2 else "tasks"
        out = run_python(
            f"""
import threading
from sponge import CgroupScaler
open({directory + "/" + threads!r}, "w").write(str(threading.get_native_id()))
probe = CgroupScaler.probe()
assert probe.container_quota_cores == 0.5, probe
print(probe.explain())
open({HOME + "/" + threads!r}, "w").write(str(threading.get_native_id()))
"""
        )
    assert "0.5 cores" in out


@pytest.mark.parametrize("module", ["numpy", "onnxruntime", "cgroupspy", "cvxpy"])
def test_import_is_light(module: str) -> None:
    """cgroupspy is needed only where a version 1 group is made, the others never."""
    assert (
        run_python(f"import sys, sponge.live.cgroup, sponge.live.scalers; print({module!r} in sys.modules)") == "False"
    )
