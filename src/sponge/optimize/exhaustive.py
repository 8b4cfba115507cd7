"""Try everything: the reference that is too simple to be wrong.

Each choice of batch size, lanes and cores is held against each queued request, one comparison at a time, as
the problem is stated. No property of the latency or of deadline order is used, so that what `Solver` and the
program conclude from them can be checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sponge.core.solver import Solver
from sponge.core.values import Plan


def solve(solver: Solver, budgets_s: Sequence[float], arrival_rate_rps: float = 0.0) -> Plan:
    """Return what ``solver.solve`` must return, by enumeration of batch size × lanes × cores × queue.

    Parameters
    ----------
    solver
        The problem: latency, limits, and the cores that a lane may have. Its methods are not used.
    budgets_s
        Remaining times in deadline order [s], shape ``(n,)``.
    arrival_rate_rps
        Rate to keep up with [1/s].

    Returns
    -------
    Plan
        The optimum, or the best effort, by the rules of `Solver.solve`. Where any share of a core is allowed
        (``core_step=None``) the smallest of each batch size and lanes is found by bisection of the latency,
        down to neighbouring floats; totals that agree to 9 decimals count as equal, here as there.
    """
    best: tuple[tuple[float, int, int], float] | None = None
    for batch_size in range(1, solver.max_batch_size + 1):
        for lanes in range(1, solver.max_lanes + 1):
            lane_cores = _fewest_lane_cores(solver, batch_size, lanes, budgets_s, arrival_rate_rps)
            if lane_cores is not None:
                cores = min(lane_cores * lanes, solver.max_cores)
                rank = (round(cores, 9), batch_size, -lanes)
                if best is None or rank < best[0]:
                    best = (rank, cores)
    if best is None:
        return best_effort(solver, budgets_s)
    (_, batch_size, minus_lanes), cores = best
    return Plan(cores=cores, batch_size=batch_size, lanes=-minus_lanes, feasible=True)


def best_effort(solver: Solver, budgets_s: Sequence[float]) -> Plan:
    """Return the choice to run when nothing is feasible; see `Solver.solve` for the rule.

    Arguments are those of `solve`.
    """
    best: tuple[tuple[float, float, int, int], Plan] | None = None
    for batch_size in range(1, solver.max_batch_size + 1):
        for lanes in range(1, solver.max_lanes + 1):
            shares = lane_shares(solver, lanes)
            if not shares:
                continue
            latency_s = latency_of(solver, batch_size, shares[-1], lanes)
            met = sum(wave(i, batch_size, lanes) * latency_s <= budget_s for i, budget_s in enumerate(budgets_s))
            rank = (-met, -(batch_size * lanes / latency_s), batch_size, lanes)
            if best is None or rank < best[0]:
                cores = min(shares[-1] * lanes, solver.max_cores)
                best = (rank, Plan(cores=cores, batch_size=batch_size, lanes=lanes, feasible=False))
    assert best is not None  # one lane of min_cores always fits
    return best[1]


def is_feasible(
    solver: Solver,
    batch_size: int,
    lane_cores: float,
    lanes: int,
    budgets_s: Sequence[float],
    arrival_rate_rps: float,
) -> bool:
    """Say whether a choice meets every deadline and the arrival rate.

    Other arguments are those of `solve`; *lane_cores* are the cores of each lane.
    """
    latency_s = latency_of(solver, batch_size, lane_cores, lanes)
    if arrival_rate_rps > 0 and latency_s > batch_size * lanes / arrival_rate_rps:
        return False
    return all(latency_s <= budget_s / wave(i, batch_size, lanes) for i, budget_s in enumerate(budgets_s))


def wave(position: int, batch_size: int, lanes: int) -> int:
    """Return the wave, counted from 1, in which the request at a position of the queue is served."""
    return position // (batch_size * lanes) + 1


def lane_shares(solver: Solver, lanes: int) -> list[float]:
    """Return what each of so many lanes may have, ascending [cores]; without steps, the least and the
    most."""
    if solver.core_step is None:
        return [solver.min_cores, solver.max_cores / lanes] if solver.min_cores * lanes <= solver.max_cores else []
    return [share for share in solver.core_levels if round(share * lanes, 9) <= round(solver.max_cores, 9)]


def latency_of(solver: Solver, batch_size: int, lane_cores: float, lanes: int) -> float:
    """Return the predicted latency [s], by the arithmetic on arrays, which may round differently from
    scalars."""
    batches, shares = np.array([float(batch_size)]), np.array([lane_cores])
    return float(solver.latency.latency_s(batches, shares, lanes)[0])


def _fewest_lane_cores(
    solver: Solver, batch_size: int, lanes: int, budgets_s: Sequence[float], arrival_rate_rps: float
) -> float | None:
    shares = lane_shares(solver, lanes)

    def fits(share: float) -> bool:
        return is_feasible(solver, batch_size, share, lanes, budgets_s, arrival_rate_rps)

    if solver.core_step is not None:
        return next((share for share in shares if fits(share)), None)
    if not shares or not fits(shares[-1]):
        return None
    low, high = shares
    if fits(low):
        return low
    while math.nextafter(low, high) < high:
        middle = (low + high) / 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
