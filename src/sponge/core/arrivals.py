"""How many requests arrive per second, estimated from the arrivals themselves.

Every arrival enters with the instant at which it happened, so the estimate does not depend on when it is asked for,
and a burst and a pause of the same length weigh the same.
"""

from __future__ import annotations

import math


class ArrivalRate:
    """Exponentially decaying estimate of the arrival rate.

    With ``a_i`` the arrivals so far and time constant T, the estimate at *now* is
    ``sum_i exp(-(now - a_i)/T) / (T * max(1 - exp(-(now - start)/T), 0.2))``: the second factor corrects the bias of a
    window that has not yet been filled; its floor keeps the first few arrivals of a burst from reading as a flood.

    Parameters
    ----------
    time_constant_s
        T [s], > 0: how much of the past counts.

    Raises
    ------
    ValueError
        If *time_constant_s* is not positive and finite.
    """

    __slots__ = ("_last", "_start", "_time_constant_s", "_weight")

    def __init__(self, time_constant_s: float = 2.0) -> None:
        if not (0 < time_constant_s < math.inf):
            raise ValueError(f"time_constant_s must be positive and finite, got {time_constant_s}")
        self._time_constant_s = time_constant_s
        self._start: float | None = None
        self._last = 0.0
        self._weight = 0.0

    def observe(self, now: float, rows: int = 1) -> None:
        """Count *rows* rows that arrived at *now* [s]; instants must not decrease."""
        if self._start is None:
            self._start = self._last = now
        self._weight = self._weight * math.exp((self._last - now) / self._time_constant_s) + rows
        self._last = now

    def rate_rps(self, now: float) -> float:
        """Return the rows per second expected to arrive after *now*; 0 before the second arrival.

        One arrival says nothing about the distance to the next.
        """
        if self._start is None or self._last == self._start:
            return 0.0
        seen = max(1.0 - math.exp((self._start - now) / self._time_constant_s), 0.2)
        return self._weight * math.exp((self._last - now) / self._time_constant_s) / (self._time_constant_s * seen)
