"""The allocation as the scheduler sees it: what is in force, what went wrong, and when to try again.

Rules, and why they hold:

* Service never waits for CPU control. If an allocation cannot be put in force, the model runs under what is left: the
  last one, or, if nothing limits the threads any more, their number.
* What is in force is checked while batches run, not only when the allocation changes: under a steady load it does not
  change for hours, and meanwhile somebody may have changed the quota, one above it, or removed the group.
* A fault is put right at once if that is possible, else tried again every half second, with the threads adopted anew:
  they may have been moved. In between nothing is tried, however many batches start.
* A fault is logged when it begins and when it is over, not for every attempt. Where it comes again and again (two
  masters of one quota) only the first, second, fourth, eighth … is, and any after a quiet minute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sponge.errors import CpuControlError
from sponge.live.scalers import CpuScaler

_log = logging.getLogger("sponge")

CHECK_EVERY_S = 0.5
"""Less than the second for which the controller remembers that it got less than it had asked for."""
_QUIET_S = 60.0


class CpuControl:
    """Puts allocations in force by a scaler and keeps the account; called by one thread at a time.

    Parameters
    ----------
    scaler
        Limits the threads.
    thread_ids
        Returns the native ids of the threads that run the model.
    resized
        Called with another allocation that is in force now, and the instant.
    now
        Start of the account [s on the scheduler's clock].
    """

    def __init__(
        self,
        scaler: CpuScaler,
        thread_ids: Callable[[], Iterable[int]],
        *,
        resized: Callable[[float, float], None],
        now: float,
    ) -> None:
        self.cores = 0.0
        """Allocation in force [cores]."""
        self.resizes = 0
        self.errors = 0
        """Attempts that failed."""
        self.fault = ""
        """Why the allocation asked for is not in force now; empty if it is."""
        self._scaler = scaler
        self._thread_ids = thread_ids
        self._resized = resized
        self._asked: float | None = None
        self._left_cores = float("inf")
        self._check_at = now
        self._since = now
        self._core_s = 0.0
        self._faults = 0
        self._logged_at = float("-inf")
        self._logged = False

    def adopt(self) -> None:
        """Limit the threads; raises what the scaler raises."""
        self._scaler.adopt(self._thread_ids())

    def scale(self, cores: float, now: float) -> float:
        """Put an allocation in force if possible and return what is in force then [cores]."""
        self._asked = cores
        if self.fault and now < self._check_at:
            return self._account(min(cores, self._left_cores), now)
        return self._attempt(cores, now)

    def check(self, now: float) -> float | None:
        """Make sure, now and then, that what was asked for is in force; return what is, if the controller should know.

        To be called whenever a batch starts.
        """
        if now < self._check_at or self._asked is None:
            return None
        before = self.cores
        cores = self._attempt(self._asked, now)
        return cores if cores != before or cores < self._asked else None

    def allocated_core_s(self, now: float) -> float:
        """Return the integral of the allocation over time [core-seconds]."""
        return self._core_s + self.cores * (now - self._since)

    def _attempt(self, cores: float, now: float) -> float:
        self._check_at = now + CHECK_EVERY_S
        for _ in range(1 if self.fault else 2):
            try:
                if self.fault:
                    self.adopt()
                applied = self._scaler.scale(cores)
            except BaseException as error:  # CpuControlError, or whatever a scaler of the user's own raises
                self._failed(error, now)
            else:
                self._works()
                self._left_cores = applied
                return self._account(applied, now)
        return self._account(min(cores, self._left_cores), now)

    def _failed(self, error: BaseException, now: float) -> None:
        self.errors += 1
        if isinstance(error, CpuControlError) and error.left_cores is not None:
            self._left_cores = error.left_cores
        begins, self.fault = not self.fault, str(error) or type(error).__name__
        if not begins:
            return
        self._faults += 1
        first = self._faults & (self._faults - 1) == 0
        self._logged = first or now - self._logged_at > _QUIET_S
        if self._logged:
            self._logged_at = now
            left = "the number of threads" if self._left_cores == float("inf") else f"{self._left_cores:g} cores"
            _log.warning(
                "CPU control fails (fault no. %d), what is left is %s; tried again while serving: %s",
                self._faults,
                left,
                self.fault,
            )

    def _works(self) -> None:
        if self.fault and self._logged:
            _log.warning("CPU control works again, by %s", self._scaler.how)
        self.fault = ""

    def _account(self, cores: float, now: float) -> float:
        if cores != self.cores:
            self._core_s += self.cores * (now - self._since)
            self.cores, self._since = cores, now
            self.resizes += 1
            self._resized(cores, now)
        return cores
