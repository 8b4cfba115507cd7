"""Static allocation as a controller: the exact actions it takes."""

from __future__ import annotations

import pytest

from sponge.core.actions import Reject, SetCpu
from sponge.core.events import Abort, BatchFinished, Cancelled, CpuApplied, Drain, Tick
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import RejectReason
from sponge.sim.baselines import StaticController
from tests.sim.scripts import arrived, start

LATENCY = LatencyModel(gamma_s=0.2, epsilon_s=0.0, delta_s=0.0, eta_s=0.0)


def test_fifo_serves_single_requests_by_arrival_on_all_cores() -> None:
    """The service without a scheduler: deadlines are not looked at, late or not."""
    s = StaticController(2.0, order="fifo", max_batch_size=1)
    assert s.next_wakeup() is None
    assert s.handle(arrived(0, 1.0, 9.0), now=1.0) == [SetCpu(2.0), start(0, 0)]
    assert s.handle(CpuApplied(2.0), now=1.0) == []
    assert s.handle(arrived(1, 1.1, 8.0), now=1.1) == []
    assert s.handle(arrived(2, 1.2, 1.3), now=1.2) == []
    assert s.next_wakeup() is None
    assert s.handle(BatchFinished(0), now=2.0) == [start(1, 1)]
    assert s.handle(BatchFinished(0), now=3.0) == [start(2, 2)]
    assert s.handle(BatchFinished(0), now=4.0) == []
    assert s.idle


def test_edf_serves_batches_by_deadline() -> None:
    """Whatever waits goes in one batch, the most urgent first; the allocation is asked for once."""
    s = StaticController(2.0, order="edf", max_batch_size=2, latency=LATENCY)
    assert s.handle(arrived(0, 1.0, 9.0), now=1.0) == [SetCpu(2.0), start(0, 0, expected_s=0.1)]
    for request_id, deadline in ((1, 8.0), (2, 7.0), (3, 7.5)):
        assert s.handle(arrived(request_id, 1.1, deadline), now=1.1) == []
    assert s.handle(BatchFinished(0), now=1.2) == [start(1, 2, 3, expected_s=0.2)]
    assert s.handle(BatchFinished(0, ok=False), now=1.4) == [start(2, 1, expected_s=0.1)]


def test_lanes_share_the_cores_and_run_side_by_side() -> None:
    """Each lane has its part of the allocation, and a lane that is free is used at once."""
    s = StaticController(2.0, order="edf", max_batch_size=4, lanes=2)
    first = s.handle(arrived(0, 1.0, 9.0), now=1.0)
    assert first == [SetCpu(2.0), start(0, 0, lane=0, cores=1.0)]
    assert s.handle(arrived(1, 1.0, 8.0), now=1.0) == [start(1, 1, lane=1, cores=1.0)]
    assert s.handle(arrived(2, 1.1, 8.0), now=1.1) == []
    assert s.handle(BatchFinished(0), now=1.2) == [start(2, 2, lane=0, cores=1.0)]
    assert not s.idle


def test_late_requests_are_dropped_when_their_turn_comes() -> None:
    """Only if asked for; and by the prediction, so that no time goes into an answer that would be late."""
    s = StaticController(2.0, order="edf", max_batch_size=2, drop_late=True, latency=LATENCY)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    s.handle(arrived(1, 1.0, 1.29), now=1.0)
    s.handle(arrived(2, 1.0, 1.31), now=1.0)
    late = Reject(1, RejectReason.DEADLINE)
    assert s.handle(BatchFinished(0), now=1.2) == [late, start(1, 2, expected_s=0.1)]
    unsure = StaticController(2.0, order="fifo", max_batch_size=1, drop_late=True)
    unsure.handle(arrived(0, 1.0, 9.0), now=1.0)
    unsure.handle(arrived(1, 1.1, 1.2), now=1.1)
    unsure.handle(arrived(2, 1.1, 1.3), now=1.1)
    assert unsure.handle(BatchFinished(0), now=1.25) == [Reject(1, RejectReason.DEADLINE), start(1, 2)]


def test_adaptive_batches_are_as_large_as_the_first_deadline_allows() -> None:
    """At 0.1 s a request two fit before 1.3 and three before 1.6; a late one still gets its turn, alone."""
    s = StaticController(2.0, order="edf", max_batch_size=4, batching="adaptive", latency=LATENCY)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    for request_id, deadline in ((1, 1.55), (2, 1.6), (3, 1.7), (4, 1.8), (5, 1.3)):
        s.handle(arrived(request_id, 1.0, deadline), now=1.0)
    assert s.handle(BatchFinished(0), now=1.1) == [start(1, 5, 1, expected_s=0.2)]
    assert s.handle(BatchFinished(0), now=1.3) == [start(2, 2, 3, 4, expected_s=LATENCY.latency_s(3, 2.0))]
    s.handle(arrived(6, 1.3, 1.4), now=1.3)
    s.handle(arrived(7, 1.3, 9.0), now=1.3)
    assert s.handle(BatchFinished(0), now=1.6) == [start(3, 6, expected_s=0.1)]


def test_lifo_serves_the_newest_first() -> None:
    """Which some batchers do, whether they mean to or not."""
    s = StaticController(2.0, order="lifo", max_batch_size=2)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    for request_id in (1, 2, 3):
        s.handle(arrived(request_id, 1.0 + request_id, 9.0), now=1.0 + request_id)
    assert s.handle(BatchFinished(0), now=5.0) == [start(1, 3, 2)]


def test_batches_are_planned_with_the_cores_in_force() -> None:
    """A container may be allowed less than was asked for."""
    s = StaticController(2.0, order="fifo", max_batch_size=1, latency=LATENCY)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    s.handle(CpuApplied(1.0), now=1.0)
    s.handle(arrived(1, 1.0, 9.0), now=1.0)
    assert s.handle(BatchFinished(0), now=1.1) == [start(1, 1, cores=1.0, expected_s=0.2)]


def test_window_lets_a_batch_wait_for_company() -> None:
    """Until it is full, the first of it has waited long enough, or nothing more will come."""
    s = StaticController(1.0, order="edf", max_batch_size=3, window_s=0.5)
    assert s.handle(arrived(0, 1.0, 9.0), now=1.0) == [SetCpu(1.0)]
    assert s.next_wakeup() == 1.5
    assert s.handle(Tick(), now=1.4) == []
    assert s.handle(Tick(), now=1.5) == [start(0, 0, cores=1.0)]
    assert s.next_wakeup() is None
    s.handle(BatchFinished(0), now=1.6)
    assert s.handle(arrived(1, 2.0, 9.0), now=2.0) == []
    assert s.handle(arrived(2, 2.1, 9.0, group=1), now=2.1) == []
    assert s.handle(arrived(3, 2.1, 9.0), now=2.1) == []
    assert s.handle(arrived(4, 2.2, 9.0), now=2.2) == [start(1, 1, 3, 4, cores=1.0)]
    s.handle(BatchFinished(0), now=2.3)
    assert s.next_wakeup() == 2.6
    assert s.handle(Drain(), now=2.4) == [start(2, 2, cores=1.0, group=1)]


def test_groups_never_mix_and_rows_count() -> None:
    """Tensors of different shapes have no common batch; a request of several rows is several rows."""
    s = StaticController(2.0, order="edf", max_batch_size=4)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    s.handle(arrived(1, 1.0, 2.0, rows=3), now=1.0)
    s.handle(arrived(2, 1.0, 3.0, group=1), now=1.0)
    s.handle(arrived(3, 1.0, 4.0, rows=2), now=1.0)
    assert s.handle(BatchFinished(0), now=1.1) == [start(1, 1, rows=3)]
    assert s.handle(BatchFinished(0), now=1.2) == [start(2, 2, group=1)]
    assert s.handle(BatchFinished(0), now=1.3) == [start(3, 3, rows=2)]


def test_cancelled_request_leaves_the_queue_and_a_running_one_does_not() -> None:
    """Its place is free at once; a batch that runs cannot be stopped."""
    s = StaticController(2.0, order="fifo", max_batch_size=1)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    s.handle(arrived(1, 1.0, 9.0), now=1.0)
    s.handle(arrived(2, 1.0, 9.0), now=1.0)
    assert s.handle(Cancelled(1), now=1.1) == []
    assert s.handle(Cancelled(0), now=1.1) == []
    assert s.handle(BatchFinished(0), now=1.2) == [start(1, 2)]


def test_full_queue_turns_away_what_comes() -> None:
    """As the core's own controller does, so that overload is a fair comparison."""
    s = StaticController(2.0, order="fifo", max_batch_size=1, max_queue=1)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    assert s.handle(arrived(1, 1.0, 9.0), now=1.0) == []
    assert s.handle(arrived(2, 1.0, 9.0), now=1.0) == [Reject(2, RejectReason.QUEUE_FULL)]
    assert s.handle(BatchFinished(0), now=1.1) == [start(1, 1)]
    assert s.handle(arrived(3, 1.1, 9.0), now=1.1) == []


def test_it_is_a_controller_to_a_shell() -> None:
    """The live scheduler and the simulator ask for no more than this protocol."""
    controller: ControllerProtocol = StaticController(3.0, order="edf", max_batch_size=4, lanes=3, max_queue=9)
    assert (controller.max_lanes, controller.max_batch_size, controller.max_queue) == (3, 4, 9)
    assert controller.idle
    assert controller.handle(Tick(), now=0.0) == [SetCpu(3.0)]


def test_abort_turns_away_what_waits_and_what_comes() -> None:
    """Every request gets an answer, whatever happens."""
    s = StaticController(2.0, order="fifo", max_batch_size=1)
    s.handle(arrived(0, 1.0, 9.0), now=1.0)
    s.handle(arrived(1, 1.0, 8.0), now=1.0)
    s.handle(arrived(2, 1.0, 7.0), now=1.0)
    closed = RejectReason.CLOSED
    assert s.handle(Abort(), now=1.1) == [Reject(1, closed), Reject(2, closed)]
    assert s.handle(arrived(3, 1.2, 9.0), now=1.2) == [Reject(3, closed)]
    assert s.handle(BatchFinished(0), now=1.3) == []
    assert s.idle


@pytest.mark.parametrize(
    "wrong",
    [
        {"cores": 0.0},
        {"order": "random"},
        {"max_batch_size": 0},
        {"window_s": -1.0},
        {"lanes": 0},
        {"batching": "some"},
        {"latency": None, "batching": "adaptive"},
        {"max_queue": 0},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """Named in the message."""
    arguments = {"cores": 1.0, "order": "fifo", "max_batch_size": 1, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StaticController(**arguments)  # type: ignore[arg-type]


def test_impossible_events_are_refused() -> None:
    """A shell that loses count must be found out, not followed."""
    s = StaticController(1.0, order="fifo", max_batch_size=2)
    with pytest.raises(ValueError, match="lane 0"):
        s.handle(BatchFinished(0), now=1.0)
    with pytest.raises(ValueError, match="rows"):
        s.handle(arrived(0, 1.0, 2.0, rows=3), now=1.0)
