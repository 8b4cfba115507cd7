"""One decision for one free lane, against trying everything."""

from __future__ import annotations

import math

import attrs
import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sponge.core.latency import LatencyModel
from sponge.core.policy import Dispatch, Policy, State, Wait, typical
from sponge.core.solver import Solver

TAIL = 1.25
terms = st.sampled_from([0.0, 0.004, 0.02, 0.11])
models = st.builds(
    LatencyModel,
    terms.map(lambda value: value + 0.001),
    st.sampled_from([-0.0005, 0.0, 0.01, 0.05]),
    terms,
    terms,
    interference=st.sampled_from([0.0, 0.2]),
)


def with_tail(model: LatencyModel) -> LatencyModel:
    """A model whose tail is a quarter above its median."""
    terms = (model.gamma_s, model.epsilon_s, model.delta_s, model.eta_s)
    return LatencyModel(*(TAIL * term for term in terms), interference=model.interference, typical=model)


latencies = models | models.map(with_tail)
budgets = st.lists(st.floats(-0.05, 1.5) | st.just(math.inf), min_size=1, max_size=24).map(sorted)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Solver, Policy, State, list[float]]:
    max_cores = draw(st.sampled_from([1.0, 2.0, 4.0]))
    solver = Solver(
        draw(latencies),
        max_cores=max_cores,
        max_batch_size=draw(st.integers(1, 6)),
        core_step=draw(st.sampled_from([1.0, 0.5])),
        max_lanes=draw(st.integers(1, 4)),
    )
    now = draw(st.sampled_from([0.0, 1000.0]))
    state = State(
        now=now,
        free_cores=draw(st.sampled_from([1.0, max_cores])) + 1e-9,
        busy_lanes=min(draw(st.integers(0, 2)), solver.max_lanes - 1),
        backlog_core_s=draw(st.sampled_from([0.0, 0.05, 1.0])),
        arrival_rate_rps=draw(st.sampled_from([0.0, 3.0, 40.0])),
        scale=draw(st.sampled_from([1.0, 1.7, 0.6])),
        typical_scale=draw(st.sampled_from([1.0, 1.3])),
        may_hold=draw(st.booleans()),
    )
    deadlines = [now + budget for budget in draw(budgets)]
    state = attrs.evolve(
        state,
        group_rows=len(deadlines),
        lane_free_at=now + draw(st.sampled_from([-0.01, 0.01, 0.1])) if state.busy_lanes else -math.inf,
    )
    return solver, Policy(solver, guard_s=0.002, hold=True), state, deadlines


def decide(policy: Policy, state: State, deadlines: list[float]) -> Dispatch | Wait:
    return policy.decide(state, np.array([*deadlines, math.inf]))


Option = tuple[float, int, int]
"""Cores, batch size, and lanes side by side."""


def fit(solver: Solver, cores: float) -> int:
    return min(solver.max_lanes, int(solver.max_cores / cores + 1e-9))


def adequate(solver: Solver, state: State, deadlines: list[float], option: Option, slack: float) -> bool:
    """Whether the batch and then the whole queue would be in time, served in waves of such batches; by *slack*."""
    cores, batch_size, lanes = option
    tail_s = solver.latency.latency_s(batch_size, cores, lanes) * state.scale * slack
    if tail_s > deadlines[0] - state.now - 0.002:
        return False
    reserve = 1.0 if lanes == fit(solver, cores) else 1.25
    typical_s = typical(solver.latency).latency_s(batch_size, cores, lanes) * state.typical_scale * slack * reserve
    wait_s = state.backlog_core_s / (cores * lanes)
    for i, deadline in enumerate(deadlines):
        waves = i // (batch_size * lanes) + 1
        # the running work is kept from every wave's share of the time, which is never too optimistic
        if typical_s > (deadline - state.now - 0.002) / waves - wait_s:
            return False
    rate = state.arrival_rate_rps
    return rate == 0 or typical_s <= batch_size * lanes / rate


@given(problems())
@hypothesis_settings(max_examples=600, deadline=None)
def test_chooses_the_cheapest_adequate_batch(problem: tuple[Solver, Policy, State, list[float]]) -> None:
    """What is started keeps the queue's deadlines if anything does, at the least core-seconds per request."""
    solver, policy, state, deadlines = problem
    decision = decide(policy, attrs.evolve(state, may_hold=False), deadlines)
    options = [
        (cores, batch_size, lanes)
        for cores in solver.core_levels
        for batch_size in range(1, solver.max_batch_size + 1)
        for lanes in range(1, fit(solver, cores) + 1)
        if cores <= state.free_cores and batch_size <= len(deadlines)
    ]
    surely = [option for option in options if adequate(solver, state, deadlines, option, 1 + 1e-9)]
    perhaps = [option for option in options if adequate(solver, state, deadlines, option, 1 - 1e-9)]

    def cost(option: Option) -> float:
        cores, batch_size, lanes = option
        return cores * typical(solver.latency).latency_s(batch_size, cores, lanes) / batch_size

    def may_start(option: Option) -> bool:
        return option[2] > state.busy_lanes or option[2] == fit(solver, option[0])

    if isinstance(decision, Wait) and decision.until is not None:
        assert decision.until == state.lane_free_at > state.now
        assert any(not may_start(option) for option in perhaps), "waits for a lane that nothing counts on"
        assert any(map(may_start, perhaps)), "waits without a way out"
        return
    if isinstance(decision, Wait):
        assert not any(map(may_start, surely))
        assert state.busy_lanes, "waits for cores that nobody will give back"
        return
    chosen = [option for option in options if option[:2] == (decision.cores, decision.batch_size)]
    assert chosen
    startable = [option for option in surely if may_start(option)]
    if startable:
        fine = [option for option in chosen if option in perhaps and may_start(option)]
        assert fine
        assert min(map(cost, fine)) <= min(map(cost, startable)) * 1.1, "3 % count as the same cost, 6 % for lanes"


@given(problems())
@hypothesis_settings(max_examples=300, deadline=None)
def test_lone_request_is_decided_as_by_the_general_way(problem: tuple[Solver, Policy, State, list[float]]) -> None:
    """The short cut for a single row gives what the arrays give."""
    _, policy, state, deadlines = problem
    alone = policy._decide_alone(state, deadlines[0])
    if alone is None:
        return
    policy._alone = []  # switches the short cut off
    assert decide(policy, attrs.evolve(state, group_rows=1), deadlines[:1]) == alone


@given(problems())
@hypothesis_settings(max_examples=300, deadline=None)
def test_waiting_for_company_keeps_every_deadline_possible(problem: tuple[Solver, Policy, State, list[float]]) -> None:
    """It ends early enough for the most urgent request, and after no more than a batch takes."""
    solver, policy, state, deadlines = problem
    state = attrs.evolve(state, may_hold=True)
    decision = decide(policy, state, deadlines)
    if isinstance(decision, Dispatch) or not decision.for_company:
        return
    assert decision.until is not None
    assert state.arrival_rate_rps > 0
    assert decision.until > state.now
    slowest = max(
        solver.latency.latency_s(solver.max_batch_size, cores, solver.max_lanes) for cores in solver.core_levels
    )
    assert decision.until - state.now <= slowest * state.scale * (1 + 1e-9)
    fastest = policy.fastest_s(1) * state.scale
    assert decision.until + fastest <= deadlines[0] + 1e-9
