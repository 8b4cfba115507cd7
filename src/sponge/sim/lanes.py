"""The lanes of a simulated service: what runs, and when it ends.

Work is kept as the remaining fraction of a batch, with the instant from which it counts. While the cores in force are
fewer than the running lanes were planned with together, each has the same share of its own; when that share changes,
every fraction is brought up to date and goes on at the new speed, as under a quota.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from sponge.core.values import Batch
from sponge.sim.service import Times

_TOLERANCE_CORES = 1e-9

Running: TypeAlias = tuple[Batch, int, float, int, float, float, float, float]
"""Batch, its index and its start; lanes busy then, chance; remaining fraction, since when, and the time that the whole
would take at the present speed."""


class Lanes:
    """The batches in flight, and how fast they run.

    Parameters
    ----------
    count
        Lanes.
    times
        What a batch takes.
    """

    def __init__(self, count: int, times: Times) -> None:
        self._times = times
        self._running: list[Running | None] = [None] * count
        self._cores = [0.0] * count
        self._ends_at = [math.inf] * count
        self.next_at = math.inf
        """When the next batch ends [s]; ``inf`` if none does."""
        self._busy = 0
        self._share = 1.0

    def start(self, batch: Batch, index: int, now: float) -> None:
        """Start a batch, the *index*-th of the run.

        Raises
        ------
        RuntimeError
            If its lane is busy, or there is no such lane.
        """
        lane, rows, cores, times = batch.lane, batch.rows, batch.cores, self._times
        if not 0 <= lane < len(self._running) or self._running[lane] is not None:
            raise RuntimeError(f"the controller started a batch on lane {lane}, which is not free")
        self._busy += 1
        factor = 1.0 if times.plain else times.factor(rows, cores, self._busy, now)
        whole_s = factor * times.latency_s(rows, cores * self._share, self._busy)
        self._running[lane] = (batch, index, now, self._busy, factor, 1.0, now, whole_s)
        self._cores[lane] = cores
        self._ends_at[lane] = now + whole_s
        if now + whole_s < self.next_at:
            self.next_at = now + whole_s

    def finish(self, in_force: float, now: float) -> Running:
        """Free the lane that ends now, for the others to go faster; return what ran on it."""
        lane = self._ends_at.index(now)
        running = self._running[lane]
        assert running is not None
        self._busy -= 1
        self._running[lane] = None
        self._cores[lane] = 0.0
        self._ends_at[lane] = math.inf
        self.next_at = min(self._ends_at)
        if self._share != 1.0:
            self.share_cores(in_force, now)
        return running

    def share_cores(self, in_force: float, now: float) -> None:
        """Run at the speed that the cores in force allow from now on."""
        planned = sum(self._cores)
        share = 1.0 if in_force >= planned - _TOLERANCE_CORES else in_force / planned
        if share == self._share:
            return
        self._share = share
        for lane, running in enumerate(self._running):
            if running is None:
                continue
            batch, index, started_at, busy, factor, remaining, since, whole_s = running
            if now > since:
                remaining = max(0.0, remaining - (now - since) / whole_s)
            whole_s = factor * self._times.latency_s(batch.rows, batch.cores * share, busy)
            self._running[lane] = (batch, index, started_at, busy, factor, remaining, now, whole_s)
            self._ends_at[lane] = now + remaining * whole_s if remaining else now
        self.next_at = min(self._ends_at)
