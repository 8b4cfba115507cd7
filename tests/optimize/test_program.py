"""The integer program: statuses, bound, and that it is a statement of the problem rather than of its solution."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from sponge.core.latency import LatencyModel, LatencyTable
from sponge.core.solver import Solver
from sponge.core.values import Plan
from sponge.optimize import exhaustive, program
from sponge.optimize.program import ProgramResult, Status

MODEL = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221)
"""A detector's p99 latency on CPUs."""


def test_optimum_is_proven() -> None:
    """Objective and bound meet, so that the plan is known to be the best and not merely found."""
    result = program.solve(Solver(MODEL, max_cores=16, max_batch_size=8), np.linspace(0.5, 1.0, 20), 10.0)
    assert result.status is Status.OPTIMAL
    assert result.plan is not None
    assert result.objective == result.bound == pytest.approx(result.plan.cores)
    assert result.gap == 0.0
    assert result.solve_s >= 0.0


def test_infeasible_is_a_status_with_the_best_effort() -> None:
    """Nothing raises: a queue that cannot be served is an everyday event."""
    solver, budgets = Solver(MODEL, max_cores=4, max_batch_size=4), [-1.0, 0.5]
    result = program.solve(solver, budgets)
    assert (result.status, result.objective, result.bound, result.gap) == (Status.INFEASIBLE, math.inf, math.inf, 0.0)
    assert result.plan == exhaustive.best_effort(solver, budgets) == solver.solve(budgets)


def test_time_limit_is_a_status() -> None:
    """Stopped before anything was found: no plan, a bound that claims nothing, and still no exception."""
    solver = Solver(MODEL, max_cores=16, max_batch_size=8, max_lanes=8)
    result = program.solve(solver, np.linspace(2.0, 9.0, 60), 5.0, time_limit_s=0.0)
    assert result.status is Status.LIMIT
    assert result.bound <= result.objective
    if result.plan is None:
        assert (result.objective, result.gap) == (math.inf, math.inf)


def test_gap_is_relative_to_the_objective() -> None:
    """A plan of 4 cores where 3 are not ruled out is a quarter from proven."""
    plan = Plan(cores=4.0, batch_size=1, feasible=True)
    result = ProgramResult(status=Status.LIMIT, plan=plan, objective=4.0, bound=3.0, solve_s=1.0)
    assert result.gap == 0.25


def test_solver_hands_out_the_plan_of_the_program() -> None:
    """`Solver.solve_program` is the reference at hand, without knowledge of the modules."""
    solver = Solver(MODEL, max_cores=8, max_batch_size=4, max_lanes=3)
    budgets = [0.6, 0.7, 0.8, 0.9, 1.0]
    assert solver.solve_program(budgets, 6.0) == solver.solve(budgets, 6.0)


def test_both_forms_of_the_program_agree() -> None:
    """A table of the four terms at its own levels is the same model by another route: one-hot levels."""
    sizes, cores = (1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0)
    table_s = MODEL.latency_s(np.array(sizes)[:, None], np.array(cores)[None, :]).tolist()
    table = LatencyTable(0.1404, -0.0508, 0.0252, 0.0221, batch_sizes=sizes, cores=cores, table_s=table_s)
    for budgets, rate in (([0.3, 0.6, 0.9], 0.0), ([0.9] * 6, 4.0), ([], 9.0), ([0.01], 0.0)):
        one = program.solve(Solver(MODEL, max_cores=4, max_batch_size=4), budgets, rate)
        other = program.solve(Solver(table, max_cores=4, max_batch_size=4), budgets, rate)
        assert (one.status, one.plan) == (other.status, other.plan)


def test_late_and_unlimited_budgets_are_no_numbers_for_a_solver() -> None:
    """SCIP takes no infinities: an endless budget asks nothing, a budget of minus infinity rules everything out."""
    solver = Solver(MODEL, max_cores=4, max_batch_size=4)
    assert program.solve(solver, [0.5, math.inf]).plan == solver.solve([0.5])
    assert program.solve(solver, [-math.inf, 0.5]).status is Status.INFEASIBLE


def test_table_with_continuous_cores_is_refused() -> None:
    """An interpolated latency has no linear form between its levels; the closed form still solves it."""
    table = LatencyTable(0.1, 0, 0, 0.01, batch_sizes=(1,), cores=(1, 2), table_s=((0.1, 0.06),))
    solver = Solver(table, max_cores=2, max_batch_size=1, core_step=None)
    with pytest.raises(ValueError, match="core_step"):
        solver.solve_program([0.08])
    assert 1.0 < solver.solve([0.08]).cores < 2.0


def test_importing_the_program_loads_no_cvxpy() -> None:
    """cvxpy takes a second to import, which only those pay who solve a program."""
    code = "import sys, sponge.optimize.program; print('cvxpy' in sys.modules, 'pyscipopt' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["False", "False"]
