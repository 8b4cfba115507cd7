"""Following a model that has become slower or faster than its profile.

The shape of the latency model is kept and only its scale moves. Refitting all coefficients on whatever batch sizes
were served last cannot tell the per-batch cost from the per-request cost when all batches had one size, and then
predicts nonsense for the others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class DriftScale:
    """Factor by which recent batches took longer than predicted.

    It is the *quantile* of measured over predicted time among the last *window* batches, so that
    ``scale * predicted`` is kept by that share of them, whatever percentile the model itself was fitted to. The
    window starts full of ones: the profile is trusted until there is evidence against it, and one straggler moves
    nothing.

    Parameters
    ----------
    window
        Batches remembered, >= 1.
    quantile
        In (0, 1].
    """

    __slots__ = ("_index", "_ordered", "_recent", "scale")

    def __init__(self, window: int = 64, quantile: float = 0.95) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not (0 < quantile <= 1):
            raise ValueError(f"quantile must be in (0, 1], got {quantile}")
        self._recent: deque[float] = deque([1.0] * window)
        self._ordered = [1.0] * window
        self._index = min(window - 1, int(window * quantile))
        self.scale = 1.0

    def observe(self, service_s: float, predicted_s: float) -> None:
        """Learn from one batch: measured and (unscaled) predicted service time [s], both > 0."""
        ratio = service_s / predicted_s
        oldest = self._recent.popleft()
        del self._ordered[bisect_left(self._ordered, oldest)]
        self._recent.append(ratio)
        insort(self._ordered, ratio)
        self.scale = self._ordered[self._index]
