"""Three independent answers to one problem: the closed form, the enumeration of everything, and SCIP."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, event, given, settings

from sponge.core.values import Plan
from sponge.optimize import exhaustive, program
from tests.optimize.problems import Problem, is_on_the_edge, problems

EDGE = 1e-5
"""SCIP keeps a constraint to 1e-6 of a row that is scaled to the budget and multiplied by up to a third of a core."""

many = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
some = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
stress_many = settings(many, max_examples=50_000)
stress_some = settings(some, max_examples=5_000)


def check_stepped(problem: Problem) -> None:
    solver, budgets, rate = problem
    found = solver.solve(budgets, rate)
    event(f"feasible: {found.feasible}")
    assert found == exhaustive.solve(solver, budgets, rate)


def check_continuous(problem: Problem) -> None:
    """Cores agree to 1e-9; then another choice may only differ in totals that close to each other."""
    solver, budgets, rate = problem
    found, expected = solver.solve(budgets, rate), exhaustive.solve(solver, budgets, rate)
    event(f"feasible: {found.feasible}")
    assert found.feasible == expected.feasible
    assert abs(found.cores - expected.cores) <= 2e-9
    if found.cores == expected.cores:
        assert (found.batch_size, found.lanes) == (expected.batch_size, expected.lanes)
    if found.feasible:
        latency_s, allowed_s = _latency_s(problem, found), _allowed_s(problem, found)
        # at the ends of the range arrays have decided; of several lanes, a share was rounded once more
        exact = found.lanes == 1 and solver.min_cores < found.cores < solver.max_cores
        assert latency_s <= allowed_s * (1.0 if exact else 1 + 1e-15)


def check_program(problem: Problem) -> None:
    """SCIP gives the same plan, or one of the two holds or fails a constraint by no more than its tolerance."""
    solver, budgets, rate = problem
    found, result = solver.solve(budgets, rate), program.solve(solver, budgets, rate)
    plan = result.plan
    assert plan is not None
    assert result.status is (program.Status.OPTIMAL if plan.feasible else program.Status.INFEASIBLE)
    assert result.gap == 0.0
    same_choice = (found.feasible, found.batch_size, found.lanes) == (plan.feasible, plan.batch_size, plan.lanes)
    if same_choice and abs(found.cores - plan.cores) <= EDGE * found.cores:
        event(f"agrees, feasible: {found.feasible}")
        return
    event("on the edge")
    if plan.feasible and (not found.feasible or plan.cores <= found.cores + EDGE):
        assert is_on_the_edge(problem, plan, relative=EDGE)
    else:
        assert is_on_the_edge(problem, found, relative=EDGE)


def _allowed_s(problem: Problem, plan: Plan) -> float:
    _, budgets, rate = problem
    allowed = [s / exhaustive.wave(i, plan.batch_size, plan.lanes) for i, s in enumerate(budgets)]
    if rate > 0:
        allowed.append(plan.batch_size * plan.lanes / rate)
    return min(allowed, default=float("inf"))


def _latency_s(problem: Problem, plan: Plan) -> float:
    return problem[0].latency.latency_s(plan.batch_size, plan.lane_cores, plan.lanes)


@many
@given(problems(continuous=False))
def test_closed_form_is_exhaustive_search(problem: Problem) -> None:
    """Same plan to the last bit, feasible or not, for any step, with lanes and tables: nothing is approximated."""
    check_stepped(problem)


@many
@given(problems(continuous=True))
def test_continuous_closed_form_is_bisection_of_the_latency(problem: Problem) -> None:
    """Any share of a core: the inverse of the latency is as good as a search for it, and never too small."""
    check_continuous(problem)


@some
@given(problems(max_queue=8))
def test_closed_form_is_what_scip_proves_optimal(problem: Problem) -> None:
    """The program is written from the published statement, a constraint for each request, and shares no shortcut."""
    solver, _, _ = problem
    if solver.core_step is None and type(solver.latency).__name__ == "LatencyTable":
        with pytest.raises(ValueError, match="core_step"):
            program.solve(*problem)
        return
    check_program(problem)


@pytest.mark.stress
@stress_many
@given(problems(continuous=False, max_queue=40))
def test_closed_form_is_exhaustive_search_at_length(problem: Problem) -> None:
    """The same on tens of thousands of problems and longer queues."""
    check_stepped(problem)


@pytest.mark.stress
@stress_many
@given(problems(continuous=True, max_queue=40))
def test_continuous_closed_form_is_bisection_at_length(problem: Problem) -> None:
    """The same on tens of thousands of problems and longer queues."""
    check_continuous(problem)


@pytest.mark.stress
@stress_some
@given(problems(continuous=False, max_queue=20))
def test_closed_form_is_what_scip_proves_optimal_at_length(problem: Problem) -> None:
    """The same on thousands of problems and longer queues."""
    check_program(problem)
