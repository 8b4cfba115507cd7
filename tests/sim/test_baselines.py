"""Static allocation as a controller: the exact actions it takes."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.controller import ControllerProtocol
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Tick
from sponge.core.latency import LatencyModel
from sponge.core.values import Batch, RejectReason, Request
from sponge.sim.baselines import StaticController

LATENCY = LatencyModel(gamma_s=0.2, epsilon_s=0.0, delta_s=0.0, eta_s=0.0)


def arrived(request_id: int, at: float, deadline: float, *, rows: int = 1, group: int = 0) -> Arrived:
    """Shorten the making of an arrival."""
    return Arrived(Request(request_id=request_id, arrived_at=at, deadline=deadline, rows=rows, group=group))


def start(batch_id: int, *request_ids: int, lane: int = 0, cores: float = 2.0, **fields: float) -> StartBatch:
    """Shorten the making of a batch of single rows."""
    return StartBatch(
        Batch(
            batch_id=batch_id,
            request_ids=request_ids,
            rows=int(fields.get("rows", len(request_ids))),
            group=int(fields.get("group", 0)),
            lane=lane,
            cores=cores,
            threads=math.ceil(cores),
            expected_s=fields.get("expected_s", 0.0),
        )
    )


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
    [{"cores": 0.0}, {"order": "random"}, {"max_batch_size": 0}, {"window_s": -1.0}, {"lanes": 0}, {"max_queue": 0}],
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


class StaticMachine(RuleBasedStateMachine):
    """Any sequence of events: every request leaves exactly once, and no lane stands idle without a reason."""

    order: Literal["fifo", "edf"] = "edf"

    def __init__(self) -> None:
        super().__init__()
        self.controller = StaticController(
            2.0, order=self.order, max_batch_size=3, window_s=0.3, lanes=2, drop_late=True, latency=LATENCY
        )
        self.now = 0.0
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Batch] = {}
        self.arrivals = 0
        self.closed = False

    def follow(self, actions: list[Action]) -> None:
        """Carry actions out as a shell would, and check each."""
        for action in actions:
            if isinstance(action, StartBatch):
                batch = action.batch
                requests = [self.waiting.pop(request_id) for request_id in batch.request_ids]
                assert batch.lane not in self.running
                assert batch.rows == sum(request.rows for request in requests) <= 3
                assert {request.group for request in requests} == {batch.group}
                self.running[batch.lane] = batch
            elif isinstance(action, Reject):
                request = self.waiting.pop(action.request_id)
                assert (action.reason is RejectReason.CLOSED) == self.closed
                assert self.closed or request.deadline < self.now + 0.2 * request.rows + 1e-9
            else:
                assert action == SetCpu(2.0)

    @rule(wait=st.floats(0.0, 0.4), budget=st.floats(-0.1, 2.0), rows=st.integers(1, 3), group=st.integers(0, 1))
    def arrive(self, wait: float, budget: float, rows: int, group: int) -> None:
        self.now += wait
        request = Request(
            request_id=self.arrivals, arrived_at=self.now, deadline=self.now + budget, rows=rows, group=group
        )
        self.arrivals += 1
        self.waiting[request.request_id] = request
        self.follow(self.controller.handle(Arrived(request), now=self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), wait=st.floats(0.0, 0.4))
    def finish(self, data: st.DataObject, wait: float) -> None:
        lane = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[lane]
        self.now += wait
        self.follow(self.controller.handle(BatchFinished(lane), now=self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[request_id]
        self.follow(self.controller.handle(Cancelled(request_id), now=self.now))

    @precondition(lambda self: self.controller.next_wakeup() is not None)
    @rule()
    def wake(self) -> None:
        wakeup = self.controller.next_wakeup()
        assert wakeup is not None
        self.now = max(self.now, wakeup)
        self.follow(self.controller.handle(Tick(), now=self.now))

    @precondition(lambda self: not self.closed)
    @rule()
    def abort(self) -> None:
        self.closed = True
        self.follow(self.controller.handle(Abort(), now=self.now))
        assert not self.waiting

    @invariant()
    def nothing_waits_without_a_reason(self) -> None:
        assert self.controller.idle == (not self.waiting and not self.running)
        if self.waiting and len(self.running) < 2:
            wakeup = self.controller.next_wakeup()
            assert wakeup is not None
            assert wakeup > self.now


class FifoMachine(StaticMachine):
    """The same, first come first served."""

    order = "fifo"


TestStaticMachine = StaticMachine.TestCase
TestStaticMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFifoMachine = FifoMachine.TestCase
TestFifoMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
