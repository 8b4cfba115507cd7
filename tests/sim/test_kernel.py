"""The simulator by hand: small runs whose every instant can be worked out on paper, and what holds in any run."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sponge import Controller, LatencyModel, Run, Service, Settings, Solver, simulate
from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.events import Abort, Arrived, BatchFinished, CpuApplied, Drain, Event, Tick
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Batch, RejectReason
from sponge.sim.baselines import StaticController
from sponge.sim.run import Outcome
from sponge.workload import Workload

PARALLEL = LatencyModel(gamma_s=1.0, epsilon_s=0.0, delta_s=0.0, eta_s=0.0)
"""A request is one core-second of work."""
DETECTOR = LatencyModel(gamma_s=0.1404, epsilon_s=-0.0508, delta_s=0.0252, eta_s=0.0221)


def workload(*requests: tuple[float, float]) -> Workload:
    """Requests as (arrival, deadline)."""
    arrived_at_s, deadline_s = zip(*requests, strict=True) if requests else ((), ())
    return Workload(sent_at_s=arrived_at_s, arrived_at_s=arrived_at_s, deadline_s=deadline_s)


def bursts(seconds: int, per_second: int, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    sent = np.sort(np.concatenate([second + rng.uniform(0, 0.2, per_second) for second in range(seconds)]))
    arrived = np.sort(sent + 0.1)
    return Workload(sent_at_s=sent, arrived_at_s=arrived, deadline_s=sent + rng.uniform(0.3, 1.0, len(sent)))


class Script:
    """A controller that does as told: the n-th answer to an event of a type is the n-th of that type's answers."""

    max_lanes = 4
    max_batch_size = 8
    max_queue = 1024
    idle = False

    def __init__(self, answers: dict[type[Event], list[list[Action]]], wakeups: Iterator[float] | None = None):
        self.answers = answers
        self.wakeups = wakeups
        self.seen: list[tuple[float, Event]] = []

    def handle(self, event: Event, *, now: float) -> list[Action]:
        self.seen.append((now, event))
        answers = self.answers.get(type(event), [])
        return answers.pop(0) if answers else []

    def next_wakeup(self) -> float | None:
        return None if self.wakeups is None else next(self.wakeups)


def start(*request_ids: int, lane: int = 0, cores: float = 1.0) -> StartBatch:
    return StartBatch(
        Batch(
            batch_id=0,
            request_ids=request_ids,
            rows=len(request_ids),
            group=0,
            lane=lane,
            cores=cores,
            threads=1,
            expected_s=0.0,
        )
    )


def test_batch_takes_the_slowdown_of_the_instant_at_which_it_starts() -> None:
    """What came before the neighbour is not slowed, and what starts after it has left no longer is."""
    run = simulate(
        workload((0.0, 9.0), (2.0, 9.0), (6.0, 9.0)),
        StaticController(1.0, order="fifo", max_batch_size=1),
        Service(PARALLEL, slowdown=lambda now: 3.0 if 1.0 <= now < 5.0 else 1.0),
    )
    assert run.finished_at_s.tolist() == [1.0, 5.0, 7.0]


def test_two_requests_worked_out_by_hand() -> None:
    """Who waits, who is late, what the cores cost, and what the controller is told and when."""
    controller = StaticController(2.0, order="fifo", max_batch_size=1)
    run = simulate(workload((1.0, 1.5), (1.2, 1.9)), controller, PARALLEL, record=True)
    assert run.finished_at_s.tolist() == [1.5, 2.0]
    assert run.outcome.tolist() == [Outcome.MET, Outcome.LATE]
    assert run.queue_delay_s.tolist() == pytest.approx([0.0, 0.3])
    assert run.response_s.tolist() == pytest.approx([0.5, 0.8])
    assert run.batch.tolist() == [0, 1]
    assert run.batches.started_at_s.tolist() == [1.0, 1.5]
    assert (run.horizon_s, run.mean_cores, run.in_force.core_seconds) == (2.0, 2.0, 4.0)
    assert (run.misses, run.slo_attainment, run.resizes, run.decisions) == (1, 0.5, 1, 5)
    assert run.log is not None
    assert [(now, type(event)) for now, event, _ in run.log] == [
        (1.0, Arrived),
        (1.0, CpuApplied),
        (1.2, Arrived),
        (1.5, BatchFinished),
        (2.0, BatchFinished),
    ]


def test_no_requests() -> None:
    """A trace may be empty for a while; its figures are then missing, not wrong."""
    run = simulate(workload(), StaticController(2.0, order="fifo", max_batch_size=1), PARALLEL)
    assert (len(run), run.misses, run.mean_cores, run.horizon_s) == (0, 0, 0.0, 0.0)
    assert math.isnan(run.slo_attainment)
    assert json.loads(json.dumps(run.to_dict(), allow_nan=False))["summary"]["slo_attainment"] is None


def test_lane_that_ends_as_a_request_arrives_is_free_for_it() -> None:
    """At one instant batches end first; else a service that just keeps up would seem to be too slow."""
    run = simulate(
        workload((0.0, 1.0), (1.0, 2.0), (2.0, 3.0)), StaticController(1.0, order="fifo", max_batch_size=1), PARALLEL
    )
    assert run.queue_delay_s.tolist() == [0.0, 0.0, 0.0]
    assert run.misses == 0


def test_tick_comes_only_if_nothing_else_does() -> None:
    """At the instant of a wake-up an arrival is handled, and the controller may then no longer want to be woken."""
    controller = StaticController(1.0, order="fifo", max_batch_size=2, window_s=0.5)
    run = simulate(workload((1.0, 9.0), (1.5, 9.0)), controller, PARALLEL, record=True)
    assert run.log is not None
    assert not any(isinstance(event, Tick) for _, event, _ in run.log)
    assert run.batches.rows.tolist() == [2]
    alone = simulate(
        workload((1.0, 9.0)), StaticController(1.0, order="fifo", max_batch_size=2, window_s=0.5), PARALLEL
    )
    assert alone.batches.started_at_s.tolist() == [1.5]


def test_batch_in_flight_speeds_up_when_its_cores_arrive() -> None:
    """Planned for 2 cores with 1 in force for 0.3 s: 0.3 of the work is then done, the rest goes twice as fast."""
    script = Script({Arrived: [[start(0, cores=2.0), SetCpu(2.0)]]})
    run = simulate(workload((1.0, 9.0)), script, Service(PARALLEL, resize_delay_s=0.3), initial_cores=1.0)
    assert run.finished_at_s.tolist() == pytest.approx([1.0 + 0.3 + 0.7 / 2])
    assert script.seen[1] == (1.3, CpuApplied(2.0))
    assert run.in_force.times_s.tolist() == [0.0, 1.3]
    assert run.asked.times_s.tolist() == [0.0, 1.0]
    assert run.mean_cores == pytest.approx((1.3 * 1.0 + 0.35 * 2.0) / 1.65)


def test_batch_in_flight_slows_down_when_its_cores_are_taken() -> None:
    """As a quota does: after half of the work on 2 cores, the other core-second takes two seconds on half a core."""
    script = Script({Arrived: [[SetCpu(2.0), start(0, cores=2.0)], [SetCpu(0.5)]]})
    run = simulate(workload((0.0, 9.0), (0.25, 9.0)), script, PARALLEL)
    assert run.finished_at_s[0] == pytest.approx(0.25 + 0.5 / 0.5)
    assert run.outcome.tolist() == [Outcome.MET, Outcome.UNSERVED]


def test_lanes_share_what_is_in_force_and_the_last_one_has_it_alone() -> None:
    """Two lanes of a core each on one core run at half speed until the first of them ends."""
    script = Script({Arrived: [[], [], [start(0, lane=0), start(1, 2, lane=1)]]})
    run = simulate(workload((0.0, 9.0), (0.0, 9.0), (0.0, 9.0)), script, PARALLEL, initial_cores=1.0)
    assert run.finished_at_s.tolist() == pytest.approx([2.0, 3.0, 3.0])


def test_batch_without_any_cores_stands_still() -> None:
    """A replica that is not there yet serves nobody; the work begins with its first core."""
    script = Script({Arrived: [[SetCpu(1.0), start(0)]]})
    run = simulate(workload((1.0, 99.0)), script, Service(PARALLEL, resize_delay_s=10.0), initial_cores=0.0)
    assert run.finished_at_s.tolist() == pytest.approx([12.0])


def test_busy_lanes_disturb_a_batch_as_of_its_start() -> None:
    """The first batch finds one lane busy, its own; the second finds two."""
    script = Script({Arrived: [[start(0, lane=0)], [start(1, lane=1)]]})
    run = simulate(workload((0.0, 9.0), (0.0, 9.0)), script, Service(PARALLEL, interference=0.5))
    assert run.finished_at_s.tolist() == pytest.approx([1.0, 1.5])


def test_events_wait_while_the_controller_decides() -> None:
    """A slow controller delays its own batches, and sees late what happened meanwhile."""
    controller = StaticController(1.0, order="fifo", max_batch_size=1)
    run = simulate(workload((0.0, 9.0), (0.05, 9.0)), controller, Service(PARALLEL, decision_s=0.1), record=True)
    assert run.batches.started_at_s.tolist() == pytest.approx([0.1, 1.2])
    assert run.finished_at_s.tolist() == pytest.approx([1.1, 2.2])
    assert run.log is not None
    # The allocation is answered first, 0.1 s after it was decided; then the arrival that came in between.
    assert [now for now, _, _ in run.log] == pytest.approx([0.0, 0.1, 0.2, 1.1, 2.2])
    assert run.decision_s == pytest.approx(0.5)


def test_horizon_counts_idle_cores_and_keeps_the_controller_running() -> None:
    """A policy that pays for a quiet hour must be seen to; one that decides periodically decides to the end."""
    run = simulate(workload((0.0, 9.0)), Script({Arrived: [[SetCpu(2.0), start(0)]]}), PARALLEL, horizon_s=10.0)
    assert (run.horizon_s, run.in_force.core_seconds) == (10.0, 20.0)
    script = Script({Arrived: [[start(0)]]}, (float(second) for second in range(1, 99)))
    simulate(workload((0.0, 9.0)), script, PARALLEL, horizon_s=5.0)
    assert script.seen[-1] == (5.0, Tick())
    cut = simulate(workload((0.0, 9.0)), Script({Arrived: [[SetCpu(2.0), start(0)]]}), PARALLEL, horizon_s=0.5)
    assert (cut.in_force.core_seconds, cut.finished_at_s.tolist()) == (1.0, [1.0])


def test_controller_that_keeps_requests_is_drained_then_closed() -> None:
    """A run ends, as a live one does by close(); what is left then is told, not forgotten."""
    served = Script({Drain: [[start(0)]]})
    assert simulate(workload((0.0, 9.0)), served, PARALLEL).outcome.tolist() == [Outcome.MET]
    closed = Script({Abort: [[Reject(0, RejectReason.CLOSED)]]})
    assert simulate(workload((0.0, 9.0)), closed, PARALLEL).outcome.tolist() == [Outcome.CLOSED]
    deaf = Script({}, (float(second) for second in range(1, 9999)))
    run = simulate(workload((0.0, 9.0)), deaf, PARALLEL)
    assert run.outcome.tolist() == [Outcome.UNSERVED]
    assert [type(event) for _, event in deaf.seen if not isinstance(event, Tick)] == [Arrived, Drain, Abort]


def test_full_queue_and_lost_deadlines_are_told_apart() -> None:
    """The one asks for a longer queue, the other for more cores."""
    controller = StaticController(1.0, order="fifo", max_batch_size=1, max_queue=1, drop_late=True)
    run = simulate(workload((0.0, 9.0), (0.1, 0.2), (0.3, 9.0)), controller, PARALLEL)
    assert run.outcome.tolist() == [Outcome.MET, Outcome.REJECTED, Outcome.QUEUE_FULL]
    assert (run.count(Outcome.QUEUE_FULL), run.misses) == (1, 2)
    assert np.isnan(run.finished_at_s).tolist() == [False, True, True]


def test_seconds_with_a_miss() -> None:
    """Published results count the seconds in which any request was late; seconds without arrivals do not count."""
    controller = StaticController(1.0, order="fifo", max_batch_size=1)
    run = simulate(workload((0.0, 1.0), (0.5, 9.0), (5.0, 5.9), (5.1, 6.9), (9.0, 10.0)), controller, PARALLEL)
    seconds, arrived, missed = run.per_second()
    assert (seconds.tolist(), arrived.tolist(), missed.tolist()) == ([0, 5, 9], [2, 2, 1], [0, 2, 0])
    assert run.summary()["seconds_with_a_miss"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[start(0)], [start(1)]], "lane 0, which is not free"),
        ([[start(0, lane=4)]], "lane 4, which is not free"),
        ([[start(0)], [start(0, lane=1)]], "request 0, which is not waiting"),
        ([[start(0)], [Reject(0, RejectReason.DEADLINE)]], "request 0, which is not waiting"),
    ],
)
def test_controller_that_breaks_the_rules_is_told(answers: list[list[Action]], message: str) -> None:
    """Otherwise its results would be too good to be true."""
    with pytest.raises(RuntimeError, match=message):
        simulate(workload((0.0, 9.0), (0.0, 9.0)), Script({Arrived: answers}), PARALLEL)


def test_controller_that_never_lets_time_pass_is_told() -> None:
    """A wake-up that is due now, for ever, would hang the simulator."""
    with pytest.raises(RuntimeError, match=r"woken at 0\.0 or before, again and again"):
        simulate(workload((1.0, 9.0)), Script({}, iter([-0.5] * 9999)), PARALLEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": Workload(sent_at_s=[-1.0], arrived_at_s=[-0.5], deadline_s=[1.0])}, "workload must not begin"),
        ({"initial_cores": -1.0}, "initial_cores must be finite and not negative, got -1.0"),
        ({"horizon_s": 0.0}, "horizon_s must be positive and finite, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    """Before anything runs, and by name."""
    all_arguments = {
        "workload": workload((0.0, 1.0)),
        "controller": StaticController(1.0, order="fifo", max_batch_size=1),
        "service": PARALLEL,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        simulate(**all_arguments)  # type: ignore[arg-type]


ROUGH = Service(
    DETECTOR,
    noise_cv=0.2,
    straggler_share=0.02,
    interference=0.03,
    resize_delay_s=0.05,
    shrink_delay_s=0.01,
    decision_s=0.0005,
    decision_cv=1.0,
)


def adaptive(lanes: int = 8, **settings_: object) -> Controller:
    solver = Solver(DETECTOR, max_cores=16, max_batch_size=8, max_lanes=lanes)
    return Controller(solver, Settings(**settings_))  # type: ignore[arg-type]


CONTROLLERS: dict[str, Callable[[], ControllerProtocol]] = {
    "many lanes": adaptive,
    "one lane, late served": lambda: adaptive(1, late="serve"),
    "static": lambda: StaticController(4.0, order="edf", max_batch_size=4, lanes=2, window_s=0.02, drop_late=True),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_recorded_run_replays_through_a_fresh_controller(name: str) -> None:
    """Same events at the same instants, same actions: so what was simulated is what would serve."""
    run = simulate(bursts(20, 20, seed=3), CONTROLLERS[name](), ROUGH, seed=5, record=True)
    assert run.log is not None
    again = CONTROLLERS[name]()
    assert [again.handle(event, now=now) for now, event, _ in run.log] == [actions for _, _, actions in run.log]
    assert {type(event) for _, event, _ in run.log} >= {Arrived, BatchFinished, CpuApplied}
    assert sum(isinstance(action, StartBatch) for _, _, actions in run.log for action in actions) > 50


@pytest.mark.parametrize("name", CONTROLLERS)
def test_same_seed_same_run(name: str) -> None:
    """A result that cannot be repeated cannot be checked; another seed must matter, or nothing is random."""
    requests = bursts(5, 20, seed=3)
    first, again, other = (simulate(requests, CONTROLLERS[name](), ROUGH, seed=seed).to_dict() for seed in (5, 5, 6))
    assert json.dumps(first, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert first["batches"] != other["batches"]


class Checked(Controller):
    """Asserts its invariants after every event."""

    def handle(self, event: Event, *, now: float) -> list[Action]:
        actions = super().handle(event, now=now)
        self.check()
        return actions


delays = st.sampled_from([0.0, 0.01, 0.5])


@settings(max_examples=25, deadline=None)
@given(
    times=st.lists(st.tuples(st.floats(0, 3), st.floats(-0.1, 2)), max_size=40),
    lanes=st.integers(1, 4),
    late=st.sampled_from(["serve", "reject"]),
    grow_s=delays,
    shrink_s=delays,
    decision_s=st.sampled_from([0.0, 0.003]),
    noise_cv=st.sampled_from([0.0, 0.5]),
)
def test_every_request_ends_once_and_no_lane_runs_two_batches(
    times: list[tuple[float, float]],
    lanes: int,
    late: str,
    grow_s: float,
    shrink_s: float,
    decision_s: float,
    noise_cv: float,
) -> None:
    """Whatever the workload and the service: nobody is lost, nobody is served before he comes, lanes do not overlap."""
    requests = workload(*sorted((at, at + budget_s) for at, budget_s in times))
    controller = Checked(Solver(DETECTOR, max_cores=6, max_batch_size=4, max_lanes=lanes), Settings(late=late))  # type: ignore[arg-type]
    service = Service(
        DETECTOR, noise_cv=noise_cv, resize_delay_s=grow_s, shrink_delay_s=shrink_s, decision_s=decision_s
    )
    run = simulate(requests, controller, service, initial_cores=2.0)
    assert controller.idle
    assert run.count(Outcome.UNSERVED) == run.count(Outcome.CLOSED) == 0
    served = np.isfinite(run.finished_at_s)
    assert (run.batch >= 0).tolist() == served.tolist() == (run.outcome <= Outcome.LATE).tolist()
    assert run.met.tolist() == (run.finished_at_s <= run.deadline_s).tolist()
    assert np.all(run.queue_delay_s[served] >= 0)
    assert np.bincount(run.batch[served], minlength=len(run.batches)).tolist() == run.batches.rows.tolist()
    for lane in range(lanes):
        mine = run.batches.lane == lane
        assert np.all(run.batches.started_at_s[mine][1:] >= run.batches.finished_at_s[mine][:-1])
    assert np.all(np.diff(run.in_force.times_s) > 0)
    assert run.in_force.cores.max() <= 6


def test_memory_grows_by_numbers_only() -> None:
    """A million requests must fit: an object for each would take several hundred bytes, the arrays take a hundred."""
    rng = np.random.default_rng(0)
    arrived = np.cumsum(rng.exponential(1 / 70, 20_000))
    requests = Workload(sent_at_s=arrived, arrived_at_s=arrived, deadline_s=arrived + 1.0)
    controller = StaticController(1.0, order="fifo", max_batch_size=1)
    tracemalloc.start()
    try:
        run = simulate(requests, controller, LatencyModel(gamma_s=0.0, epsilon_s=0.0, delta_s=0.0, eta_s=0.01))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(run, Run)
    assert len(run.batches) == 20_000
    assert peak / len(requests) < 250
