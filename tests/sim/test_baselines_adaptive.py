"""The batcher that fits its latency while serving: what it learns, how it waits, whom it sheds."""

from __future__ import annotations

import pytest

from sponge.core.actions import Reject, SetCpu
from sponge.core.events import BatchFinished, Drain, Tick
from sponge.core.values import RejectReason
from sponge.sim.baselines import OnlineFitBatcher
from sponge.sim.baselines.adaptive import OnlineFit
from tests.sim.scripts import arrived, start, started


def taught(sizes: list[int], duration_s: float = 0.1, **more: float) -> OnlineFitBatcher:
    """A batcher that has served batches of these sizes, all in the same time, if they were given the chance."""
    s = OnlineFitBatcher(1.0, **{"max_batch_size": 8, "max_latency_s": 0.4, **more})  # type: ignore[arg-type]
    request_id, now = 0, 0.0
    for size in sizes:
        for _ in range(size):
            s.handle(arrived(request_id, now, now + 9.0), now=now)
            request_id += 1
        if s.next_wakeup() is not None:
            now = s.next_wakeup() or now
            s.handle(Tick(), now=now)
        now += duration_s
        s.handle(BatchFinished(0, True, duration_s), now=now)
        assert s.idle
        now += 10.0
    return s


def test_fit_finds_both_coefficients_when_sizes_differ() -> None:
    """Once batches of different sizes were seen, the line through them is the truth."""
    fit = OnlineFit(1.0)
    for i in range(10):
        size = 1 + i % 4
        fit.learn(size, 0.02 + 0.03 * size, 0.0, 10.0 * i)
    assert fit.per_request_s == pytest.approx(0.03)
    assert fit.per_batch_s == pytest.approx(0.02)


def test_single_requests_leave_the_latency_split_evenly() -> None:
    """Its known failure at the start: nothing tells the cost per request from the cost per batch."""
    fit = taught([1] * 6).fit
    assert fit.per_request_s == pytest.approx(0.05)
    assert fit.per_batch_s == pytest.approx(0.05)
    assert fit.latency_s(8) == pytest.approx(0.45)


def burst(s: OnlineFitBatcher) -> list[Reject]:
    """Twelve requests at once; return who was turned away of those who wait for the first batch to end."""
    gone = []
    for request_id in range(100, 112):
        actions = s.handle(arrived(request_id, 100.0, 100.42), now=100.0)
        gone += [action for action in actions if isinstance(action, Reject)]
    assert not s.idle
    return gone


def test_after_a_quiet_start_a_feasible_burst_is_turned_away() -> None:
    """Any batch takes 0.1 s, so all would be done within 0.3 s; yet eight are expected to take 0.45 s."""
    s = taught([1] * 6, max_latency_s=0.42)
    assert burst(s) == [Reject(request_id, RejectReason.DEADLINE) for request_id in (103, 104)]


def test_training_tries_batches_of_two_and_three() -> None:
    """So that the fit is sound where requests do come together; and then the burst is served."""
    s = taught([1, 1, 1, 1, 2, 3], max_latency_s=0.42)
    assert not s.training
    assert s.fit.per_request_s == pytest.approx(1e-6)
    assert s.fit.per_batch_s == pytest.approx(0.1)
    assert burst(s) == []


def test_training_waits_for_a_second_request_but_not_for_long() -> None:
    """Five times what a single request takes, less what the two of them would."""
    s = taught([1] * 4)
    assert s.training
    s.handle(arrived(10, 50.0, 59.0), now=50.0)
    # min(0.95 · 0.4, 5 · 0.1) − (2 · 0.05 + 0.05)
    assert s.next_wakeup() == pytest.approx(50.0 + 0.38 - 0.15)
    assert started(s.handle(arrived(11, 50.1, 59.0), now=50.1)) == [(11, 10)]


def test_training_keeps_some_requests_that_have_waited_too_long() -> None:
    """It needs them to learn from; beyond that number the longest-waiting is given up."""
    s = OnlineFitBatcher(1.0, max_batch_size=8, max_latency_s=0.4)
    assert s.handle(arrived(0, 0.0, 9.0), now=0.0) == [SetCpu(1.0), start(0, 0, cores=1.0)]
    for request_id in range(1, 10):
        s.handle(arrived(request_id, 0.0, 9.0), now=0.0)
    assert s.next_wakeup() == 0.4
    assert s.handle(Tick(), now=0.4) == [Reject(1, RejectReason.DEADLINE)]
    assert s.next_wakeup() is None


def test_lone_request_is_given_up_only_while_a_batch_runs() -> None:
    """A free lane serves it however late it is."""
    s = taught([1, 1, 1, 1, 2, 3])
    s.handle(arrived(100, 200.0, 209.0), now=200.0)
    s.handle(Tick(), now=200.3)
    assert s.queue_length == 0
    s.handle(arrived(101, 210.0, 219.0), now=210.0)
    assert s.next_wakeup() == 210.0 + 0.4
    assert s.handle(Tick(), now=210.4) == [Reject(101, RejectReason.DEADLINE)]


def test_free_lane_waits_for_company_as_long_as_batches_used_to() -> None:
    """0.95 times the mean wait, shared by those who wait, less a request's own time, from the last arrival."""
    s = taught([1, 1, 1, 1, 2, 3])
    s.fit.wait_s, s.fit.per_request_s = 0.2, 0.01
    assert s.handle(arrived(100, 200.0, 209.0), now=200.0) == []
    assert s.next_wakeup() == pytest.approx(200.0 + 0.95 * 0.2 - 0.011)
    assert s.handle(arrived(101, 200.05, 209.0), now=200.05) == []
    assert s.next_wakeup() == pytest.approx(200.05 + 0.95 * 0.1 - 0.011)
    assert started(s.handle(Drain(), now=200.1)) == [(101, 100)]


def test_newest_go_first_unless_told_otherwise() -> None:
    """When more wait than fit in a batch, the oldest are left behind."""
    for order, first in (("lifo", (104, 103)), ("fifo", (101, 102))):
        s = OnlineFitBatcher(1.0, max_batch_size=2, max_latency_s=40.0, order=order)  # type: ignore[arg-type]
        now = 0.0
        for request_id in range(8):
            s.handle(arrived(request_id, now, 99.0), now=now)
            if s.next_wakeup() is not None:
                now = s.next_wakeup() or now
                s.handle(Tick(), now=now)
            s.handle(BatchFinished(0, True, 0.1), now=now)
        assert not s.training
        s.handle(arrived(100, 60.0, 99.0), now=60.0)
        if s.next_wakeup() is not None:
            s.handle(Tick(), now=s.next_wakeup() or 0.0)
        for request_id in range(101, 105):
            s.handle(arrived(request_id, request_id - 35.0, 199.0), now=request_id - 35.0)
        assert started(s.handle(BatchFinished(0, True, 0.1), now=70.0)) == [first]


def test_failed_batches_teach_nothing() -> None:
    """A model that raises at once has not become fast."""
    s = taught([1] * 6)
    before = (s.fit.per_request_s, s.fit.per_batch_s)
    s.handle(Drain(), now=999.0)  # nobody waits for company
    for i in range(60):
        s.handle(arrived(1000 + i, 1000.0 + i, 9999.0), now=1000.0 + i)
        s.handle(BatchFinished(0, False, 0.001), now=1000.5 + i)
    assert (s.fit.per_request_s, s.fit.per_batch_s) == before


def test_arguments_out_of_range_are_refused() -> None:
    """Named in the message."""
    with pytest.raises(ValueError, match="max_latency_s"):
        OnlineFitBatcher(1.0, max_batch_size=8, max_latency_s=0.0)
    with pytest.raises(ValueError, match="max_batch_size"):
        OnlineFitBatcher(1.0, max_batch_size=0)
