"""What runs: the lanes of a controller, and the work that is left on them.

Every question is answered from arrays with one entry a lane, so that a decision costs the same on 128 lanes as on 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

import attrs
import numpy as np

from sponge.core.values import Batch


@attrs.define(slots=True)
class Running:
    """A batch on its lane."""

    batch: Batch
    started_at: float
    tail_s: float
    typical_s: float
    """Predictions of the unscaled models, for the drift."""


class Lanes:
    """Which lanes are free, and what runs on the others.

    Parameters
    ----------
    count
        Number of lanes, >= 1.
    """

    __slots__ = ("_cores", "_ends_at", "_free", "_free_at", "_running", "busy", "cores")

    def __init__(self, count: int) -> None:
        self._running: list[Running | None] = [None] * count
        self._free = list(range(count))  # a heap: the lowest lane first
        self._cores = np.zeros(count)
        self._ends_at = np.zeros(count)
        self._free_at = np.full(count, np.inf)  # the same, but for the lanes on which nothing runs
        self.busy = 0
        """Lanes that run a batch."""
        self.cores = 0.0
        """Cores of all running batches together."""

    def __iter__(self) -> Iterator[Running]:
        """Iterate over what runs, the lowest lane first."""
        return (running for running in self._running if running is not None)

    @property
    def free(self) -> int | None:
        """The lowest free lane, or None."""
        return self._free[0] if self._free else None

    def backlog_core_s(self, now: float) -> float:
        """Return the predicted work left in the running batches [core-seconds]."""
        if not self.busy:
            return 0.0
        left_s = self._ends_at - now
        return float(np.maximum(left_s, 0.0, out=left_s) @ self._cores)

    @property
    def free_at(self) -> float:
        """When the first of the running batches is predicted to end [s]; ``-inf`` if none runs."""
        return float(np.minimum.reduce(self._free_at)) if self.busy else float("-inf")

    def freed(self) -> list[tuple[float, float]]:
        """Return (cores, instant) of what the running batches are predicted to give back, in the order of time."""
        ends_at = self._ends_at.tolist()
        freed = [(running.batch.cores, ends_at[running.batch.lane]) for running in self]
        return sorted(freed, key=lambda pair: pair[1])

    def start(self, running: Running) -> None:
        """Put a batch on its lane, which must be the lowest free one."""
        batch = running.batch
        lane = heappop(self._free)
        assert lane == batch.lane
        self._running[lane] = running
        self._cores[lane] = batch.cores
        self._ends_at[lane] = self._free_at[lane] = running.started_at + batch.expected_s
        self.busy += 1
        self.cores = self._sum() if self.busy > 1 else batch.cores

    def finish(self, lane: int) -> Running:
        """Free a lane and return what ran there.

        Raises
        ------
        ValueError
            If there is no such lane, or nothing runs on it.
        """
        running = self._running[lane] if 0 <= lane < len(self._running) else None
        if running is None:
            raise ValueError(f"lane {lane} finished a batch but was not running one")
        self._running[lane] = None
        self._cores[lane] = 0.0
        self._free_at[lane] = np.inf
        heappush(self._free, lane)
        self.busy -= 1
        self.cores = self._sum() if self.busy else 0.0
        return running

    def _sum(self) -> float:
        return float(np.add.reduce(self._cores))  # not kept up by differences, which would add up their rounding

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert self.busy == sum(1 for _ in self) == len(self._running) - len(self._free)
        for lane, running in enumerate(self._running):
            assert (running is None) == (lane in self._free)
            assert running is None or running.batch.lane == lane
            assert self._cores[lane] == (0.0 if running is None else running.batch.cores)
        assert self.cores == self._sum()
