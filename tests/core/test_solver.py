"""The closed form: hand-computed cases, its limits and its errors; `tests/optimize` holds it against references."""

from __future__ import annotations

import math
import subprocess
import sys

import attrs
import numpy as np
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.core.values import Plan

TENTH_PER_REQUEST = LatencyModel(0.1, 0.0, 0.0, 0.01)
"""l(b, c) = 0.1·b/c + 0.01."""


def solver(**limits: object) -> Solver:
    return Solver(TENTH_PER_REQUEST, **{"max_cores": 8, "max_batch_size": 4, **limits})  # type: ignore[arg-type]


def plan(cores: float, batch_size: int, lanes: int = 1, *, feasible: bool = True) -> Plan:
    return Plan(cores=cores, batch_size=batch_size, lanes=lanes, feasible=feasible)


def test_lone_request_gets_the_smallest_sufficient_level() -> None:
    """0.1/c + 0.01 <= 0.05 asks for 2.5 cores: 3 in whole cores, 2.5 in halves."""
    assert solver().solve([0.05]) == plan(3.0, 1)
    assert solver(core_step=0.5).solve([0.05]) == plan(2.5, 1)


@pytest.mark.parametrize("max_cores", [1.0, 3.3, 8.0])
def test_continuous_one_lane_beats_the_least_that_two_may_have(max_cores: float) -> None:
    """One lane needs 0.5986 cores and two have 0.6 at least: a grid that is finer than that for one of them only
    overlooks the other.
    """
    latency = LatencyModel(gamma_s=0.01, epsilon_s=0.043686, delta_s=0.01, eta_s=0.01)
    solver = Solver(latency, max_cores=max_cores, max_batch_size=2, min_cores=0.3, core_step=None, max_lanes=2)
    plan = solver.solve([0.2728] * 3)
    assert (plan.batch_size, plan.lanes) == (2, 1)
    assert plan.cores == pytest.approx(0.063686 / (0.1364 - 0.03))


def test_continuous_cores_are_the_inverse_of_the_latency() -> None:
    """A CPU quota is no integer: 0.1 / (0.05 − 0.01) cores are enough, and the prediction stays within the budget."""
    found = solver(core_step=None).solve([0.05])
    assert found.cores == pytest.approx(2.5, rel=1e-12)
    assert TENTH_PER_REQUEST.latency_s(1, found.cores) <= 0.05


def test_batch_grows_where_the_serial_part_must_be_shared() -> None:
    """Four in 0.2 s: one by one 4·(0.1/c + 0.01) needs 2.5 cores, in pairs 2.22, as one batch 0.4/c + 0.01 2.11."""
    assert solver(core_step=0.125).solve([0.2] * 4) == plan(2.125, 4)


def test_smaller_batch_wins_at_equal_cores() -> None:
    """A smaller batch answers earlier and costs nothing: in whole cores three serve the same four one by one."""
    assert solver().solve([0.2] * 4) == plan(3.0, 1)


def test_more_lanes_win_at_equal_cores_and_batch_size() -> None:
    """Two cores serve two requests as two lanes or, one after the other, as one; the narrow lanes waste less."""
    assert solver(max_lanes=2).solve([0.12, 0.12]) == plan(2.0, 1, lanes=2)


def test_lanes_save_the_cores_that_one_wide_lane_wastes() -> None:
    """Half of the work is serial: a rate of 15 a second takes one lane 6 cores, several narrow ones 2 in all."""
    latency = LatencyModel(0.06, 0.0, 0.05, 0.0)
    one = Solver(latency, max_cores=8, max_batch_size=4)
    assert one.solve([], 15.0) == plan(4.0, 1)
    assert attrs.evolve(one, max_lanes=4).solve([], 15.0) == plan(2.0, 1, lanes=2)


def test_lanes_of_fractional_cores_that_sum_to_the_same_total_tie() -> None:
    """0.9 + 3 × 0.3 falls short of 2 × 0.9 by 2e-16 in floats, which must not decide against the narrow lanes."""
    latency = LatencyModel(0.18, 0.0, 0.0, 0.0)
    choice = Solver(latency, max_cores=4, max_batch_size=1, min_cores=0.9, core_step=0.3, max_lanes=2)
    assert choice.solve([0.2 + 1e-9] * 2) == plan(1.8, 1, lanes=2)


def test_interference_is_charged_to_lanes() -> None:
    """If a second lane doubles the latency of both, two lanes are no better than one."""
    latency = attrs.evolve(TENTH_PER_REQUEST, interference=1.0)
    assert Solver(latency, max_cores=8, max_batch_size=1, max_lanes=2).solve([0.12, 0.22]) == plan(1.0, 1)


def test_empty_queue_asks_for_the_rate_alone() -> None:
    """Nobody waits, but whoever comes next must find the service keeping up: b/l >= λ."""
    assert solver().solve([], 20.0) == plan(3.0, 1)
    assert solver().solve([], 0.0) == plan(1.0, 1)


def test_nothing_to_do_costs_the_least_allocation() -> None:
    """No deadline, no rate: the smallest allocation, a batch of one, one lane."""
    idle = solver(min_cores=0.25, core_step=0.25, max_lanes=4)
    assert idle.solve([], 0.0) == idle.solve([math.inf] * 3, 0.0) == plan(0.25, 1)


def test_tiny_rate_asks_nothing_and_warns_of_nothing() -> None:
    """A decaying estimate of the rate may become subnormal; b/λ then overflows to inf, which is right."""
    with np.errstate(all="raise"):
        assert solver().solve([1.0], 5e-324) == plan(1.0, 1)


def test_late_request_is_answered_by_the_best_effort() -> None:
    """The published system keeps its old allocation when nothing fits; ours runs at the most cores.

    There a batch of three takes 0.0475 s: two of the three in time are served by then, more than with any other
    batch size (behind the one that is late already, batches of one, 0.0225 s each, serve one by 0.05 s).
    """
    assert solver().solve([-0.01, 0.05, 0.05, 0.05]) == plan(8.0, 3, feasible=False)


def test_best_effort_uses_the_most_cores_that_its_lanes_can_have() -> None:
    """Three lanes of whole cores have 6 of 8: a total that cannot be split evenly is not granted."""
    best = solver(max_batch_size=1, max_lanes=3).solve([0.065] * 3 + [0.066] * 3, 1000.0)
    assert (best.feasible, best.cores, best.lanes) == (False, 6.0, 3)


def test_best_effort_of_an_empty_queue_is_the_highest_throughput() -> None:
    """Without a queue there is no deadline to count, and the rate is what cannot be kept up with."""
    assert solver().solve([], 1e6) == plan(8.0, 4, feasible=False)


def test_best_effort_prefers_fewer_lanes_and_smaller_batches_among_equals() -> None:
    """With no serial work every choice has the same throughput; if all is lost, the plainest one is taken."""
    latency = LatencyModel(0.125, 0.0, 0.0, 0.0)
    for max_lanes in (1, 2, 4):
        lost = Solver(latency, max_cores=4, max_batch_size=4, max_lanes=max_lanes).solve([-1.0])
        assert lost == plan(4.0, 1, feasible=False)


def test_least_and_most_cores_may_be_equal() -> None:
    """A static allocation is the degenerate case: only the batch size is left to choose."""
    fixed = solver(min_cores=2.0, max_cores=2.0)
    assert fixed.core_levels == (2.0,)
    assert fixed.solve([0.2] * 3) == plan(2.0, 1)
    assert fixed.solve([0.17] * 3) == plan(2.0, 3)


def test_negative_epsilon_makes_no_negative_work() -> None:
    """With γ + ε < 0 the fitted line says that a batch of one has negative parallel work; it then has none."""
    latency = LatencyModel(0.14, -0.2, 0.025, 0.022)
    assert Solver(latency, max_cores=4, max_batch_size=2).solve([0.05]) == plan(1.0, 1)


def test_core_levels_end_within_the_most_cores() -> None:
    """The grid starts at the least cores; the most need not be on it, and rounding must not lose the last level."""
    assert solver(min_cores=0.5, max_cores=2, core_step=0.4).core_levels == pytest.approx((0.5, 0.9, 1.3, 1.7))
    tenths = solver(min_cores=0.1, max_cores=0.7, core_step=0.1).core_levels
    assert len(tenths) == 7
    assert tenths[-1] <= 0.7
    assert solver(core_step=None).core_levels == ()


def test_lists_tuples_and_arrays_are_answered_alike() -> None:
    """Callers keep their queues in whatever they like."""
    budgets = [0.05, 0.3, 0.4]
    expected = solver().solve(budgets)
    assert solver().solve(tuple(budgets)) == solver().solve(np.array(budgets)) == expected
    assert solver().solve(np.array(budgets, np.float32)) == expected
    strided = np.array([0.05, 9.0, 0.3, 9.0, 0.4])[::2]
    assert solver().solve(strided) == expected


def test_budgets_are_left_as_they_were() -> None:
    """An array is read in place, not scaled or sorted in place."""
    budgets = np.array([0.05, 0.3, 0.4])
    solver().solve(budgets, 3.0)
    assert budgets.tolist() == [0.05, 0.3, 0.4]


def test_slowdown_is_the_same_problem_in_scaled_time() -> None:
    """The controller corrects drift without a new solver: budgets divided by the factor, rate multiplied by it."""
    slower = LatencyModel(0.2, 0.0, 0.0, 0.02)
    for budgets, rate in (([0.3, 0.5, 0.6], 7.0), ([0.11], 0.0), ([], 30.0)):
        expected = Solver(slower, max_cores=8, max_batch_size=4).solve(budgets, rate)
        assert solver().solve([s / 2 for s in budgets], rate * 2) == expected


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 33, 112, 113, 4097])
def test_every_queue_length_is_read_to_its_end(count: int) -> None:
    """Queues are padded to a few lengths; the padding must neither hide the last request nor invent one."""
    budgets = np.full(count, 1e6)
    assert solver().solve(budgets) == plan(1.0, 1)
    budgets[-1] = 1e6 + 1
    tight = solver(max_batch_size=1)
    budgets = 0.11 * np.arange(1, count + 1) + 1e-6
    assert tight.solve(budgets) == plan(1.0, 1)
    budgets[-1] = np.nextafter(0.11 * count * (1 - 1e-9), 0.0)
    assert tight.solve(np.sort(budgets)).cores == 2.0


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([0.2, 0.1], "ascending"),
        ([math.nan], "NaN"),
        ([0.1, math.nan], "NaN"),
        ([math.nan, 0.1], "NaN"),
        ([[0.1]], "one-dimensional"),
        (0.1, "one-dimensional"),
    ],
)
def test_bad_queue_is_refused(budgets: list[float], message: str) -> None:
    """A queue out of order would get a plan that misses deadlines without saying so."""
    with pytest.raises(ValueError, match=f"budgets_s.*{message}"):
        solver().solve(budgets)


@pytest.mark.parametrize("rate", [-1.0, math.inf, math.nan])
def test_bad_rate_is_refused(rate: float) -> None:
    """A negative or missing rate is a bug of the caller, not an infeasible problem."""
    with pytest.raises(ValueError, match="arrival_rate_rps"):
        solver().solve([0.1], rate)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_cores", 0.5),
        ("max_cores", math.inf),
        ("max_cores", math.nan),
        ("max_batch_size", 0),
        ("min_cores", 0.0),
        ("min_cores", math.nan),
        ("core_step", 0.0),
        ("core_step", math.nan),
        ("core_step", 1e-7),
        ("max_lanes", 0),
    ],
)
def test_bad_limit_is_refused_by_name_and_value(name: str, value: float) -> None:
    """The message says which argument and what it was; a step that would need gigabytes is refused too."""
    with pytest.raises(ValueError, match=name) as error:
        solver(**{name: value})
    assert repr(value) in str(error.value)


def test_solving_loads_no_optimiser() -> None:
    """The hot path of a service must not depend on cvxpy or SCIP, nor pay for their import."""
    code = (
        "import sys, sponge; s = sponge.Solver(sponge.LatencyModel(0.1, 0, 0, 0.01), max_cores=4, max_batch_size=4);"
        "s.solve([0.5]); print([m for m in ('cvxpy', 'pyscipopt', 'scipy', 'sponge.optimize') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"
