"""How many cores to keep when asking for more takes a while.

A quota is in force at once; a pod that is resized, or a replica that starts, is not. What will be needed must then have
been asked for before. The best forecast that needs no model of the traffic is what was needed lately: the largest
demand within a window that is long against the delay. It is looked at often against the delay, but not at every event.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sponge.core.solver import Solver
from sponge.core.waves import WaveSample

FloatArray: TypeAlias = npt.NDArray[np.float64]

WINDOW_DELAYS = 10.0
"""Window over which the demand is looked back upon, in delays."""
_LOOK_DELAYS = 0.05
"""Time between two looks at the demand, in delays: a look later than that is hardly later."""
_NEGLIGIBLE_REQUESTS = 0.1
"""Requests to be expected within the window below which none is reserved for."""


class PeakDemand:
    """Largest demand within a sliding window.

    Parameters
    ----------
    window_s
        Length of the window [s], > 0.
    """

    __slots__ = ("_falling", "window_s")

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        # (instant, cores) with falling cores: an earlier entry that is not larger can never be the peak again.
        self._falling: deque[tuple[float, float]] = deque()

    def observe(self, now: float, cores: float) -> None:
        """Note how many cores are needed at *now* [s]; instants must not decrease."""
        while self._falling and self._falling[-1][1] <= cores:
            self._falling.pop()
        self._falling.append((now, cores))

    def cores(self, now: float) -> float:
        """Return the largest demand of the last *window_s* [cores]; what was last observed counts until it changes."""
        while len(self._falling) > 1 and self._falling[0][0] + self.window_s <= now:
            self._falling.popleft()
        return self._falling[0][1] if self._falling else 0.0

    def changes_at(self, now: float) -> float:
        """Return the instant from which the peak is lower if nothing new is observed [s]; ``inf`` if it will not be."""
        self.cores(now)
        return self._falling[0][0] + self.window_s if len(self._falling) > 1 else float("inf")


class Reserve:
    """The cores to keep for a service whose resizes take a while.

    Parameters
    ----------
    solver
        Tells the fewest cores for a queue.
    delay_s
        How long a resize takes [s], > 0.
    guard_s
        Time kept between the predicted end of a batch and the deadline [s].
    """

    __slots__ = ("_began", "_delay_s", "_guard_s", "_look_at", "_peak", "_sample", "_solver", "_stale")

    def __init__(self, solver: Solver, delay_s: float, guard_s: float) -> None:
        self._solver = solver
        self._delay_s = delay_s
        self._guard_s = guard_s
        self._peak = PeakDemand(WINDOW_DELAYS * delay_s)
        self._sample = WaveSample(solver.products.tolist())
        self._look_at = float("-inf")
        self._stale = False
        self._began = False

    def is_due(self, now: float) -> bool:
        """Tell whether to `look` again; what happens before is noted as not looked at."""
        self._stale = now < self._look_at
        return not self._stale

    def look(self, now: float, deadlines: FloatArray, scale: float, arrival_rate_rps: float) -> None:
        """Note the fewest cores that would do for what waits and for the arrival rate, if they were there.

        Parameters
        ----------
        now
            The instant [s].
        deadlines
            Of all waiting rows in order [s], and ``inf`` as the last entry, shape ``(rows + 1,)``.
        scale
            Drift of the latency model.
        arrival_rate_rps
            Rows per second.
        """
        if not self._began:
            # Nothing is known yet, and what the first request needs is not what the next ones do.
            self._began = True
            self._peak.observe(now, self._solver.max_cores)
        self._look_at = now + _LOOK_DELAYS * self._delay_s
        self._stale = False
        solver = self._solver
        if len(deadlines) > 1:
            tightest_s = self._sample.tightest_s(deadlines, now + self._guard_s)
            plan = solver.fewest(tightest_s / scale, arrival_rate_rps * scale)
            # What could not even be saved at once cannot be saved by cores that come later.
            cores = solver.solve((), arrival_rate_rps * scale).cores if plan is None else plan.cores
        elif arrival_rate_rps * self._peak.window_s > _NEGLIGIBLE_REQUESTS:
            cores = solver.solve((), arrival_rate_rps).cores
        else:
            cores = 0.0
        self._peak.observe(now, cores)

    def cores(self, now: float) -> float:
        """Return the cores to keep [cores]."""
        return self._peak.cores(now)

    def wakeup(self, now: float, *, idle: bool) -> float:
        """Return when this may change if nothing happens before [s]; ``inf`` if it will not."""
        wakeup = self._peak.changes_at(now)
        if self._stale:
            wakeup = min(wakeup, self._look_at)
        if idle and self.cores(now) > 0:
            # No event will tell that nothing is needed any more.
            wakeup = min(wakeup, now + self._peak.window_s)
        return wakeup
