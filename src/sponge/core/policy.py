"""How large a batch, on how many cores, and whether to start it now: one decision for one free lane.

Rules, and why they hold:

* What costs money is core-seconds, not cores: a batch on n cores holds them for l(b, n) seconds, so a request costs
  ``n · l(b, n) / b``. Narrow lanes waste least (Amdahl), so the cheapest choice is the widest one that nobody needs.
* A choice (b, n) is adequate if the batch itself is in time by its *tail* latency, and the *whole* queue would meet its
  deadlines were it served that way by all the lanes that fit (the waves of `sponge.core.waves`), after the work that is
  already running, by the *typical* latency: of many batches in a row the tails do not add up, and a tail that was
  measured badly must not decide what is cheap. Everything is decided again at the next dispatch, so only the first
  batch of the plan is ever binding.
* Lanes disturb each other, so that many at a time cost more than few. A choice therefore also says how many lanes side
  by side it counts on; the fewest that will do are the cheapest, and while as many are running, the queue waits for one
  of them, as long as that leaves a way out. Where lanes do not disturb each other, all that fit are counted on, and
  nothing waits.
* When no choice is adequate, the most urgent request is saved at the highest throughput: what can be saved later
  depends on how soon the lane is free again.
* A batch waits for company only as long as nobody's deadline is at risk, no longer than it would itself take, and
  only where a larger batch is really cheaper.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency
from sponge.core.solver import Solver
from sponge.core.waves import WaveSample

FloatArray: TypeAlias = npt.NDArray[np.float64]

_SAME_COST = 0.03
"""Relative difference of cost below which the faster choice counts as the cheaper one: profiles are no more exact."""
_WORTH_HOLDING = 0.95
"""A larger batch must cost at most this share of the immediate one to be waited for."""
_HOLD_BELOW = 0.7
"""Utilisation, in such batches, from which nothing waits for company: the queue then fills batches by itself, and the
time that a lane stands still is missing later."""
_HOLD_RESERVE = 0.5
"""Share of the batch's own latency that is kept as slack while waiting for company."""
_CHEAPER = 0.06
"""Relative difference of cost from which fewer lanes at a time are told apart from more."""
_FEWER_LANES_RESERVE = 1.25
"""How many times the typical latency must fit if a choice counts on fewer lanes than there could be: those who come
next may need the others, which are slower then."""
_WIDER = 1.0625
"""Ratio of neighbouring widths that are told apart: all whole numbers of cores up to 17. Beyond, one more core changes
latency and cost by less than they are known, and the number of choices would grow with the machine."""


@attrs.define(slots=True, eq=False)
class State:
    """What a decision depends on besides the queue. Not frozen, since one is made for every decision."""

    now: float
    free_cores: float
    busy_lanes: int
    backlog_core_s: float
    """Predicted work left in the running batches [core-seconds]."""
    arrival_rate_rps: float
    scale: float
    """Drift: the tail of the real latency over the model's."""
    typical_scale: float
    """The same at the median."""
    may_hold: bool
    head_rows: int = 1
    """Rows of the most urgent request, which is not divided."""
    group_rows: int = 1
    """Waiting rows that may share a batch with it, its own included."""
    lane_free_at: float = float("-inf")
    """When the first of the running batches is predicted to end [s]; past if none runs."""


@attrs.frozen(slots=True)
class Dispatch:
    """Start a batch of up to this size on this many cores."""

    cores: float
    batch_size: int


@attrs.frozen(slots=True)
class Wait:
    """Start nothing now; decide again at *until* [s] at the latest, or when something happens."""

    until: float | None
    for_company: bool = False
    """Whether it waits for more requests, rather than for cores or a lane."""


class Policy:
    """The decision for one free lane, with everything precomputed that does not depend on the queue.

    Parameters
    ----------
    solver
        Latency model, core range, largest batch, number of lanes.
    guard_s
        Time kept between the predicted end of a batch and the deadline [s].
    hold
        Whether batches may wait for company.
    """

    def __init__(self, solver: Solver, *, guard_s: float, hold: bool) -> None:
        self._guard_s = guard_s
        self._hold = hold
        levels = _distinct(
            solver.core_levels
            or np.unique(np.append(np.arange(solver.min_cores, solver.max_cores, 1.0), solver.max_cores)).tolist()
        )
        self.smallest_cores = levels[0]
        cores, batches, lanes, most = _choices(solver, levels)
        tail_s = solver.latency.latency_s(batches.astype(np.float64), cores, lanes)
        typical_s = np.minimum(typical(solver.latency).latency_s(batches.astype(np.float64), cores, lanes), tail_s)
        cost = cores * typical_s / batches
        order = np.lexsort((typical_s, -lanes, np.round(np.log(cost) / _SAME_COST)))
        self._cores = cores[order]
        self._batches = batches[order]
        self._at_most = np.where(most, solver.max_lanes, lanes)[order]
        self._tail_s = tail_s[order]
        self._typical_s = typical_s[order]
        self._cost = cost[order]
        self._planned_s = np.where(most, typical_s, _FEWER_LANES_RESERVE * typical_s)[order]
        self._lane_cores = (cores * lanes)[order]
        self._side_by_side = (batches * lanes)[order].astype(np.float64)
        products, self._product_of = np.unique((batches * lanes)[order], return_inverse=True)
        self._waves = WaveSample(products.tolist())
        self._throughput = self._side_by_side / self._typical_s
        # A lone request: (tail, planned latency, cores, lanes counted on, how many may run, rate from which holding it
        # for company may pay), cheapest first.
        self._alone: list[tuple[float, float, float, float, int, float]] = [
            (
                float(self._tail_s[i]),
                float(self._planned_s[i]),
                float(self._cores[i]),
                float(self._side_by_side[i]),
                int(self._at_most[i]),
                self._company_rps(float(self._cost[i])) if hold else float("inf"),
            )
            for i in np.flatnonzero(self._batches == 1)
        ]
        self.cheapest_core_s = float(cost[most].min())
        """Least core-seconds that a request can cost while all lanes run."""
        self._narrow_tail_s: list[float] = tail_s[most][: solver.max_batch_size].tolist()
        alone_on_all = np.arange(1.0, solver.max_batch_size + 1.0), np.full(solver.max_batch_size, levels[-1])
        fastest_s = solver.latency.latency_s(*alone_on_all)
        self._fastest_s: list[float] = fastest_s.tolist()
        self._levels = levels
        batch_sizes = np.arange(1.0, solver.max_batch_size + 1.0)[:, None]
        self._typical_alone_s: list[list[float]] = np.minimum(
            typical(solver.latency).latency_s(batch_sizes, np.array(levels)),
            solver.latency.latency_s(batch_sizes, np.array(levels)),
        ).tolist()

    def fastest_s(self, rows: int) -> float:
        """Return the predicted latency of a batch of *rows* alone on all cores [s]."""
        return self._fastest_s[rows - 1]

    def fastest_typical_s(self, rows: int) -> float:
        """Return the typical latency of a batch of *rows* alone on all cores [s]."""
        return self._typical_alone_s[rows - 1][-1]

    def typical_within_s(self, rows: int, cores: float) -> float:
        """Return the typical latency of a batch of *rows* alone on no more than *cores* [s]; ``inf`` on too few."""
        level = bisect_right(self._levels, cores)
        return self._typical_alone_s[rows - 1][level - 1] if level else float("inf")

    def cheapest_tail_s(self, rows: int) -> float:
        """Return the tail latency of a batch of *rows* on the narrowest lane among others [s]."""
        return self._narrow_tail_s[rows - 1]

    def decide(self, state: State, deadlines: FloatArray) -> Dispatch | Wait:
        """Choose for one free lane.

        Costs ``O(choices + products · log n)`` for ``n`` waiting rows.

        Parameters
        ----------
        state
            See `State`; at least the smallest allocation is free.
        deadlines
            Of all waiting rows in order [s], at least one, and ``inf`` as the last entry, shape ``(n + 1,)``.
        """
        rate_rps = state.arrival_rate_rps
        head = float(deadlines[0])
        if len(deadlines) == 2:
            dispatch = self._decide_alone(state, head)
            if dispatch is not None:
                return dispatch
        served_from = state.now + self._guard_s
        head_s = head - served_from
        tail_s = self._tail_s * state.scale
        allowed_s = self._waves.tightest_s(deadlines, served_from)[self._product_of]
        if state.backlog_core_s > 0:
            allowed_s -= state.backlog_core_s / self._lane_cores
        if rate_rps > 0:
            np.minimum(allowed_s, self._side_by_side / rate_rps, out=allowed_s)
        planned_s = self._planned_s * state.typical_scale
        adequate = (planned_s <= allowed_s) & (tail_s <= head_s)
        startable = (self._cores <= state.free_cores) & (self._batches <= state.group_rows)
        if state.head_rows > 1:
            startable &= self._batches >= state.head_rows
            adequate &= self._batches >= state.head_rows
        choice = int((adequate & startable).argmax())
        found = bool(adequate[choice] and startable[choice])
        if self._hold and state.may_hold and rate_rps > 0:
            cost = float(self._cost[choice]) if found else np.inf
            calm = self._typical_s * (state.typical_scale * rate_rps) <= _HOLD_BELOW * self._side_by_side
            wait_s = self._worth_waiting_s(adequate & calm, tail_s, cost, state.group_rows, head_s, rate_rps)
            if wait_s > 0:
                return Wait(state.now + wait_s, for_company=True)
        if found and self._at_most[choice] <= state.busy_lanes:
            startable &= self._at_most > state.busy_lanes
            wait_s = state.lane_free_at - state.now
            if wait_s > 0 and tail_s[choice] + wait_s <= head_s:
                # Waiting must leave a way out: what could start now must still be adequate then.
                still = (planned_s + wait_s <= allowed_s) & (tail_s + wait_s <= head_s) & startable
                if still.any():
                    return Wait(state.lane_free_at)
            choice = int((adequate & startable).argmax())
            found = bool(adequate[choice] and startable[choice])
        if not found:
            return self._rescue(state, startable, head_s)
        return Dispatch(float(self._cores[choice]), int(self._batches[choice]))

    def cheapest(self, state: State) -> Dispatch:
        """Choose for requests whose deadlines are lost: least core-seconds per request among what can start."""
        batches = self._batches
        startable = (self._cores <= state.free_cores) & (batches <= state.group_rows) & (batches >= state.head_rows)
        choice = int(startable.argmax())
        return Dispatch(float(self._cores[choice]), int(self._batches[choice]))

    def _decide_alone(self, state: State, deadline: float) -> Dispatch | None:
        """The same choice for a single row that no company is to be waited for, without arrays: ten times faster.

        Returns None where company or another lane may have to be waited for.
        """
        budget_s = deadline - (state.now + self._guard_s)
        rate_rps, backlog_core_s = state.arrival_rate_rps, state.backlog_core_s
        for tail_s, planned_s, cores, lanes, at_most, company_rps in self._alone:
            if cores > state.free_cores or tail_s * state.scale > budget_s:
                continue
            allowed_s = budget_s - backlog_core_s / (cores * lanes)
            if rate_rps > 0:
                allowed_s = min(allowed_s, lanes / rate_rps)
            if planned_s * state.typical_scale <= allowed_s:
                alone = at_most > state.busy_lanes and (not state.may_hold or rate_rps * state.scale < company_rps)
                return Dispatch(cores, 1) if alone else None
        return None

    def _company_rps(self, cost: float) -> float:
        """Return the rate from which a row may be held for a batch cheaper than *cost* [1/s]; ``inf``: never."""
        cheaper = (self._batches > 1) & (self._cost <= _WORTH_HOLDING * cost)
        return float(((self._batches[cheaper] - 1) / self._tail_s[cheaper]).min(initial=np.inf))

    def _rescue(self, state: State, startable: npt.NDArray[np.bool_], head_s: float) -> Dispatch | Wait:
        """Save the most urgent request at the highest throughput, or wait for more cores if that is what it needs.

        By the typical latency: a wide lane that makes sure of one costs several others theirs.
        """
        saves_head = startable & (self._typical_s * state.typical_scale <= head_s)
        if saves_head.any():
            choice = int(np.where(saves_head, self._throughput, -np.inf).argmax())
        elif state.busy_lanes:
            return Wait(None)
        else:
            smallest = startable & (self._batches == self._batches[startable].min())
            choice = int(np.where(smallest, self._tail_s, np.inf).argmin())
        return Dispatch(float(self._cores[choice]), int(self._batches[choice]))

    def _worth_waiting_s(
        self,
        adequate: npt.NDArray[np.bool_],
        tail_s: FloatArray,
        cost: float,
        rows: int,
        head_s: float,
        rate_rps: float,
    ) -> float:
        """How long to wait for a larger and cheaper batch [s]; 0 for not at all."""
        longest_s = np.minimum(head_s - (1.0 + _HOLD_RESERVE) * tail_s, tail_s)
        company_s = (self._batches - rows) / rate_rps
        worth = adequate & (company_s > 0) & (company_s <= longest_s) & (self._cost <= _WORTH_HOLDING * cost)
        cheapest = int(worth.argmax())
        return float(longest_s[cheapest]) if worth[cheapest] else 0.0


def _choices(
    solver: Solver, levels: list[float]
) -> tuple[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return cores, batch size and lanes side by side of every choice, and which of them count on all lanes that fit.

    Fewer lanes are a choice of their own only where they are cheaper.
    """
    found: list[tuple[float, int, int]] = []
    most: list[bool] = []
    batches = np.arange(1.0, solver.max_batch_size + 1.0)
    for cores in levels:
        fit = min(solver.max_lanes, int(solver.max_cores / cores + 1e-9))
        lanes = np.arange(1, fit + 1)
        log_cost = np.log(typical(solver.latency).latency_s(batches[:, None], np.float64(cores), lanes[None, :]))
        for batch_size, row in enumerate(log_cost.tolist(), start=1):
            kept = float("inf")
            for count in range(fit, 0, -1):
                if row[count - 1] <= kept - _CHEAPER:
                    kept = row[count - 1]
                    found.append((cores, batch_size, count))
                    most.append(count == fit)
    cores_of, batch_of, lanes_of = zip(*found, strict=True)
    return np.array(cores_of), np.array(batch_of), np.array(lanes_of), np.array(most)


def _distinct(levels: Sequence[float]) -> list[float]:
    """Leave out the levels that hardly differ from their neighbour; the largest stays."""
    kept = [levels[0]]
    for level in levels[1:]:
        if level >= kept[-1] * _WIDER - 1e-9:
            kept.append(level)
    if kept[-1] != levels[-1]:
        kept.append(levels[-1])
    return kept


def typical(latency: Latency) -> Latency:
    """Return the model of the typical latency behind a model of the tail; the model itself if there is none."""
    found: Latency | None = getattr(latency, "typical", None)
    return latency if found is None else found
