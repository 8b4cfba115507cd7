"""The contract that every baseline keeps, under any interleaving of events."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.latency import LatencyModel
from sponge.core.values import Batch, RejectReason, Request, intra_op_threads
from sponge.sim.baselines import (
    HorizontalController,
    OnlineFitBatcher,
    PublishedController,
    QueueTimeoutBatcher,
    RecommenderController,
    StaticController,
)
from sponge.sim.baselines.base import Baseline

MODEL = LatencyModel(0.08, 0.0, 0.01, 0.01)
ROWS = 3

BASELINES: dict[str, Callable[[], Baseline]] = {
    "plain": lambda: Baseline(initial_cores=2.0, order="lifo", max_batch_size=ROWS, max_lanes=2, max_queue=5),
    "static fifo": lambda: StaticController(
        2.0, order="fifo", max_batch_size=ROWS, window_s=0.3, lanes=2, drop_late=True, latency=MODEL
    ),
    "static edf": lambda: StaticController(2.0, order="edf", max_batch_size=ROWS, max_queue=3),
    "static adaptive": lambda: StaticController(
        3.0, order="edf", max_batch_size=ROWS, batching="adaptive", window_s=0.1, drop_late=True, latency=MODEL
    ),
    "window": lambda: QueueTimeoutBatcher(3.0, max_batch_size=ROWS, window_s=0.2, lanes=3, latency=MODEL),
    "published": lambda: PublishedController(MODEL, max_cores=6, max_batch_size=ROWS, partial_wait_s=0.4),
    "published fifo": lambda: PublishedController(
        MODEL, max_cores=6, max_batch_size=ROWS, order="fifo", arrival_rate_rps=5, safety=1.0, period_s=0.7
    ),
    "horizontal": lambda: HorizontalController(
        MODEL, max_replicas=4, max_batch_size=ROWS, scale_down_after_s=0.0, initial_replicas=2
    ),
    "horizontal stable": lambda: HorizontalController(
        MODEL, max_replicas=3, max_batch_size=ROWS, scale_down_after_s=2.5, slo_s=0.4, max_queue=6
    ),
    "recommender": lambda: RecommenderController(
        2.0, max_cores=4.0, max_batch_size=ROWS, sample_s=0.5, update_s=1.0, half_life_s=2.0, latency=MODEL
    ),
    "online fit": lambda: OnlineFitBatcher(2.0, max_batch_size=ROWS, max_latency_s=0.8, latency=MODEL),
    "online fit fifo": lambda: OnlineFitBatcher(2.0, max_batch_size=ROWS, lanes=2, order="fifo", max_queue=9),
}


class BaselineMachine(RuleBasedStateMachine):
    """A shell with its own books: every request leaves exactly once, every lane and core is used once at a time.

    Allocations are carried out when `apply` says so, in order; less than before is in force at once for replicas, which
    are merely not used any more.
    """

    ids = Bundle("ids")

    def __init__(self, make: Callable[[], Baseline]) -> None:
        super().__init__()
        self.make = make
        self.controller = make()
        self.replicas = isinstance(self.controller, HorizontalController)
        self.log: list[tuple[Event, float, list[Action]]] = []
        self.now = 100.0
        self.requests: dict[int, Request] = {}
        self.outcome: dict[int, str] = {}
        self.running: dict[int, Batch] = {}
        self.asked: float | None = None
        self.in_force: float | None = None
        self.unanswered: list[float] = []
        self.aborted = False

    def send(self, event: Event) -> list[Action]:
        actions = self.controller.handle(event, now=self.now)
        self.log.append((event, self.now, actions))
        for action in actions:
            if isinstance(action, StartBatch):
                self.start(action.batch)
            elif isinstance(action, Reject):
                assert (action.reason is RejectReason.CLOSED) == self.aborted
                self.leave(action.request_id, action.reason.value)
            else:
                self.ask(action)
        return actions

    def ask(self, action: SetCpu) -> None:
        assert action.cores > 0
        assert action.cores != self.asked, "a resize to the same size"
        self.asked = action.cores
        self.unanswered.append(action.cores)
        if self.replicas:
            self.in_force = min(self.in_force or 0.0, action.cores)
            # Replicas given back while they start do not come, not even if as many are asked for again meanwhile.
            self.unanswered = [min(cores, action.cores) for cores in self.unanswered]

    def start(self, batch: Batch) -> None:
        assert batch.lane not in self.running, "the lane is busy"
        assert 0 <= batch.lane < self.controller.max_lanes
        requests = [self.requests[request_id] for request_id in batch.request_ids]
        assert batch.rows == sum(request.rows for request in requests) <= self.controller.max_batch_size
        assert {request.group for request in requests} == {batch.group}
        assert batch.threads == intra_op_threads(batch.cores)
        assert batch.expected_s > 0 or self.controller.latency is None
        for request_id in batch.request_ids:
            self.leave(request_id, "started")
        self.running[batch.lane] = batch
        if not self.replicas:
            in_force = self.asked if self.in_force is None else self.in_force
            assert in_force is not None
            assert batch.cores == pytest.approx(in_force / self.controller.max_lanes)

    def leave(self, request_id: int, how: str) -> None:
        assert request_id in self.requests, "never arrived"
        assert request_id not in self.outcome, f"left twice: {self.outcome.get(request_id)} and {how}"
        self.outcome[request_id] = how

    @rule(
        target=ids,
        wait=st.floats(0.0, 0.3),
        budget_s=st.floats(-0.2, 1.5) | st.just(math.inf),
        rows=st.integers(1, ROWS),
        group=st.integers(0, 1),
    )
    def arrive(self, wait: float, budget_s: float, rows: int, group: int) -> int:
        self.now += wait
        request_id = len(self.requests)
        request = Request(
            request_id=request_id, arrived_at=self.now, deadline=self.now + budget_s, rows=rows, group=group
        )
        self.requests[request_id] = request
        self.send(Arrived(request))
        return request_id

    @rule(request_id=ids)
    def cancel(self, request_id: int) -> None:
        waiting = request_id not in self.outcome
        if waiting:
            self.leave(request_id, "cancelled")
        self.send(Cancelled(request_id))

    @rule(seconds=st.floats(0.0, 3.0))
    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.send(Tick())

    @precondition(lambda self: self.controller.next_wakeup() is not None)
    @rule()
    def wake_up(self) -> None:
        wakeup = self.controller.next_wakeup()
        assert wakeup is not None
        self.now = max(self.now, wakeup)
        self.send(Tick())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), wait=st.floats(0.0, 0.4), ok=st.booleans(), measured=st.booleans())
    def finish(self, data: st.DataObject, wait: float, ok: bool, measured: bool) -> None:
        self.now += wait
        lane = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[lane]
        self.send(BatchFinished(lane, ok, 0.9 * wait if measured else None))

    @precondition(lambda self: self.unanswered)
    @rule(wait=st.floats(0.0, 1.0))
    def apply(self, wait: float) -> None:
        self.now += wait
        self.send(Tick())  # a period that ends at this instant, and may ask for more, comes before the answer
        cores = self.unanswered.pop(0)
        self.in_force = min(cores, self.asked or 0.0) if self.replicas else cores
        self.send(CpuApplied(cores))

    @precondition(lambda self: len(self.requests) > 5)
    @rule()
    def drain(self) -> None:
        self.send(Drain())

    @precondition(lambda self: len(self.requests) > 5)
    @rule()
    def abort(self) -> None:
        self.aborted = True
        self.send(Abort())

    @invariant()
    def books_agree(self) -> None:
        waiting = [request_id for request_id in self.requests if request_id not in self.outcome]
        assert self.controller.queue_length == len(waiting) <= self.controller.max_queue
        assert self.controller.idle == (not waiting and not self.running)
        if self.log and self.log[-1][1] == self.now:
            self.controller.check()
        if self.replicas:
            used = sum(batch.cores for batch in self.running.values())
            assert used <= (self.in_force or 0.0) + 1e-9, "a replica that is not there"
        if waiting and not self.running and not self.unanswered:
            assert self.controller.next_wakeup() is not None, "nobody will ever look at them"

    def teardown(self) -> None:
        # Whatever happened before: draining ends with every request served or turned away ...
        self.send(Drain())
        while self.running or self.unanswered:
            self.now += 0.01
            if self.unanswered:
                self.apply(0.0)
            if self.running:
                lane = min(self.running)
                del self.running[lane]
                self.send(BatchFinished(lane, True, 0.1))
        assert self.controller.idle
        assert self.outcome.keys() == self.requests.keys()
        # ... and the same events at the same instants give the same actions.
        again = self.make()
        for event, now, actions in self.log:
            assert again.handle(event, now=now) == actions


@pytest.mark.parametrize("name", BASELINES)
def test_contract_of_a_controller_is_kept(name: str) -> None:
    """The shells rely on it: a baseline that loses a request or uses a core twice would win unfairly."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: BaselineMachine(BASELINES[name]),
        settings=hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None),
    )
