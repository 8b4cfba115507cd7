"""Unit jobs at a constant and at the flattest speed, against linear programs and against known cases."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sponge.core.latency import Latency
from sponge.optimize import envelope, fluid
from sponge.optimize.envelope import Envelope, FloatArray, Limits, Widths
from tests.optimize.problems import latencies

CONVEX = [
    Envelope(rps=np.array([0.0, 3.0]), cores=np.array([0.0, 2.0])),
    Envelope(rps=np.array([0.0, 1.0, 2.0, 4.0]), cores=np.array([0.0, 0.5, 2.0, 9.0])),
    Envelope(rps=np.array([0.0, 0.7, 1.5, 1.9, 2.6, 5.0]), cores=np.array([0.0, 0.0, 1.0, 2.0, 5.0, 30.0])),
]


@st.composite
def windows(draw: st.DrawFn, *, most: int = 12) -> tuple[FloatArray, FloatArray]:
    """Windows with ties, nesting and gaps, by arrival; in hundredths, which linear programs can tell apart."""
    instant = st.integers(0, 12).map(float) | st.integers(0, 1200).map(lambda hundredths: hundredths / 100)
    length = st.integers(1, 5).map(float) | st.integers(5, 600).map(lambda hundredths: hundredths / 100)
    pairs = sorted(draw(st.lists(st.tuples(instant, length), min_size=1, max_size=most)))
    arrived = np.array([start for start, _ in pairs])
    return arrived, arrived + np.array([length for _, length in pairs])


def discretised(arrived: FloatArray, deadline: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lengths of the times between events, and which job may run when; exact, since the flattest speed is constant
    between events."""
    events = np.unique(np.concatenate([arrived, deadline]))
    allowed = (arrived[:, None] <= events[None, :-1]) & (deadline[:, None] >= events[None, 1:])
    return np.diff(events), allowed.astype(np.float64)


def cheapest_program(arrived: FloatArray, deadline: FloatArray, cost: Envelope) -> float:
    """The fluid program as a linear program: work of each job in each time between events."""
    lengths, allowed = discretised(arrived, deadline)
    work = cp.Variable(allowed.shape, nonneg=True)
    speed = cp.sum(work, axis=0) / lengths
    lines = [
        slope * (speed - rps) + cores
        for slope, rps, cores in zip(cost.slopes, cost.rps[:-1], cost.cores[:-1], strict=True)
    ]
    cores = cp.maximum(*lines) if len(lines) > 1 else lines[0]
    constraints = [cp.sum(cp.multiply(allowed, work), axis=1) == 1, cp.multiply(1 - allowed, work) == 0]
    problem = cp.Problem(cp.Minimize(lengths @ cores), constraints)
    return float(problem.solve(solver=cp.CLARABEL))


def least_undone_program(arrived: FloatArray, deadline: FloatArray, rps: float) -> float:
    """The most work at a constant speed as a linear program."""
    lengths, allowed = discretised(arrived, deadline)
    work = cp.Variable(allowed.shape, nonneg=True)
    done = cp.sum(cp.multiply(allowed, work))
    constraints = [cp.sum(work, axis=1) <= 1, cp.sum(work, axis=0) <= rps * lengths]
    return len(arrived) - float(cp.Problem(cp.Maximize(done), constraints).solve(solver=cp.CLARABEL))


@settings(max_examples=25, deadline=None)
@given(windows(), st.sampled_from(CONVEX))
def test_flattest_speed_is_the_optimum_of_the_convex_program(
    jobs: tuple[FloatArray, FloatArray], cost: Envelope
) -> None:
    """The bound is exact for its relaxation, whatever the convex cost."""
    speed = fluid.flattest(*jobs)
    found = float(cost.cores_at(speed.rps) @ np.diff(speed.times_s))
    assert found == pytest.approx(cheapest_program(*jobs, cost), abs=1e-5, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(windows(), st.floats(0.1, 6.0))
def test_earliest_deadline_first_leaves_the_least_undone(jobs: tuple[FloatArray, FloatArray], rps: float) -> None:
    """The certificate of every bound: no schedule does more at that speed."""
    assert fluid.edf(*jobs, rps).total_undone == pytest.approx(least_undone_program(*jobs, rps), abs=1e-5)


@settings(max_examples=300, deadline=None)
@given(windows(most=40), st.floats(0.05, 10.0))
def test_flattest_speed_meets_every_certificate_at_once(jobs: tuple[FloatArray, FloatArray], rps: float) -> None:
    """Work above any speed is exactly what that speed leaves undone: two independent computations agree."""
    speed = fluid.flattest(*jobs)
    undone = fluid.edf(*jobs, rps).total_undone
    assert speed.above(np.array([rps]))[0] == pytest.approx(undone, abs=1e-7)
    by_hand = np.sum(np.maximum(speed.rps - rps, 0.0) * np.diff(speed.times_s))
    assert by_hand == pytest.approx(undone, abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(windows(most=40))
def test_flattest_speed_does_all_work_without_a_break_in_time(jobs: tuple[FloatArray, FloatArray]) -> None:
    """One step function over the whole span, with the work of all jobs below it."""
    arrived, deadline = jobs
    speed = fluid.flattest(arrived, deadline)
    assert speed.times_s[0] == arrived[0]
    assert speed.times_s[-1] == pytest.approx(deadline.max())
    assert np.all(np.diff(speed.times_s) > 0)
    assert np.all(speed.rps >= 0)
    assert speed.rps @ np.diff(speed.times_s) == pytest.approx(len(arrived))


def test_textbook_case_of_critical_intervals() -> None:
    """A crowded second inside a long window runs at its own speed, the long job in what is left around it."""
    speed = fluid.flattest(np.array([0.0, 2.0, 2.0]), np.array([5.0, 3.0, 3.0]))
    np.testing.assert_allclose(speed.times_s, [0.0, 2.0, 3.0, 5.0])
    np.testing.assert_allclose(speed.rps, [0.25, 2.0, 0.25])


def test_gaps_have_no_speed() -> None:
    """Where no window is open nothing runs."""
    speed = fluid.flattest(np.array([0.0, 10.0]), np.array([1.0, 12.0]))
    np.testing.assert_allclose(speed.times_s, [0.0, 1.0, 10.0, 12.0])
    np.testing.assert_allclose(speed.rps, [1.0, 0.0, 0.5])
    assert len(fluid.flattest(np.zeros(0), np.zeros(0)).rps) == 0


def test_requests_without_a_deadline_are_never_undone() -> None:
    """They can wait until the others are done, for ever if need be."""
    sweep = fluid.edf(np.array([0.0, 0.0, 1.0]), np.array([np.inf, 1.0, 1.5]), 1.0)
    np.testing.assert_allclose(sweep.undone, [0.0, 0.0, 0.5])


@settings(max_examples=60, deadline=None)
@given(latencies(), st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 8.0), st.data())
def test_envelope_lies_below_whatever_lanes_do(
    latency: Latency, lanes: int, max_batch_size: int, max_cores: float, data: st.DataObject
) -> None:
    """At any instant some lanes run some batches: their throughput is never had for less than the envelope says."""
    step = data.draw(st.sampled_from([0.25, None]))
    widths = Widths.between(0.5, max_cores, step)
    limits = Limits(latency=latency, widths=widths, max_cores=max_cores, max_batch_size=max_batch_size)
    lane = envelope.lane_envelope(limits)
    common = envelope.side_by_side([lane] * lanes, max_cores)
    assert np.all(np.diff(common.rps) > 0)
    assert np.all(np.diff(common.slopes) >= -1e-6 * common.slopes[1:])
    rps, cores = 0.0, 0.0
    for _ in range(lanes):
        count = data.draw(st.integers(0, int((max_cores - 0.5) / 0.25)))
        width, batch_size = 0.5 + 0.25 * count, data.draw(st.integers(1, max_batch_size))
        if cores + width <= max_cores:
            rps += latency.throughput_rps(batch_size, width)
            cores += width
    assert rps <= common.max_rps * (1 + 1e-9)
    assert common.cores_at(np.array([rps]))[0] <= cores * (1 + 1e-9)
