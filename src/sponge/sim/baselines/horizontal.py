"""Horizontal autoscaling: replicas of one core each, a batch size and a number of replicas every second.

Razavi, Luthra, Koldehofe, Mühlhäuser, Wang: "FA2: Fast, Accurate Autoscaling for Serving Deep Learning Inference with
SLA Guarantees", RTAS 2022.
"""

from __future__ import annotations

import math
from collections import deque

import attrs

from sponge.core.actions import Action
from sponge.core.latency import Latency
from sponge.core.values import Request
from sponge.sim.baselines.base import Baseline, Order, require


@attrs.frozen(kw_only=True, slots=True)
class Replicas:
    """What the program for one model chose."""

    count: int
    batch_size: int
    fill_s: float
    """Time for a batch to fill up at the planned rate [s]: as long may a request wait for company."""


class HorizontalController(Baseline):
    """FA2-like: as few 1-core replicas as keep up with the rate, in batches that the SLO leaves time for.

    A replica is a lane of one core. It is asked for with `SetCpu` and used once `CpuApplied` covers it, so the cold
    start is the simulated service's delay for a larger allocation; one that is not wanted any more takes no further
    batch and is given back when its last one is done. Requests wait in one queue and go to the replica that is free.

    Parameters
    ----------
    latency
        Predicts the service time on one core.
    max_replicas
        Replicas at most, ≥ 1.
    max_batch_size
        Largest batch, ≥ 1.
    slo_s
        The one latency that every request is promised [s], > 0: time for the network is not known here.
    rate_margin
        The measured rate counts so many times, > 0.
    scale_down_after_s
        Replicas are given back when fewer would have done for so long [s], ≥ 0.
    initial_replicas, min_replicas
        At the start and at least, ≥ 1.
    period_s
        Between two decisions [s], > 0.
    order
        Of the queue.
    max_queue
        Waiting requests at most, ≥ 1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    FA2, RTAS 2022; with a single model its dynamic program over a graph of models is one minimum over batch sizes. The
    delay before giving back is the stabilisation window of the Kubernetes horizontal pod autoscaler.
    """

    def __init__(
        self,
        latency: Latency,
        *,
        max_replicas: int = 16,
        max_batch_size: int = 8,
        slo_s: float = 1.0,
        rate_margin: float = 1.0,
        scale_down_after_s: float = 10.0,
        initial_replicas: int = 1,
        min_replicas: int = 1,
        period_s: float = 1.0,
        order: Order = "fifo",
        max_queue: int = 1024,
    ) -> None:
        super().__init__(
            initial_cores=initial_replicas,
            order=order,
            max_batch_size=max_batch_size,
            max_lanes=max_replicas,
            max_queue=max_queue,
            latency=latency,
            period_s=period_s,
        )
        require(0 < slo_s < math.inf, "slo_s", "positive and finite", slo_s)
        require(0 < rate_margin < math.inf, "rate_margin", "positive and finite", rate_margin)
        require(0 <= scale_down_after_s < math.inf, "scale_down_after_s", "finite and not negative", scale_down_after_s)
        require(1 <= min_replicas <= max_replicas, "min_replicas", "from 1 to max_replicas", min_replicas)
        range_ = "from min_replicas to max_replicas"
        require(min_replicas <= initial_replicas <= max_replicas, "initial_replicas", range_, initial_replicas)
        self.slo_s = slo_s
        self.rate_margin = rate_margin
        self.scale_down_after_s = scale_down_after_s
        self.min_replicas = min_replicas
        self._latency_s = [latency.latency_s(rows, 1.0) for rows in range(1, max_batch_size + 1)]
        self._plan = Replicas(count=initial_replicas, batch_size=1, fill_s=0.0)
        self._target = initial_replicas
        self._wanted: deque[tuple[float, int]] = deque()
        self._arrivals = 0
        self._ready = 0

    @property
    def plan(self) -> Replicas:
        """What the last period's requests ask for, before the delay for giving back."""
        return self._plan

    def solve(self, arrival_rate_rps: float) -> Replicas:
        """Return the fewest replicas for a rate [1/s], > 0, with the smallest batch that does with them.

        Feasible is ``l(b, 1) + b/λ ≤ SLO`` (the first request of a batch waits for the others to come) with
        ``n = ⌈λ·l(b, 1)/b⌉`` replicas, no more than allowed. If no batch size is feasible, the one with the highest
        throughput counts, on as many replicas as it takes or as there may be.
        """
        best: tuple[int, int] | None = None
        fallback = (math.inf, 1)
        for rows, latency_s in enumerate(self._latency_s, start=1):
            count = max(1, math.ceil(arrival_rate_rps * latency_s / rows - 1e-9))
            fallback = min(fallback, (latency_s / rows, rows))
            if count <= self.max_lanes and latency_s + rows / arrival_rate_rps <= self.slo_s:
                best = (count, rows) if best is None else min(best, (count, rows))
        if best is None:
            per_request_s, rows = fallback
            best = (min(self.max_lanes, math.ceil(arrival_rate_rps * per_request_s - 1e-9)), rows)
        count, rows = best
        return Replicas(count=max(count, self.min_replicas), batch_size=rows, fill_s=rows / arrival_rate_rps)

    def _on_arrival(self, request: Request, now: float) -> None:
        self._arrivals += request.rows

    def _on_period(self, ended_at: float, actions: list[Action]) -> None:
        assert self.period_s is not None
        rate = self.rate_margin * self._arrivals / self.period_s
        self._arrivals = 0
        wanted = self.min_replicas
        if rate > 0:
            self._plan = self.solve(rate)
            wanted = self._plan.count
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((ended_at, wanted))
        while self._wanted[0][0] < ended_at - self.scale_down_after_s:
            self._wanted.popleft()
        self._target = self._wanted[0][1]
        if self._cores_asked is not None and self._target > self._cores_asked:
            self._ask(float(self._target), actions)

    def _watches(self) -> bool:
        return self._arrivals > 0 or self._target > self.min_replicas or not self.idle

    def _on_applied(self, cores: float) -> None:
        # An answer to an older wish, of which part has been given back since, does not bring that part back.
        self._ready = math.floor(min(cores, self._cores_asked or 0.0) + 1e-9)

    def _lane_is_free(self) -> bool:
        return self._busy() < min(self._ready, self._target)

    def _lane_cores(self) -> float:
        return 1.0

    def _expected_s(self, rows: int) -> float:
        return self._latency_s[rows - 1]

    def _after(self, actions: list[Action]) -> None:
        keep = max(self._target, self._busy())
        if self._cores_asked is not None and keep < self._cores_asked:
            self._ask(float(keep), actions)
            self._ready = min(self._ready, keep)

    def _busy(self) -> int:
        return self.max_lanes - self._lanes.count(None)

    def _rows_to_start(self, now: float) -> int | None:
        rows = max(self._plan.batch_size, self._head().rows)
        if self._draining or now >= self._window_ends() or self._has_rows(rows):
            return rows
        return None

    def _waits_until(self) -> float | None:
        return self._window_ends() if self._lane_is_free() else None

    def _window_ends(self) -> float:
        return self._oldest().arrived_at + self._plan.fill_s
