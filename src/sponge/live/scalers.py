"""How the CPU share of the model's threads is limited: the scheduler's port, and its simple forms.

A quota (`sponge.live.cgroup.CgroupScaler`) is the real thing: fractional, and enforced by the kernel. Where
it is not allowed, the number of threads is a limit too, in whole cores, and so are the CPUs on which they may
run.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

from sponge.errors import CgroupUnavailable, CpuControlError

_log = logging.getLogger("sponge.scalers")

_CHECK_EVERY_S = 0.25
"""For a quota in a service, which also asks for the same share again twice a second to see whether it is in force."""


@runtime_checkable
class CpuScaler(Protocol):
    """Limits the CPU share of a set of threads of this process, and can change it while they run."""

    @property
    def cores(self) -> float:
        """Allocation now in force [cores], as asked for; ``inf`` before the first `scale`."""
        ...

    @property
    def how(self) -> str:
        """By what it is limited, for reports: ``"cgroup v2 quota"``, ``"affinity"``, ``"threads"``, …"""
        ...

    def adopt(self, thread_ids: Iterable[int]) -> None:
        """Limit exactly these threads (native ids) from now on."""
        ...

    def scale(self, cores: float) -> float:
        """Put a CPU share [cores] in force and return what is in force now; raises `CpuControlError`."""
        ...

    def close(self) -> None:
        """Give back what was found; again, it does nothing."""
        ...


def check_cores(cores: float) -> None:
    """Raise ``ValueError`` unless *cores* is a positive number (``inf`` included)."""
    if not cores > 0:
        raise ValueError(f"cores must be a number > 0, not {cores!r}")


def check_own_threads(thread_ids: Iterable[int]) -> None:
    """Raise ``ValueError`` if an id belongs to a thread of another process; one that has ended passes."""
    for thread_id in thread_ids:
        if not (isinstance(thread_id, int) and thread_id > 0):  # the kernel takes 0 for the thread that asks
            raise ValueError(f"thread_ids must be native ids of threads, whole numbers above 0, not {thread_id!r}")
        if not os.path.exists(f"/proc/self/task/{thread_id}") and os.path.exists(f"/proc/{thread_id}"):
            raise ValueError(f"thread_ids must be native ids of this process's threads, {thread_id!r} is not")


def is_whole(cores: float) -> bool:
    """Tell whether an allocation is a whole number of cores, up to rounding."""
    return cores > 0.5 and abs(cores - round(cores)) < 1e-6


class ThreadScaler(CpuScaler):
    """Limits nothing itself: the number of intra-op threads that the session runs with is the limit.

    It takes no permission and costs nothing, but knows whole cores only.
    """

    def __init__(self) -> None:
        self._cores = math.inf

    @property
    def cores(self) -> float:
        """Allocation last asked for [cores]; ``inf`` before the first."""
        return self._cores

    @property
    def how(self) -> str:
        """``"threads"``."""
        return "threads"

    def adopt(self, thread_ids: Iterable[int]) -> None:
        """Do nothing: no thread is limited by this scaler."""

    def scale(self, cores: float) -> float:
        """Record an allocation [cores], > 0, and return it."""
        check_cores(cores)
        self._cores = cores
        return cores

    def close(self) -> None:
        """Do nothing: nothing was changed."""

    def __enter__(self) -> ThreadScaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AffinityScaler(CpuScaler):
    """Lets the adopted threads run on ``ceil(cores)`` CPUs only.

    It takes no permission. It knows whole cores only, and shares these CPUs with whatever else the kernel
    puts there.

    Parameters
    ----------
    cpus
        CPUs to choose from, the first are used first; by default those this process may use, one hyper-thread
        of every physical core before the second of any.

    Raises
    ------
    ValueError
        If *cpus* is empty or names a CPU that this process may not use.
    """

    def __init__(self, *, cpus: Iterable[int] | None = None) -> None:
        allowed = os.sched_getaffinity(0)
        self._cpus = _distinct_cores_first(allowed) if cpus is None else list(dict.fromkeys(cpus))
        if not self._cpus or not allowed.issuperset(self._cpus):
            raise ValueError(
                f"cpus must name some of the CPUs that this process may use, {sorted(allowed)}, not {cpus!r}"
            )
        self._found: dict[int, set[int]] = {}
        self._cores = math.inf
        self._pid = os.getpid()
        self._closed = False

    @property
    def cores(self) -> float:
        """Allocation in force [cores], as asked for but for the number of CPUs; ``inf`` before the first."""
        return self._cores

    @property
    def how(self) -> str:
        """``"affinity"``."""
        return "affinity"

    def adopt(self, thread_ids: Iterable[int]) -> None:
        """Limit exactly these threads from now on; one that has ended is passed over.

        Raises
        ------
        CpuControlError
            If the kernel refuses or the scaler is closed.
        ValueError
            If an id belongs to another process.
        """
        wanted = set(thread_ids)
        self._require_open()
        check_own_threads(wanted)
        for thread_id in set(self._found) - wanted:
            self._put(thread_id, self._found.pop(thread_id))
        for thread_id in wanted - set(self._found):
            try:
                self._found[thread_id] = os.sched_getaffinity(thread_id)
            except ProcessLookupError:
                continue
            self._put(thread_id, set(self._chosen(self._cores)))

    def scale(self, cores: float) -> float:
        """Let the adopted threads run on ``ceil(cores)`` CPUs, read back.

        Parameters
        ----------
        cores
            CPU share [cores], > 0; ``inf`` allows all CPUs.

        Returns
        -------
        float
            *cores*, or the number of CPUs there are if that is less.

        Raises
        ------
        CpuControlError
            If the kernel refuses, or the scaler is closed.
        ValueError
            If *cores* is not a positive number.
        """
        check_cores(cores)
        self._require_open()
        chosen = self._chosen(cores)
        if chosen != self._chosen(self._cores) or math.isinf(self._cores):
            for thread_id in list(self._found):
                self._put(thread_id, set(chosen))
        self._cores = min(cores, float(len(self._cpus)))
        return self._cores

    def close(self) -> None:
        """Give the adopted threads the CPUs back on which they were found; again, it does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        while self._found:
            thread_id, cpus = self._found.popitem()
            try:
                self._put(thread_id, cpus)
            except CpuControlError as error:
                _log.warning("thread %d keeps its CPUs: %s", thread_id, error)

    def __enter__(self) -> AffinityScaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _chosen(self, cores: float) -> list[int]:
        if math.isinf(cores):
            return self._cpus
        return self._cpus[: max(1, math.ceil(cores - 1e-6))]

    def _put(self, thread_id: int, cpus: set[int]) -> None:
        what = f"affinity of thread {thread_id}"
        try:
            os.sched_setaffinity(thread_id, cpus)
            found = os.sched_getaffinity(thread_id)
        except ProcessLookupError:
            self._found.pop(thread_id, None)
            return
        except OSError as error:
            raise CpuControlError(what, str(sorted(cpus)), str(error.strerror)) from error
        if found != cpus:
            raise CpuControlError(what, str(sorted(cpus)), f"{sorted(found)} is in force")

    def _require_open(self) -> None:
        if self._closed or os.getpid() != self._pid:
            why = "this scaler is closed" if self._closed else f"this scaler belongs to process {self._pid}"
            raise CpuControlError("affinity", "?", why)


def _distinct_cores_first(cpus: set[int]) -> list[int]:
    """Order CPUs so that the first ones lie on distinct physical cores."""
    seen: dict[str, int] = {}
    rank = {}
    for cpu in sorted(cpus):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                core = file.read()
        except OSError:
            core = str(cpu)
        rank[cpu] = seen[core] = seen.get(core, -1) + 1
    return sorted(cpus, key=lambda cpu: (rank[cpu], cpu))


def best_scaler(how: Literal["auto", "quota", "affinity", "threads"] = "auto", **kwargs: Any) -> CpuScaler:
    """Return a scaler of the kind asked for, or the best that this machine allows.

    Parameters
    ----------
    how
        ``"quota"``: a cgroup quota; ``"affinity"``: CPUs; ``"threads"``: the number of threads alone;
        ``"auto"``: a quota if it is allowed, else threads, and then a warning is logged that says why and
        what would allow it.
    **kwargs
        For the scaler's constructor; with ``"auto"``, for `CgroupScaler`'s.

    Raises
    ------
    CgroupUnavailable
        If a quota is asked for and cannot be set here.
    ValueError
        If *how* is none of these.
    """
    if how not in ("auto", "quota", "affinity", "threads"):
        raise ValueError(f"how must be 'auto', 'quota', 'affinity' or 'threads', not {how!r}")
    if how == "threads":
        return ThreadScaler(**kwargs)
    if how == "affinity":
        return AffinityScaler(**kwargs)
    from sponge.live.cgroup import CgroupScaler

    try:
        return CgroupScaler(**{"check_every_s": _CHECK_EVERY_S, **kwargs})
    except CgroupUnavailable as error:
        if how == "quota":
            raise
        _log.warning(
            "no CPU quota: %s. Only the number of threads limits the CPU share, in whole cores. %s",
            error.reason,
            error.advice,
        )
        return ThreadScaler()
