"""The controller as a state machine: every transition under random interleavings, and the decisions one by one."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.latency import LatencyModel
from sponge.core.settings import Late, Settings
from sponge.core.solver import Solver
from sponge.core.values import Batch, RejectReason, Request

MODEL = LatencyModel(0.08, 0.0, 0.01, 0.01)
"""A lone request takes 100 ms on one core, 60 ms on two, 40 ms on four."""


def solver(**changes: object) -> Solver:
    arguments: dict[str, object] = {"max_cores": 4, "max_batch_size": 8, "max_lanes": 4}
    return Solver(MODEL, **{**arguments, **changes})  # type: ignore[arg-type]


def request(request_id: int, deadline: float, arrived_at: float = 0.0, **more: int) -> Request:
    return Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline, **more)


def started(actions: list[Action]) -> list[Batch]:
    return [action.batch for action in actions if isinstance(action, StartBatch)]


class Machine(RuleBasedStateMachine):
    """Any interleaving of events keeps the invariants, and every request leaves exactly once."""

    ids = Bundle("ids")

    @initialize(
        late=st.sampled_from(Late),
        lanes=st.integers(1, 4),
        cores=st.sampled_from([1.0, 1.5, 4.0]),
        step=st.sampled_from([0.5, 1.0, None]),
        queue=st.integers(1, 12),
        hold=st.booleans(),
        linger_s=st.sampled_from([0.0, 0.001, 0.2]),
        resize_delay_s=st.sampled_from([0.0, 0.0, 0.05]),
    )
    def start(
        self,
        late: Late,
        lanes: int,
        cores: float,
        step: float | None,
        queue: int,
        hold: bool,
        linger_s: float,
        resize_delay_s: float,
    ) -> None:
        self.solver = solver(max_cores=cores, max_lanes=lanes, core_step=step)
        self.settings = Settings(
            late=late, max_queue=queue, hold=hold, linger_s=linger_s, resize_delay_s=resize_delay_s
        )
        self.controller = Controller(self.solver, self.settings)
        self.log: list[tuple[Event, float, list[Action]]] = []
        self.now = 100.0
        self.next_id = 0
        self.deadlines: dict[int, float] = {}
        self.rows: dict[int, int] = {}
        self.groups: dict[int, int] = {}
        self.outcome: dict[int, str] = {}
        self.running: dict[int, Batch] = {}
        self.unanswered: list[float] = []
        self.cores = 0.0

    def send(self, event: Event) -> list[Action]:
        actions = self.controller.handle(event, now=self.now)
        self.log.append((event, self.now, actions))
        for action in actions:
            if isinstance(action, StartBatch):
                batch = action.batch
                assert batch.lane not in self.running, "the lane is busy"
                assert batch.rows == sum(self.rows[i] for i in batch.request_ids) <= self.solver.max_batch_size
                assert {self.groups[i] for i in batch.request_ids} == {batch.group}
                assert batch.threads == math.ceil(batch.cores) or batch.cores < 1.5
                assert batch.expected_s > 0
                for request_id in batch.request_ids:
                    self.leave(request_id, "started")
                self.running[batch.lane] = batch
            elif isinstance(action, Reject):
                self.leave(action.request_id, action.reason.value)
            elif isinstance(action, SetCpu):
                assert action.cores > 0
                assert action.cores != self.cores, "a resize to the same size"
                self.cores = action.cores
                self.unanswered.append(action.cores)
        return actions

    def leave(self, request_id: int, how: str) -> None:
        assert request_id in self.deadlines, "never arrived"
        assert request_id not in self.outcome, f"left twice: {self.outcome.get(request_id)} and {how}"
        self.outcome[request_id] = how

    @rule(
        target=ids,
        budget_s=st.floats(-1, 3) | st.just(math.inf),
        rows=st.integers(1, 8),
        group=st.integers(0, 2),
    )
    def arrive(self, budget_s: float, rows: int, group: int) -> int:
        request_id, self.next_id = self.next_id, self.next_id + 1
        self.deadlines[request_id], self.rows[request_id] = self.now + budget_s, rows
        self.groups[request_id] = group
        self.send(Arrived(request(request_id, self.now + budget_s, self.now, rows=rows, group=group)))
        return request_id

    @rule(request_id=ids)
    def cancel(self, request_id: int) -> None:
        waiting = request_id not in self.outcome
        actions = self.send(Cancelled(request_id))
        if waiting:
            self.leave(request_id, "cancelled")
        assert not any(isinstance(a, Reject) and a.request_id == request_id for a in actions)

    @rule(seconds=st.floats(0, 0.5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.send(Tick())

    @rule()
    def wake_up(self) -> None:
        wakeup = self.controller.next_wakeup()
        if wakeup is not None:
            self.now = max(self.now, wakeup)
            self.send(Tick())
            again = self.controller.next_wakeup()
            assert again is None or again > self.now, "a tick must move things on"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.booleans(), service_s=st.none() | st.floats(0.001, 2))
    def finish(self, data: st.DataObject, ok: bool, service_s: float | None) -> None:
        lane = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[lane]
        self.send(BatchFinished(lane, ok, service_s))

    @precondition(lambda self: self.unanswered)
    @rule(share=st.sampled_from([1.0, 1.0, 0.5, 0.0, 3.0]))
    def apply(self, share: float) -> None:
        self.send(CpuApplied(self.unanswered.pop(0) * share))

    @rule(cores=st.sampled_from([0.0, 0.1, 1.0, 100.0]))
    def find_another_allocation(self, cores: float) -> None:
        """Somebody else has changed it; nobody asked."""
        self.send(CpuApplied(cores))

    @rule(seconds=st.sampled_from([-3600.0, -0.1]))
    def read_a_clock_that_steps_back(self, seconds: float) -> None:
        """For one event; it counts as standing still."""
        right, self.now = self.now, self.now + seconds
        self.send(Tick())
        self.now = right

    @rule()
    def sleep_for_an_hour(self) -> None:
        """The process was suspended: whatever has a deadline is overdue."""
        self.now += 3600.0
        self.send(Tick())

    @rule()
    def drain(self) -> None:
        self.send(Drain())

    @precondition(lambda self: self.next_id > 5)
    @rule()
    def abort(self) -> None:
        self.send(Abort())

    @invariant()
    def accounts_balance(self) -> None:
        if not hasattr(self, "controller"):
            return
        self.controller.check()
        waiting = [i for i in self.deadlines if i not in self.outcome]
        assert self.controller.queue_length == len(waiting)
        assert self.controller.idle == (not waiting and not self.running)
        if self.settings.late is Late.SERVE:
            assert "deadline" not in self.outcome.values()
        allocated = sum(batch.cores for batch in self.running.values())
        if self.cores:
            needed = allocated or self.settings.idle_cores
            assert self.cores >= needed - 1e-9, "a batch runs on cores that were not asked for"
            if self.settings.linger_s == self.settings.resize_delay_s == 0.0:
                assert self.cores == pytest.approx(needed)

    def teardown(self) -> None:
        if not hasattr(self, "controller"):
            return
        # Whatever happened before: draining ends with every request served or turned away ...
        self.send(Drain())
        while self.running:
            self.now += 0.01
            lane = min(self.running)
            del self.running[lane]
            self.send(BatchFinished(lane, True, 0.1))
        assert self.controller.idle
        assert set(self.outcome) == set(self.deadlines)
        # ... and the same events at the same instants give the same actions.
        again = Controller(self.solver, self.settings)
        for event, now, actions in self.log:
            assert again.handle(event, now=now) == actions


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_lone_request_starts_at_once_on_the_fewest_cores() -> None:
    """Nobody waits for a batch to fill that nothing suggests will fill."""
    controller = Controller(solver())
    actions = controller.handle(Arrived(request(0, deadline=1.0)), now=0.0)
    assert actions == [
        StartBatch(
            Batch(
                batch_id=0,
                request_ids=(0,),
                rows=1,
                group=0,
                lane=0,
                cores=1.0,
                threads=1,
                expected_s=MODEL.latency_s(1, 1.0),
            )
        ),
        SetCpu(1.0),
    ]


@pytest.mark.parametrize(("budget_s", "cores"), [(1.0, 1.0), (0.08, 2.0), (0.045, 4.0)])
def test_less_time_left_takes_more_cores(budget_s: float, cores: float) -> None:
    """The core of it: the allocation follows the request's own budget."""
    controller = Controller(solver())
    (batch,) = started(controller.handle(Arrived(request(0, deadline=budget_s)), now=0.0))
    assert batch.cores == cores


def test_hopeless_request_is_turned_away_at_once() -> None:
    """40 ms on all four cores do not fit into 30: better to know now."""
    controller = Controller(solver())
    actions = controller.handle(Arrived(request(0, deadline=0.03)), now=0.0)
    assert Reject(0, RejectReason.DEADLINE) in actions
    assert not started(actions)


def test_waiting_request_is_turned_away_when_it_becomes_hopeless() -> None:
    """Even while every lane is busy; the controller asks to be woken for it."""
    controller = Controller(solver(max_lanes=1, max_cores=1))
    controller.handle(Arrived(request(0, deadline=1.0)), now=0.0)
    controller.handle(Arrived(request(1, deadline=0.15)), now=0.0)
    wakeup = controller.next_wakeup()
    assert wakeup == pytest.approx(0.15 - 0.1 - controller.settings.guard_s)
    assert controller.handle(Tick(), now=wakeup) == [Reject(1, RejectReason.DEADLINE)]


def test_late_request_is_served_last_if_asked_for() -> None:
    """Best effort: after everything that can still be saved, and never at its expense."""
    controller = Controller(solver(max_lanes=1, max_cores=1, max_batch_size=1), Settings(late=Late.SERVE))
    controller.handle(Arrived(request(0, deadline=1.0)), now=0.0)
    controller.handle(Arrived(request(1, deadline=0.01)), now=0.0)
    controller.handle(Arrived(request(2, deadline=0.5)), now=0.0)
    assert started(controller.handle(BatchFinished(0), now=0.1))[0].request_ids == (2,)
    assert started(controller.handle(BatchFinished(0), now=0.2))[0].request_ids == (1,)


def test_earliest_deadline_goes_first() -> None:
    """Whatever the order of arrival."""
    controller = Controller(solver(max_lanes=1, max_batch_size=1, max_cores=1))
    controller.handle(Arrived(request(0, deadline=9.0)), now=0.0)
    for request_id, deadline in [(1, 3.0), (2, 1.0), (3, 2.0)]:
        controller.handle(Arrived(request(request_id, deadline)), now=0.01)
    order = [started(controller.handle(BatchFinished(0), now=0.1 * i))[0].request_ids for i in (1, 2, 3)]
    assert order == [(2,), (3,), (1,)]


def test_narrow_lanes_are_used_before_wide_ones() -> None:
    """Four requests with time enough: four lanes of one core do them for least core-seconds."""
    controller = Controller(solver(max_batch_size=1))
    batches = []
    for request_id in range(4):
        batches += started(controller.handle(Arrived(request(request_id, deadline=0.5)), now=0.0))
    assert [(batch.lane, batch.cores) for batch in batches] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]


def test_cores_are_never_overcommitted() -> None:
    """A tight request must make do with what the running lanes leave."""
    controller = Controller(solver(max_batch_size=1))
    for request_id in range(3):
        controller.handle(Arrived(request(request_id, deadline=0.5)), now=0.0)
    (batch,) = started(controller.handle(Arrived(request(3, deadline=0.11)), now=0.0))
    assert batch.cores == 1.0


def test_waits_for_cores_that_a_tight_request_needs() -> None:
    """One core would be too slow for it, four will do once the other lane is done."""
    controller = Controller(solver(max_batch_size=1, max_cores=4))
    controller.handle(Arrived(request(0, deadline=0.08)), now=0.0)  # takes two cores, 50 ms
    controller.handle(Arrived(request(1, deadline=0.5)), now=0.0)
    actions = controller.handle(Arrived(request(2, deadline=0.1)), now=0.0)  # one core is left; 100 ms
    assert not started(actions)
    (batch,) = started(controller.handle(BatchFinished(0), now=0.05))
    assert batch.request_ids == (2,)
    assert batch.cores >= 3.0


def test_batch_waits_for_company_only_under_load() -> None:
    """With a per-batch cost it pays to wait, if the next is due sooner than a batch takes; else not."""
    model = LatencyModel(0.001, 0.1, 0.0, 0.0)  # 100 ms a batch, whatever its size
    for gap_s, holds in [(0.05, True), (1.0, False)]:
        controller = Controller(Solver(model, max_cores=1, max_batch_size=4))
        waited = 0
        for request_id in range(30):
            now = request_id * gap_s
            for batch in started(controller.handle(Arrived(request(request_id, now + 5.0)), now=now)):
                controller.handle(BatchFinished(batch.lane), now=now)
            waited += controller.queue_length
        assert (waited > 0) == holds


def test_drain_ends_the_waiting_for_company() -> None:
    """Nobody will come any more."""
    model = LatencyModel(0.001, 0.1, 0.0, 0.0)
    controller = Controller(Solver(model, max_cores=1, max_batch_size=4))
    now = 0.0
    for request_id in range(30):
        for batch in started(controller.handle(Arrived(request(request_id, now + 5.0)), now=now)):
            controller.handle(BatchFinished(batch.lane), now=now)
        now += 0.05
        if controller.queue_length == 2:
            break
    assert started(controller.handle(Drain(), now=now))[0].rows == 2


def test_full_queue_turns_the_newcomer_away() -> None:
    """Bounded memory; the client is told at once."""
    controller = Controller(solver(max_lanes=1, max_cores=1), Settings(max_queue=2))
    for request_id in range(3):
        controller.handle(Arrived(request(request_id, deadline=9.0)), now=0.0)
    assert controller.handle(Arrived(request(3, deadline=0.5)), now=0.0) == [Reject(3, RejectReason.QUEUE_FULL)]


def test_drift_makes_the_controller_take_more_cores() -> None:
    """The model has become twice as slow: the same budget now needs more."""
    controller = Controller(solver(max_batch_size=1))
    assert started(controller.handle(Arrived(request(0, deadline=0.15)), now=0.0))[0].cores == 1.0
    controller.handle(BatchFinished(0, True, 0.2), now=0.2)
    for i in range(1, 10):
        now = float(i)
        (batch,) = started(controller.handle(Arrived(request(i, now + 9.0)), now=now))
        controller.handle(BatchFinished(batch.lane, True, 0.2), now=now + 0.2)
    assert controller.drift_scale(0) == pytest.approx(2.0)
    (batch,) = started(controller.handle(Arrived(request(99, 20.15)), now=20.0))
    assert batch.cores == 2.0
    assert batch.expected_s == pytest.approx(2 * 0.06)


def test_slow_moment_does_not_shut_out_what_comes_after() -> None:
    """A dozen batches at ten times the time make every request look lost; turned away, they must not stay so for
    ever."""
    controller = Controller(solver(max_batch_size=1, max_lanes=1))
    served = []
    for i in range(200):
        now = float(i)
        batches = started(controller.handle(Arrived(request(i, now + 0.3)), now=now))
        served.append(bool(batches))
        if batches:
            service_s = 1.0 if i in range(50, 62) else 0.1
            controller.handle(BatchFinished(0, True, service_s), now=now + service_s * 0.9)
    assert all(served[:50])
    assert not all(served[62:66]), "believed at first"
    assert all(served[130:]), "and recovered"


def test_tail_longer_than_every_budget_shuts_nobody_out() -> None:
    """One batch in a hundred takes ten times as long, and no budget is that long: while nothing runs, who will most
    likely be in time is served, and the batches that run show what to believe; beside another, nobody is gambled on."""
    typical = LatencyModel(gamma_s=0.1, epsilon_s=0.0, delta_s=0.0, eta_s=0.0)
    tail = attrs.evolve(typical, gamma_s=1.0, typical=typical)
    controller = Controller(Solver(tail, max_cores=2, max_batch_size=1, max_lanes=2))
    (batch,) = started(controller.handle(Arrived(request(0, deadline=0.3)), now=0.0))
    assert controller.handle(Arrived(request(1, deadline=0.31)), now=0.01) == [Reject(1, RejectReason.DEADLINE)]
    controller.handle(BatchFinished(batch.lane, True, 0.05), now=0.05)
    actions = controller.handle(Arrived(request(2, deadline=1.04)), now=1.0)
    assert Reject(2, RejectReason.DEADLINE) in actions, "not even typically in time"
    for i in range(3, 80):
        (batch,) = started(controller.handle(Arrived(request(i, deadline=i + 0.3)), now=float(i)))
        controller.handle(BatchFinished(batch.lane, True, 0.05), now=i + 0.05)
        controller.check()
    pair = [*controller.handle(Arrived(request(100, 100.3)), now=100.0)]
    pair += controller.handle(Arrived(request(101, 100.31)), now=100.01)
    assert started(pair)
    assert not any(isinstance(action, Reject) for action in pair), "the tail is known by now"


def test_request_of_many_rows_gets_the_cores_that_all_of_them_need() -> None:
    """It is not divided: what would do for its first row does not do for it."""
    controller = Controller(solver())
    (batch,) = started(controller.handle(Arrived(request(0, deadline=0.35, rows=8)), now=0.0))
    assert batch.rows == 8
    assert MODEL.latency_s(8, batch.cores) <= 0.35


def test_reserve_is_given_back_when_nobody_comes_any_more() -> None:
    """Without a further event: the controller asks to be woken for it."""
    controller = Controller(solver(max_batch_size=1), Settings(resize_delay_s=0.05))
    now = 0.0
    cores = 0.0
    for i in range(400):
        now = i * 0.01
        actions = controller.handle(Arrived(request(i, now + 0.6)), now=now)
        for entry in list(controller._lanes):
            actions += controller.handle(BatchFinished(entry.batch.lane), now=now)
        actions += controller.handle(CpuApplied(4.0), now=now)
        for action in actions:
            cores = action.cores if isinstance(action, SetCpu) else cores
    controller.handle(Drain(), now=now)
    assert cores > 1.0
    while (wakeup := controller.next_wakeup()) is not None:
        assert wakeup > now
        now = wakeup
        for action in controller.handle(Tick(), now=now):
            cores = action.cores if isinstance(action, SetCpu) else cores
        for entry in list(controller._lanes):
            controller.handle(BatchFinished(entry.batch.lane), now=now)
        assert now < 600.0
    assert cores == controller.settings.idle_cores


def test_overload_does_not_widen_lanes() -> None:
    """Twice what the cores can serve: those who are served are served cheaply, or ever fewer would be."""
    controller = Controller(solver(max_batch_size=1))
    running: list[tuple[float, Batch]] = []
    widths = []
    for i in range(800):  # 80 a second, and four lanes of 100 ms serve 40
        now = i / 80
        while running and running[0][0] <= now:
            ends, batch = running.pop(0)
            actions = controller.handle(BatchFinished(batch.lane), now=ends)
            running += [(ends + MODEL.latency_s(1, batch.cores), batch) for batch in started(actions)]
        actions = controller.handle(Arrived(request(i, now + 0.5)), now=now)
        running += [(now + MODEL.latency_s(1, batch.cores), batch) for batch in started(actions)]
        running.sort(key=lambda entry: (entry[0], entry[1].lane))
        widths += [batch.cores for _, batch in running if i > 400]
    assert set(widths) == {1.0}


def test_badly_measured_tail_does_not_decide_what_is_cheap() -> None:
    """A neighbour that disturbed profiling doubles the tail of two lanes; they stay the cheap way to serve a burst."""
    calm = LatencyModel(0.08, 0.0, 0.01, 0.01)
    noisy = attrs.evolve(calm, interference=1.5, typical=calm)
    controller = Controller(Solver(noisy, max_cores=2, max_batch_size=1, max_lanes=2))
    batches = []
    for i in range(6):
        batches += started(controller.handle(Arrived(request(i, deadline=0.45)), now=0.0))
    assert [batch.cores for batch in batches] == [1.0, 1.0]


def test_drift_can_be_switched_off() -> None:
    """For comparison, and for those who trust their profile."""
    controller = Controller(solver(), Settings(follow_drift=False))
    for i in range(20):
        (batch,) = started(controller.handle(Arrived(request(i, i + 0.9)), now=float(i)))
        controller.handle(BatchFinished(batch.lane, True, 0.4), now=i + 0.4)
    assert controller.drift_scale(0) == 1.0


def test_failed_batches_teach_nothing() -> None:
    """A model that raises after a millisecond has not become fast."""
    controller = Controller(solver())
    for i in range(100):
        (batch,) = started(controller.handle(Arrived(request(i, i + 0.9)), now=float(i)))
        controller.handle(BatchFinished(batch.lane, False), now=i + 0.001)
    assert controller.drift_scale(0) == 1.0


def test_allocation_that_fell_short_is_planned_with() -> None:
    """The container's own quota may be lower than ours: plan with what there is, and ask again later."""
    controller = Controller(solver(max_batch_size=1))
    controller.handle(Arrived(request(0, deadline=0.045)), now=0.0)  # four cores
    controller.handle(CpuApplied(1.5), now=0.0)
    controller.handle(BatchFinished(0), now=0.04)
    (batch,) = started(controller.handle(Arrived(request(1, deadline=0.15)), now=0.05))
    assert batch.cores == 1.0
    controller.handle(BatchFinished(0), now=0.15)
    (batch,) = started(controller.handle(Arrived(request(2, deadline=2.045)), now=2.0))
    assert batch.cores == 4.0


def test_nothing_is_started_after_abort() -> None:
    """Everything that waits, and everything that still arrives, is told that the service is closed."""
    controller = Controller(solver(max_lanes=1, max_cores=1))
    for request_id in range(3):
        controller.handle(Arrived(request(request_id, deadline=9.0)), now=0.0)
    assert controller.handle(Abort(), now=0.0) == [
        Reject(1, RejectReason.CLOSED),
        Reject(2, RejectReason.CLOSED),
    ]
    assert controller.handle(Arrived(request(3, 9.0)), now=0.0) == [Reject(3, RejectReason.CLOSED)]
    assert controller.handle(BatchFinished(0), now=0.1) == []
    assert controller.idle


def test_idle_service_gives_its_cores_back() -> None:
    """The allocation falls to the floor when the last batch has been done for a moment."""
    controller = Controller(solver(), Settings(idle_cores=0.25, linger_s=0.001))
    controller.handle(Arrived(request(0, deadline=1.0)), now=0.0)
    assert controller.handle(BatchFinished(0), now=0.1) == []
    assert controller.next_wakeup() == pytest.approx(0.101)
    assert controller.handle(Tick(), now=0.1005) == []
    assert controller.handle(Tick(), now=controller.next_wakeup() or 0.0) == [SetCpu(0.25)]
    assert controller.next_wakeup() is None


def test_slow_resize_is_asked_for_ahead_and_waited_for() -> None:
    """A pod's resize takes a while: what was needed lately stays allocated, and nothing starts on cores to come."""
    controller = Controller(solver(max_batch_size=1), Settings(resize_delay_s=1.0, linger_s=0.0))
    assert controller.handle(Tick(), now=-20.0) == [SetCpu(4.0)], "nothing is known yet: all cores"
    controller.handle(CpuApplied(1.0), now=0.0)
    actions: list[Action] = []
    for i in range(8):
        actions += controller.handle(Arrived(request(i, deadline=0.45)), now=0.0)
    assert len(started(actions)) == 1, "one core is in force"
    look_at = controller.next_wakeup()
    assert look_at is not None
    assert look_at <= 0.05, "a burst is seen whole soon after its first request"
    actions = controller.handle(Tick(), now=look_at)
    assert SetCpu(3.0) in actions, "three lanes of 100 ms do seven requests in 400 ms"
    assert len(started(controller.handle(CpuApplied(3.0), now=0.06))) == 2
    for lane in (0, 1, 2):
        controller.handle(BatchFinished(lane), now=0.16)
    for lane in (0, 1, 2):
        controller.handle(BatchFinished(lane), now=0.26)
    for lane in (0, 1):
        actions = controller.handle(BatchFinished(lane), now=0.36)
    assert controller.idle
    assert actions == [], "kept in reserve"
    wakeup = controller.next_wakeup()
    while wakeup is not None:
        actions = controller.handle(Tick(), now=wakeup)
        wakeup = controller.next_wakeup()
    assert any(isinstance(action, SetCpu) and action.cores < 3.0 for action in actions), "given back in the end"


def test_requests_in_close_succession_resize_nothing() -> None:
    """Giving a core back and taking it again for each of them would cost more than it saves."""
    controller = Controller(solver(max_batch_size=1), Settings(linger_s=0.001))
    resizes = []
    for i in range(10):
        now = 0.1005 * i
        actions = controller.handle(Arrived(request(i, deadline=now + 1.0)), now=now)
        actions += controller.handle(BatchFinished(0), now=now + 0.1)
        resizes += [action for action in actions if isinstance(action, SetCpu)]
    assert resizes == [SetCpu(1.0)]


def test_clock_that_steps_back_counts_as_standing_still() -> None:
    """Nothing may depend on a clock that is not monotonic, and nothing may break by it."""
    controller = Controller(solver(max_lanes=1, max_cores=1))
    controller.handle(Arrived(request(0, deadline=10.0)), now=9.0)
    controller.handle(Arrived(request(1, deadline=10.0)), now=3.0)
    controller.check()


def test_errors_name_what_was_wrong() -> None:
    """A shell that breaks the contract is told how."""
    controller = Controller(solver())
    with pytest.raises(ValueError, match="lane 2"):
        controller.handle(BatchFinished(2), now=0.0)
    with pytest.raises(ValueError, match="max_batch_size=8, got 9"):
        controller.handle(Arrived(request(0, 1.0, rows=9)), now=0.0)
    with pytest.raises(TypeError, match="event"):
        controller.handle("arrived", now=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_queue"):
        Settings(max_queue=0)
    with pytest.raises(ValueError, match="idle_cores"):
        attrs.evolve(Settings(), idle_cores=-1.0)


def test_burst_is_seen_whole_before_its_first_request_starts() -> None:
    """Eight at once on one lane: one batch in time, not one request by itself and seven too late."""
    only_lane = solver(max_lanes=1, max_cores=2)
    together, one_by_one = Controller(only_lane), Controller(only_lane)
    first: list[Action] = []
    for i in range(8):
        first += together.handle(Arrived(request(i, deadline=0.5), more=i < 7), now=0.0)
        one_by_one.handle(Arrived(request(i, deadline=0.5)), now=0.0)
        together.check()
    (batch,) = started(first)
    assert batch.rows == 8
    assert together.handle(BatchFinished(0), now=batch.expected_s) == []
    assert batch.expected_s <= 0.5
    assert one_by_one.queue_length == 7


def test_hopeless_head_does_not_hold_back_those_behind_it() -> None:
    """It needs both cores before one of them is free: nothing is won by waiting, and the next one would be lost too."""
    slow = LatencyModel(0.8, 0.0, 0.1, 0.1)  # 1 s on one core, 0.6 s on two
    two_cores = Solver(slow, max_cores=2, max_batch_size=1, max_lanes=2)
    controller = Controller(two_cores, Settings(hold=False, rate_time_constant_s=1e3))
    controller.handle(Arrived(request(0, deadline=100.0)), now=0.0)
    hopeless = controller.handle(Arrived(request(1, deadline=0.95)), now=0.0)
    assert Reject(1, RejectReason.DEADLINE) in hopeless
    (batch,) = started(controller.handle(Arrived(request(2, deadline=1.3)), now=0.0))
    assert batch.request_ids == (2,)


def test_head_that_fits_when_a_lane_is_free_is_waited_for() -> None:
    """The same, due a little later: both cores are free in time, and the head is the more urgent one."""
    slow = LatencyModel(0.8, 0.0, 0.1, 0.1)
    two_cores = Solver(slow, max_cores=2, max_batch_size=1, max_lanes=2)
    controller = Controller(two_cores, Settings(hold=False, rate_time_constant_s=1e3))
    controller.handle(Arrived(request(0, deadline=100.0)), now=0.0)
    assert controller.handle(Arrived(request(1, deadline=1.61)), now=0.62) == []
    (batch,) = started(controller.handle(BatchFinished(0, True, 1.0), now=1.0))
    assert (batch.request_ids, batch.cores) == ((1,), 2.0)


def test_one_is_not_made_sure_of_at_the_cost_of_others() -> None:
    """More than can be saved, and the tail fits on two cores only: one lane each, as it usually takes, saves more."""
    typical = LatencyModel(gamma_s=0.08, epsilon_s=0.0, delta_s=0.0, eta_s=0.02)  # 100 ms on one core, 60 ms on two
    tail = attrs.evolve(typical, gamma_s=0.12, eta_s=0.03, typical=typical)
    controller = Controller(Solver(tail, max_cores=2, max_batch_size=1, max_lanes=2), Settings(hold=False))
    actions: list[Action] = []
    for i in range(6):
        actions += controller.handle(Arrived(request(i, deadline=0.12), more=i < 5), now=0.0)
    assert [batch.cores for batch in started(actions)] == [1.0, 1.0]
