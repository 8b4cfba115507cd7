"""The published algorithm: its program against the exact solver, and a second of it action by action."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sponge.core.actions import SetCpu
from sponge.core.events import BatchFinished, CpuApplied, Drain, Tick
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.sim.baselines import PublishedAllocation, PublishedController
from tests.sim.scripts import arrived, start

MODEL = LatencyModel(0.2, 0.0, 0.0, 0.0)
"""A request takes 0.2 core-seconds, in whatever batch."""
YOLOV5S = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221)
"""Fit of the profile in the paper."""


@settings(max_examples=200, deadline=None)
@given(
    budget_s=st.floats(-0.5, 3.0),
    requests=st.integers(1, 40),
    rate=st.floats(0.0, 60.0),
    max_cores=st.integers(1, 20),
    max_batch_size=st.integers(1, 16),
)
def test_allocation_is_that_of_the_exact_solver(
    budget_s: float, requests: int, rate: float, max_cores: int, max_batch_size: int
) -> None:
    """Trying everything and the closed form answer the same program, with one budget for all requests."""
    allocation = PublishedAllocation(YOLOV5S, max_cores=max_cores, max_batch_size=max_batch_size)
    solver = Solver(YOLOV5S, max_cores=max_cores, max_batch_size=max_batch_size)
    plan = allocation.solve(budget_s, requests=requests, arrival_rate_rps=rate)
    exact = solver.solve([budget_s] * requests, rate)
    assert (plan is not None) == exact.feasible
    if plan is not None:
        assert plan == exact


def test_allocation_follows_the_network_as_in_the_paper() -> None:
    """20 requests a second: from 10 cores with little network time to 16 with a quarter of a second of it.

    Where even those do not do, the allocation before is kept.
    """
    allocation = PublishedAllocation(YOLOV5S, max_cores=16, max_batch_size=8)
    network_s = [0.04, 0.065, 0.075, 0.1, 0.11, 0.13, 0.14, 0.3, 0.04]
    cores = list(allocation.replay([0.9 - network for network in network_s], arrival_rate_rps=20))
    assert cores == [10, 11, 12, 13, 14, 15, 16, 16, 10]
    assert list(allocation.replay([0.0, 0.86], arrival_rate_rps=20, initial_cores=7)) == [7, 10]


def test_one_allocation_a_second_from_the_tightest_budget_of_the_last() -> None:
    """It starts with all cores; the smallest time left at arrival, less a tenth of the SLO, decides the next second."""
    s = PublishedController(MODEL, max_cores=4, max_batch_size=4, partial_wait_s=0.5)
    assert s.handle(arrived(0, 10.0, 10.8), now=10.0) == [SetCpu(4.0)]
    assert s.handle(CpuApplied(4.0), now=10.0) == []
    assert s.handle(arrived(1, 10.1, 10.7), now=10.1) == []
    assert s.next_wakeup() == 10.5
    assert s.handle(Tick(), now=10.5) == [start(0, 1, 0, cores=4.0, expected_s=0.1)]
    assert s.handle(BatchFinished(0), now=10.6) == []
    # 0.5 s for two requests on c cores: 0.4 s on one.
    assert s.next_wakeup() == 11.0
    assert s.handle(Tick(), now=11.0) == [SetCpu(1.0)]
    assert s.batch_size == 1
    assert s.next_wakeup() is None
    # Until the pod is resized, the cores before are the true ones.
    assert s.handle(arrived(2, 11.2, 11.5), now=11.2) == [start(1, 2, cores=4.0, expected_s=0.05)]
    assert s.handle(CpuApplied(1.0), now=11.25) == []
    assert s.handle(BatchFinished(0), now=11.3) == []
    assert s.handle(arrived(3, 11.3, 11.6), now=11.3) == [start(2, 3, cores=1.0, expected_s=0.2)]


def test_allocation_is_kept_when_nothing_is_feasible_or_nobody_came() -> None:
    """0.04 s after the margin are not enough on any number of cores."""
    s = PublishedController(MODEL, max_cores=4, max_batch_size=4, partial_wait_s=0.0, initial_cores=3)
    assert s.handle(arrived(0, 0.0, 0.14), now=0.0)[0] == SetCpu(3.0)
    s.handle(BatchFinished(0), now=0.2)
    assert s.next_wakeup() == 1.0
    assert s.handle(Tick(), now=1.0) == []
    assert s.next_wakeup() is None
    assert s.handle(Tick(), now=5.0) == []
    assert s.batch_size == 4


def test_each_second_is_judged_by_its_own_requests() -> None:
    """A tight second makes the next one dear, and no later one."""
    s = PublishedController(MODEL, max_cores=4, max_batch_size=1, partial_wait_s=0.0, initial_cores=1)
    s.handle(arrived(0, 0.0, 0.2), now=0.0)
    s.handle(BatchFinished(0), now=0.2)
    assert s.handle(arrived(1, 1.0, 2.0), now=1.0)[0] == SetCpu(2.0)
    s.handle(BatchFinished(0), now=1.2)
    assert s.handle(Tick(), now=2.0) == [SetCpu(1.0)]


def test_rate_and_budget_may_be_given() -> None:
    """As configured in the experiment, whose monitor knew the network of the current second."""
    seen: list[float] = []

    def budget_of(begins_at: float) -> float:
        seen.append(begins_at)
        return 0.9

    s = PublishedController(
        MODEL, max_cores=8, max_batch_size=4, arrival_rate_rps=8, partial_wait_s=0.0, budget_of=budget_of
    )
    s.handle(arrived(0, 0.0, 0.1), now=0.0)
    s.handle(BatchFinished(0), now=0.1)
    # 8 requests of 0.2 core-seconds in 0.8 s.
    assert s.handle(Tick(), now=1.0) == [SetCpu(2.0)]
    assert seen == [1.0]


def test_full_batches_leave_at_once_and_drain_ends_the_waiting() -> None:
    """The batch size is constant until the next solve; what does not fill one waits."""
    s = PublishedController(MODEL, max_cores=2, max_batch_size=2, order="fifo")
    assert s.handle(arrived(0, 0.0, 9.0), now=0.0) == [SetCpu(2.0)]
    assert s.handle(arrived(1, 0.0, 5.0), now=0.0) == [start(0, 0, 1, cores=2.0, expected_s=0.2)]
    s.handle(arrived(2, 0.1, 9.0), now=0.1)
    assert s.handle(BatchFinished(0), now=0.2) == []
    assert s.handle(Drain(), now=0.3) == [start(1, 2, cores=2.0, expected_s=0.1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_cores": 0},
        {"max_batch_size": 0},
        {"slo_s": 0.0},
        {"safety": 1.1},
        {"arrival_rate_rps": 0.0},
        {"period_s": 0.0},
        {"partial_wait_s": -1.0},
        {"order": "sjf"},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """Named in the message."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PublishedController(MODEL, **wrong)  # type: ignore[arg-type]


def test_impossible_seconds_are_refused() -> None:
    """A second without requests has no allocation."""
    allocation = PublishedAllocation(MODEL, max_cores=4, max_batch_size=4)
    with pytest.raises(ValueError, match="requests must be at least 1, got 0"):
        allocation.solve(1.0, requests=0, arrival_rate_rps=1.0)
    with pytest.raises(ValueError, match="arrival_rate_rps"):
        list(allocation.replay([1.0], arrival_rate_rps=0.0))
