"""`CgroupScaler`: a CPU quota for exactly the threads that run the model, changed in place.

Rules
-----
- Only adopted threads are limited. The rest of the process, a web server's threads for example, stays where
  it is.
- What was found is given back: on ``close()``, on leaving the ``with`` block, when the scaler is garbage
  collected, and at interpreter exit. A process that is killed cannot; the next scaler in the same place
  removes its group.
- A forked child owns nothing: it neither restores nor removes, and may not scale. Its parent does.
- `CgroupScaler.scale` is on the serving path. It writes only when the quota changes, and reads what is in force
  before and after, the quotas above as well: to ask for the same share again is to check that it is still in force.
  Every read lets another thread take the interpreter's lock, so that a service may ask for a look now and then only.
- A fault is told once, and what can be put right is put right by the next call: a quota that something else
  wrote is written again, a group that is gone is made anew and the threads are brought in.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from sponge.errors import CgroupUnavailable, CpuControlError
from sponge.live.cgroup import advice
from sponge.live.cgroup.group import MAX_PERIOD_US, MIN_QUOTA_US, QuotaGroup, QuotaStatistics
from sponge.live.cgroup.hierarchy import Location, locate, start_ticks, version_at
from sponge.live.cgroup.holding import Holding, bring_in, give_back, make_again, send_home, try_thread
from sponge.live.cgroup.kept import failure, is_gone
from sponge.live.cgroup.leftovers import remove_leftovers
from sponge.live.scalers import CpuScaler, check_cores, check_own_threads, is_whole

if TYPE_CHECKING:
    from sponge.live.cgroup.probe import Probe

_numbers = itertools.count()
_NOT_KNOWN = -1


class CgroupScaler(CpuScaler):
    """Limits the adopted threads to a CPU share by a control group's quota (version 1 or 2).

    Parameters
    ----------
    period_us
        Enforcement period [µs], 1_000 to 1_000_000. Within each, the threads may use ``cores * period_us`` of
        CPU time and then wait for the next one; the kernel's own default of 100 ms makes that wait long.
    headroom_cores
        Added to the quota of a whole number of cores, >= 0: there the number of threads is the limit, and a
        quota of exactly as much stops them now and then. Fractional allocations get exactly their share.
    path
        Directory of the control group below which to make ours; by default that in which the process is.
    burst
        Carry unused quota over to later periods, up to the smallest quota, where the kernel can (since 5.14).
    min_cores
        Smaller requests are raised to this [cores]; by default, and at least, the kernel's minimum of 1 ms
        per period.
    check_every_s
        For how long after a look at what is in force a change is only written and read back [s], >= 0; 0: every
        call looks at everything. Asking for the same share always does.

    Raises
    ------
    CgroupUnavailable
        If no quota can be set here; the message says why and what would allow it. It has been tried with a
        thread.
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        *,
        period_us: int = 10_000,
        headroom_cores: float = 0.2,
        path: str | os.PathLike[str] | None = None,
        burst: bool = True,
        min_cores: float | None = None,
        check_every_s: float = 0.0,
    ) -> None:
        if not MIN_QUOTA_US <= period_us <= MAX_PERIOD_US:
            raise ValueError(f"period_us must be between {MIN_QUOTA_US} and {MAX_PERIOD_US}, not {period_us!r}")
        if not 0 <= headroom_cores < math.inf:
            raise ValueError(f"headroom_cores must be a number >= 0, not {headroom_cores!r}")
        smallest = MIN_QUOTA_US / period_us
        if min_cores is not None and not smallest <= min_cores < math.inf:
            raise ValueError(
                f"min_cores must be at least {smallest} (the kernel's 1 ms per period of {period_us} µs), "
                f"not {min_cores!r}"
            )
        if not 0 <= check_every_s < math.inf:
            raise ValueError(f"check_every_s must be a number >= 0, not {check_every_s!r}")
        self._check_every_s = check_every_s
        self._check_at = -math.inf
        self._ceiling_cores = math.inf
        self._min_cores = smallest if min_cores is None else min_cores
        self._headroom_cores = headroom_cores
        self._period_us = period_us
        location, version, parent = _choose_parent(path)
        self._holding = _set_up(version, parent, location, period_us=period_us)
        self._burst = burst
        self._finalizer = weakref.finalize(self, give_back, self._holding)
        self._in_force = math.inf
        self._quota_us: int | None = None
        try:
            try_thread(self._holding)
            self._set_burst()
        except OSError as error:
            self.close()
            raise advice.refused(error, version, parent, location) from error
        except CpuControlError as error:
            self.close()
            raise CgroupUnavailable(f"a trial failed: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def _group(self) -> QuotaGroup:
        return self._holding.group

    def _set_burst(self) -> None:
        if self._burst:
            self._group.set_burst(int(self._min_cores * self._period_us))

    # --- what is in force ---

    @property
    def cores(self) -> float:
        """Allocation in force [cores], as asked for (after raising to the minimum).

        ``inf`` before the first scale.
        """
        return self._in_force

    @property
    def how(self) -> str:
        """``"cgroup v1 quota"`` or ``"cgroup v2 quota"``."""
        return self._group.how

    @property
    def directory(self) -> str:
        """Directory of the control group that this scaler made."""
        return self._group.directory

    @property
    def burst_us(self) -> int:
        """Unused quota that may be carried over [µs]; 0 if switched off or unknown to the kernel."""
        return self._group.burst_us

    def statistics(self) -> QuotaStatistics:
        """Return the kernel's counts of periods and throttling since the group was made.

        Raises
        ------
        CpuControlError
            If the scaler is closed or the group is gone.
        """
        with self._holding.lock:
            self._require_open("cpu.stat", "?")
            try:
                return self._group.statistics()
            except OSError as error:
                raise failure(f"{self._group.directory}/cpu.stat", "?", error) from error

    def throttled_s(self) -> float:
        """Return for how long the adopted threads were stopped [s], summed over CPUs.

        Raises as `statistics`.
        """
        return self.statistics().throttled_s

    # --- changing it ---

    def scale(self, cores: float) -> float:
        """Put a CPU share in force for the adopted threads together.

        Parameters
        ----------
        cores
            CPU share [cores], > 0; ``inf`` lifts the limit. Less than the minimum is raised to it.

        Returns
        -------
        float
            Share now in force [cores], read back from the kernel: *cores*, or what the quotas of the groups
            above (a container's, for example) leave of it.

        Raises
        ------
        CpuControlError
            If the kernel refuses, the group is gone, or something else than this scaler has written the quota.
            It is told once; the next call makes the group, or writes the quota, again. The last value that took
            then still counts in `cores`.
        ValueError
            If *cores* is not a positive number.
        """
        with self._holding.lock:
            check_cores(cores)
            self._require_open(self._group.quota_path, str(cores))
            if self._holding.lost:
                self._make_again(str(cores))
            share = max(cores, self._min_cores)
            try:
                quota_us = self._quota_for(share, self._ceiling_cores)
                if quota_us == self._quota_us or time.monotonic() >= self._check_at:
                    self._look()
                    quota_us = self._quota_for(share, self._ceiling_cores)
                if quota_us != self._quota_us:
                    self._group.write_quota(quota_us)
            except CpuControlError as error:
                # What is in force is not what we last wrote: the next call must not take "unchanged" for granted.
                self._quota_us = _NOT_KNOWN
                self._check_at = -math.inf
                self._holding.lost = is_gone(error.__cause__)
                raise
            self._quota_us = quota_us
            self._in_force = min(share, self._ceiling_cores)
            return self._in_force

    def _look(self) -> None:
        """See whether what we wrote is in force, and what the groups above allow."""
        if self._quota_us != _NOT_KNOWN:
            self._group.check()  # also before a write, which would cover up what somebody else did
        self._ceiling_cores = self._group.ceiling_cores()
        self._check_at = time.monotonic() + self._check_every_s

    def _make_again(self, value: str) -> None:
        """Make a new group in the place of one that is gone; raises `CpuControlError` as long as that fails."""
        try:
            make_again(self._holding, _name())
            self._set_burst()
        except (OSError, CpuControlError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.reason
            path = self._group.quota_path
            why = f"the group is gone and could not be made again: {reason}"
            raise CpuControlError(path, value, why, left_cores=math.inf) from error
        self._quota_us = _NOT_KNOWN

    def _quota_for(self, share: float, ceiling: float) -> int | None:
        """Return the quota [µs per period] for a share, below a ceiling [cores] that version 1 enforces."""
        if math.isinf(share):
            return None
        wanted = round(share * self._period_us)
        if is_whole(share):
            wanted = round((round(share) + self._headroom_cores) * self._period_us)
        if not math.isinf(ceiling):
            wanted = min(wanted, int(ceiling * self._period_us))
        return max(wanted, MIN_QUOTA_US)

    def adopt(self, thread_ids: Iterable[int]) -> None:
        """Limit exactly these threads from now on; others adopted before go back to where they were found.

        A thread started by an adopted one is limited with it (the kernel lets it inherit) until the next call.

        Parameters
        ----------
        thread_ids
            Native ids (``threading.get_native_id()``) of threads of this process; one that has ended is passed over.

        Raises
        ------
        CpuControlError
            If a thread may not be moved; those moved before it stay moved.
        ValueError
            If an id belongs to another process.
        """
        wanted = set(thread_ids)
        check_own_threads(wanted)
        with self._holding.lock:
            self._require_open(self._group.directory, "threads")
            if self._holding.lost:
                self._make_again("threads")
            try:
                present = set(self._group.thread_ids())
                for thread_id in present - wanted:
                    send_home(self._holding, thread_id)
                for thread_id in wanted - present:
                    bring_in(self._holding, thread_id)
                for thread_id in self._holding.origins.keys() - wanted:  # have ended
                    del self._holding.origins[thread_id]
            except OSError as error:
                self._holding.lost = not os.path.exists(self._group.directory)
                raise failure(os.fsdecode(error.filename or self._group.directory), "thread id", error) from error

    def thread_ids(self) -> list[int]:
        """Return the native ids of the threads that are limited now, inherited ones included.

        Raises as `statistics`.
        """
        with self._holding.lock:
            self._require_open(self._group.directory, "threads")
            try:
                return self._group.thread_ids()
            except OSError as error:
                raise failure(f"{self._group.directory}/{self._group.threads_file}", "?", error) from error

    def _require_open(self, path: str, value: str) -> None:
        if not self._finalizer.alive:
            raise CpuControlError(path, value, "this scaler is closed")
        if os.getpid() != self._holding.pid:
            raise CpuControlError(
                path,
                value,
                f"this scaler belongs to process {self._holding.pid}; make another one after a fork",
            )

    # --- the end ---

    def close(self) -> None:
        """Send the adopted threads back to where they were found and remove the group; again, it does nothing."""
        self._finalizer()

    def __enter__(self) -> CgroupScaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def probe(*, path: str | os.PathLike[str] | None = None) -> Probe:
        """Find out by trying what CPU control this machine allows to this process, and what would allow more.

        Parameters
        ----------
        path
            As for the constructor.
        """
        from sponge.live.cgroup.probe import probe

        return probe(path)


# --- set-up ---


def _choose_parent(path: str | os.PathLike[str] | None) -> tuple[Location | None, Literal[1, 2], str]:
    """Return our own location, and version and directory of the group below which to make ours."""
    location, reason = locate()
    if path is None:
        if location is None:
            raise advice.unreachable(reason)
        return location, location.version, location.directory
    # Links are followed once, here: what is meant must itself lie in a mounted hierarchy of control groups.
    parent = os.path.realpath(os.fsdecode(path))
    version = version_at(parent)
    if version is None or not os.path.exists(os.path.join(parent, "cgroup.procs")):
        raise CgroupUnavailable(
            f"{parent} is not a control group with a CPU controller",
            "Give the directory of one, below where /proc/self/mountinfo shows the hierarchy with cpu",
        )
    return (location if location is not None and location.version == version else None), version, parent


def _name() -> str:
    return f"sponge-{os.getpid()}-{start_ticks(os.getpid()) or 0}-{next(_numbers)}"


def _set_up(version: Literal[1, 2], parent: str, location: Location | None, *, period_us: int) -> Holding:
    name = _name()
    group: QuotaGroup
    try:
        if version == 1:
            from sponge.live.cgroup.v1 import V1Group

            group = V1Group(parent, name, period_us=period_us)
        else:
            from sponge.live.cgroup.v2 import V2Group

            group = V2Group(parent, name, period_us=period_us)
    except OSError as error:
        raise advice.refused(error, version, parent, location) from error
    # After ours is made: the leftovers tell version 2 that one of us switched the controller on.
    remove_leftovers(parent)
    return Holding(group=group, location=location, home=location.directory if location else parent)
