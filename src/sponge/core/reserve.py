"""How many cores to keep when asking for more takes a while.

A quota is in force at once; a pod that is resized, or a replica that starts, is not. What will be needed must then have
been asked for before. The best forecast that needs no model of the traffic is what was needed lately: the largest
demand within a window that is long against the delay.
"""

from __future__ import annotations

from collections import deque


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
