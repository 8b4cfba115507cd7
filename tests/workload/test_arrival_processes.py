"""Arrival processes and the workloads that come of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sponge.workload import PROCESSES, BandwidthTrace, Workload, bursts, constant, poisson


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_process_is_sorted_repeatable_and_of_its_rate(name: str) -> None:
    """Each process offers the same load; only the grouping differs.

    The number of a Poisson process over 500 s at 20/s has a standard deviation of 100; the bounds leave five.
    """
    process = PROCESSES[name]
    times = process(20.0, 500.0, np.random.default_rng(1))
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert len(times) == pytest.approx(10_000, abs=500)
    assert np.array_equal(times, process(20.0, 500.0, np.random.default_rng(1)))
    assert not np.array_equal(times, process(20.0, 500.0, np.random.default_rng(2)))


def test_constant_arrivals_are_equally_far_apart() -> None:
    """Also at a rate that does not divide the second."""
    times = constant(3.0, 10.0, np.random.default_rng(0))
    assert len(times) == 30
    assert np.allclose(np.diff(times), 1 / 3)
    assert times[-1] < 10.0


def test_poisson_gaps_are_exponential() -> None:
    """Mean and standard deviation of the gaps are both 1/rate (5 standard errors of 20,000 gaps: 3.5 %)."""
    gaps = np.diff(poisson(10.0, 2000.0, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(0.1, rel=0.036)
    assert gaps.std() == pytest.approx(0.1, rel=0.05)


def test_bursts_hold_each_seconds_requests_in_its_beginning() -> None:
    """The published load: 20 a second, the last of them 0.18 s into it on average, the mean 0.05 s."""
    times = bursts(20.0, 400.0, np.random.default_rng(0))
    assert len(times) == 8000
    offsets = times - np.repeat(np.arange(400), 20)
    last_of_second = offsets.reshape(400, 20)[:, -1]
    harmonic = sum(1 / k for k in range(1, 21))
    assert offsets.mean() == pytest.approx(0.05, rel=0.06)
    assert last_of_second.mean() == pytest.approx(harmonic / 20, rel=0.1)


def test_bursts_of_a_fractional_rate_keep_the_rate() -> None:
    """2.5 a second are two and three by turns."""
    times = bursts(2.5, 10.0, np.random.default_rng(0))
    assert len(times) == 25


@pytest.mark.parametrize(("rate", "duration"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1e9, 1e9)])
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_process_refuses_impossible_numbers(name: str, rate: float, duration: float) -> None:
    """Rather than fill the memory."""
    with pytest.raises(ValueError, match=r"rate_rps|duration_s"):
        PROCESSES[name](rate, duration, np.random.default_rng(0))


def test_workload_is_in_order_of_arrival_with_deadlines_from_sending() -> None:
    """What was sent during the outage is overtaken, and has the least time left."""
    trace = BandwidthTrace(times_s=[0.0, 1.0, 3.0], bytes_per_s=[100.0, 0.0, 100.0], end_s=10.0)
    workload = Workload.from_network([3.2, 0.0, 0.95], trace, 10.0, [1.0, 1.0, 3.0])
    assert workload.sent_at_s.tolist() == [0.0, 0.95, 3.2]
    assert workload.arrived_at_s.tolist() == pytest.approx([0.1, 3.05, 3.3])
    assert workload.deadline_s.tolist() == pytest.approx([1.0, 3.95, 4.2])
    assert workload.network_s.tolist() == pytest.approx([0.1, 2.1, 0.1])
    assert workload.budget_s.tolist() == pytest.approx([0.9, 0.9, 0.9])
    assert len(workload) == 3
    assert workload.until(3.3).sent_at_s.tolist() == [0.0, 0.95]


def test_request_overtaken_in_the_network_arrives_later() -> None:
    """Sizes differ: a small payload sent later arrives first."""
    trace = BandwidthTrace(times_s=[0.0], bytes_per_s=[100.0], end_s=1.0)
    workload = Workload.from_network([0.0, 0.1], trace, [100.0, 10.0], 1.0)
    assert workload.sent_at_s.tolist() == [0.1, 0.0]
    assert workload.budget_s.tolist() == pytest.approx([0.9, 0.0])


def test_clients_that_travel_apart_meet_their_own_place_of_the_trace() -> None:
    """Several phones need no trace each: the same log, entered elsewhere, is another journey."""
    trace = BandwidthTrace(times_s=[0.0, 1.0], bytes_per_s=[100.0, 10.0], end_s=2.0)
    workload = Workload.from_network([0.0, 0.1, 0.2], trace, 5.0, 1.0, offset_s=[0.0, 1.0, 2.0])
    assert workload.sent_at_s.tolist() == [0.0, 0.2, 0.1]
    assert workload.network_s.tolist() == pytest.approx([0.05, 0.05, 0.5])


def test_workload_refuses_what_cannot_be() -> None:
    """A request that arrives before it was sent, or never, has no place in a comparison."""
    trace = BandwidthTrace(times_s=[0.0, 1.0], bytes_per_s=[100.0, 0.0], end_s=2.0, loops=False)
    with pytest.raises(ValueError, match="never ends"):
        Workload.from_network([1.5], trace, 10.0, 1.0)
    with pytest.raises(ValueError, match="slo_s"):
        Workload.from_network([0.5], trace, 10.0, 0.0)
    with pytest.raises(ValueError, match="precede"):
        Workload(sent_at_s=[1.0], arrived_at_s=[0.5], deadline_s=[2.0])
    with pytest.raises(ValueError, match="sorted"):
        Workload(sent_at_s=[0.0, 0.0], arrived_at_s=[1.0, 0.5], deadline_s=[2.0, 2.0])
    with pytest.raises(ValueError, match="equal length"):
        Workload(sent_at_s=[0.0], arrived_at_s=[1.0, 2.0], deadline_s=[2.0])
