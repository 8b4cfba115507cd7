"""Random problems that the solver, the enumeration and the program are compared on."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from hypothesis import strategies as st

from sponge.core.latency import Latency, LatencyModel, LatencyTable
from sponge.core.solver import Solver
from sponge.core.values import Plan
from sponge.optimize import exhaustive

Problem: TypeAlias = tuple[Solver, list[float], float]

_ROUND_S = st.sampled_from([0.0, 0.01, 0.05, 0.1])


@st.composite
def latencies(draw: st.DrawFn) -> Latency:
    """Four terms, with negative ε and zero terms; sometimes a table of them with a bump that no four terms fit."""
    gamma_s = draw(_ROUND_S | st.floats(0.0, 0.2))
    epsilon_s = draw(st.sampled_from([-0.05, -0.01, 0.0, 0.05]) | st.floats(-0.2, 0.2))
    delta_s = draw(_ROUND_S | st.floats(0.0, 0.05))
    eta_s = draw(st.sampled_from([0.01, 0.05]) | st.floats(0.001, 0.1))
    interference = draw(st.sampled_from([0.0, 0.1, 0.5]))
    model = LatencyModel(gamma_s, epsilon_s, delta_s, eta_s, interference=interference)
    if draw(st.integers(0, 3)):
        return model
    sizes, cores = (1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0)
    table_s = model.latency_s(np.array(sizes)[:, None], np.array(cores)[None, :]) + np.array([[0.0], [0.01], [0.05]])
    return LatencyTable(
        gamma_s,
        epsilon_s,
        delta_s,
        eta_s,
        interference=interference,
        batch_sizes=sizes,
        cores=cores,
        table_s=table_s.tolist(),
    )


@st.composite
def problems(draw: st.DrawFn, *, continuous: bool | None = None, max_queue: int = 12) -> Problem:
    """A solver, a queue in deadline order and a rate: about as many feasible as not, with ties and extremes."""
    latency = draw(latencies())
    continuous = draw(st.booleans()) if continuous is None else continuous
    min_cores = draw(st.sampled_from([1.0, 0.5, 0.3, 1 / 3]))
    solver = Solver(
        latency,
        max_cores=max(min_cores, draw(st.sampled_from([min_cores, 1.0, 2.0, 3.3, 4.0, 8.0]))),
        max_batch_size=draw(st.integers(1, 5)),
        min_cores=min_cores,
        core_step=None if continuous else draw(st.sampled_from([1.0, 0.5, 0.25, 0.1, 0.3])),
        max_lanes=draw(st.integers(1, 4)),
    )
    budget = st.one_of(
        st.floats(0.0, 1.0),
        st.floats(0.0, 4.0),
        st.floats(0.5, 6.0),
        st.integers(0, 20).map(lambda tenths: tenths / 10),
    )
    budgets = sorted(draw(st.lists(budget, max_size=max_queue)))
    if budgets:
        head, tail = draw(st.sampled_from([(None, None)] * 6 + [(-0.1, None), (None, math.inf), (-math.inf, math.inf)]))
        budgets[0] = budgets[0] if head is None else head
        budgets[-1] = budgets[-1] if tail is None else tail
    return solver, sorted(budgets), draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, 5.0]) | st.floats(0.0, 30.0))


def is_on_the_edge(problem: Problem, plan: Plan, *, relative: float) -> bool:
    """Say whether a constraint of a plan holds, or fails, by no more than so much of its right-hand side."""
    solver, budgets, rate = problem
    latency_s = exhaustive.latency_of(solver, plan.batch_size, plan.lane_cores, plan.lanes)
    limits = [
        budget_s / exhaustive.wave(i, plan.batch_size, plan.lanes)
        for i, budget_s in enumerate(budgets)
        if budget_s < math.inf
    ]
    if rate > 0:
        limits.append(plan.batch_size * plan.lanes / rate)
    return any(abs(latency_s - limit_s) <= relative * max(latency_s, abs(limit_s)) for limit_s in limits)
