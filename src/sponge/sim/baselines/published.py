"""The published vertical scaler: one allocation a second, from one latency budget for the whole second.

Razavi, Ghafouri, Mühlhäuser, Jamshidi, Wang: "Sponge: Inference Serving with Dynamic SLOs Using In-Place Vertical
Scaling", EuroMLSys 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sponge.core.actions import Action
from sponge.core.latency import Latency
from sponge.core.values import Plan, Request
from sponge.sim.baselines.base import Baseline, Order, require


class PublishedAllocation:
    """The published integer program for one second, by trying every core count and batch size.

    All *requests* of the second are taken to be there at its beginning, with the same *budget*. A choice of ``c`` cores
    and batches of ``b`` is feasible if the last batch is done in time and the service keeps up with the rate:
    ``(⌊(n − 1)/b⌋ + 1)·l(b, c) ≤ s`` and ``b / l(b, c) ≥ λ``. Of the feasible choices the one with the fewest cores
    counts, of these the one with the smallest batch (the published objective ``c + w·b`` with a small ``w``).

    Parameters
    ----------
    latency
        Predicts ``l(b, c)``.
    max_cores, max_batch_size
        Largest core count and batch, ≥ 1; the choices are the integers from 1 on.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, latency: Latency, *, max_cores: int, max_batch_size: int) -> None:
        require(max_cores >= 1, "max_cores", "at least 1", max_cores)
        require(max_batch_size >= 1, "max_batch_size", "at least 1", max_batch_size)
        self.max_cores = max_cores
        self.max_batch_size = max_batch_size
        cores = np.arange(1, max_cores + 1, dtype=np.float64)
        self._sizes = np.arange(1, max_batch_size + 1)
        self._latency_s = latency.latency_s(self._sizes[None, :].astype(np.float64), cores[:, None])

    def solve(self, budget_s: float, *, requests: int, arrival_rate_rps: float) -> Plan | None:
        """Return the cheapest feasible choice, or None if there is none.

        Parameters
        ----------
        budget_s
            Remaining time of every request [s]; may be negative.
        requests
            ``n``, ≥ 1.
        arrival_rate_rps
            ``λ`` [1/s], ≥ 0.
        """
        require(requests >= 1, "requests", "at least 1", requests)
        batches = (requests - 1) // self._sizes + 1
        in_time = batches * self._latency_s <= budget_s
        keeps_up = self._sizes >= arrival_rate_rps * self._latency_s
        feasible = np.argwhere(in_time & keeps_up)
        if not len(feasible):
            return None
        row, column = feasible[0]
        return Plan(cores=float(row + 1), batch_size=int(self._sizes[column]), feasible=True)

    def replay(
        self,
        budgets_s: Iterable[float],
        *,
        arrival_rate_rps: float,
        initial_cores: float | None = None,
        period_s: float = 1.0,
    ) -> Iterator[float]:
        """Yield the allocation of each period, given its budget: the published figure without serving anybody.

        Parameters
        ----------
        budgets_s
            Of each period [s]; the published one is ``0.9·SLO − network time of that second``.
        arrival_rate_rps
            ``λ`` [1/s], > 0; each period has ``⌈λ·period_s⌉`` requests.
        initial_cores
            Kept as long as nothing is feasible [cores]; None for *max_cores*.
        period_s
            Length of a period [s], > 0.

        Yields
        ------
        float
            Cores; those of the period before where nothing is feasible.
        """
        require(0 < arrival_rate_rps < math.inf, "arrival_rate_rps", "positive and finite", arrival_rate_rps)
        requests = _requests(arrival_rate_rps * period_s)
        cores = float(self.max_cores if initial_cores is None else initial_cores)
        for budget_s in budgets_s:
            plan = self.solve(budget_s, requests=requests, arrival_rate_rps=arrival_rate_rps)
            cores = cores if plan is None else plan.cores
            yield cores


class PublishedController(Baseline):
    """The published algorithm as a controller: one lane, resized once a period.

    At the end of each period it takes the smallest remaining time at arrival among the requests of that period, less
    the safety margin on the SLO, as the budget of the next one, and solves `PublishedAllocation`. Where nothing is
    feasible, and where nobody came, it keeps the allocation and the batch size. In between nothing changes: batches of
    that size leave when they are full, others when their first request has waited long enough. Nothing is turned away.

    Parameters
    ----------
    latency
        Predicts the service time.
    max_cores, max_batch_size
        Largest core count and batch (published: 16 and 8).
    slo_s
        SLO [s], > 0, of which the margin is a part (published: 1 s).
    safety
        Part of the SLO that is planned with, in (0, 1] (published: 0.9).
    arrival_rate_rps
        Configured rate [1/s], > 0 (published: 20); None: requests of the last period over its length.
    period_s
        Adaptation period [s], > 0 (published: 1 s).
    initial_cores
        Allocation until the first period ends [cores]; None for *max_cores*, as published.
    order
        ``"edf"``, as the paper says, or ``"fifo"``, as its public code does.
    partial_wait_s
        How long the request that has waited longest lets a batch that is not full wait [s], ≥ 0.
    budget_of
        Budget of the period that begins at an instant [s → s], before the margin, in place of what was seen in the last
        one: for the published experiment, whose monitor reads the network time of the current second.
    max_queue
        Waiting requests at most, ≥ 1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Razavi et al., EuroMLSys 2024.
    """

    def __init__(
        self,
        latency: Latency,
        *,
        max_cores: int = 16,
        max_batch_size: int = 8,
        slo_s: float = 1.0,
        safety: float = 0.9,
        arrival_rate_rps: float | None = None,
        period_s: float = 1.0,
        initial_cores: float | None = None,
        order: Order = "edf",
        partial_wait_s: float = 1.0,
        budget_of: Callable[[float], float] | None = None,
        max_queue: int = 1024,
    ) -> None:
        self.allocation = PublishedAllocation(latency, max_cores=max_cores, max_batch_size=max_batch_size)
        super().__init__(
            initial_cores=max_cores if initial_cores is None else initial_cores,
            order=order,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            latency=latency,
            period_s=period_s,
        )
        rate = arrival_rate_rps
        require(0 < slo_s < math.inf, "slo_s", "positive and finite", slo_s)
        require(0 < safety <= 1, "safety", "above 0 and at most 1", safety)
        require(rate is None or 0 < rate < math.inf, "arrival_rate_rps", "positive and finite, or None", rate)
        require(0 <= partial_wait_s < math.inf, "partial_wait_s", "finite and not negative", partial_wait_s)
        self.margin_s = (1.0 - safety) * slo_s
        self.arrival_rate_rps = arrival_rate_rps
        self.partial_wait_s = partial_wait_s
        self._budget_of = budget_of
        self._batch_size = max_batch_size
        self._tightest_s = math.inf
        self._arrivals = 0

    @property
    def batch_size(self) -> int:
        """Rows of a full batch, until the next solve."""
        return self._batch_size

    def _on_arrival(self, request: Request, now: float) -> None:
        self._arrivals += request.rows
        self._tightest_s = min(self._tightest_s, request.deadline - request.arrived_at)

    def _on_period(self, ended_at: float, actions: list[Action]) -> None:
        if self._arrivals:
            assert self.period_s is not None
            rate = self.arrival_rate_rps or self._arrivals / self.period_s
            budget_s = self._tightest_s if self._budget_of is None else self._budget_of(ended_at)
            requests = _requests(rate * self.period_s)
            plan = self.allocation.solve(budget_s - self.margin_s, requests=requests, arrival_rate_rps=rate)
            if plan is not None:
                self._batch_size = plan.batch_size
                self._ask(plan.cores, actions)
        self._arrivals = 0
        self._tightest_s = math.inf

    def _watches(self) -> bool:
        return self._arrivals > 0

    def _rows_to_start(self, now: float) -> int | None:
        # A request of several rows may be larger than the batches of this period.
        rows = max(self._batch_size, self._head().rows)
        if self._draining or now >= self._window_ends() or self._has_rows(rows):
            return rows
        return None

    def _waits_until(self) -> float | None:
        return self._window_ends() if self._lane_is_free() else None

    def _window_ends(self) -> float:
        return self._oldest().arrived_at + self.partial_wait_s


def _requests(expected: float) -> int:
    return max(1, math.ceil(expected - 1e-9))
