"""The engine: clients that are interrupted anywhere, controllers that raise, and ends from every side."""

from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import Abort, Arrived, BatchFinished, CpuApplied, Drain, Event, Tick
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.core.values import Batch
from sponge.errors import ControllerFailed, SchedulerClosed
from sponge.live.scalers import ThreadScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models
from tests.live.interruptions import interrupted_at

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticSession]:
    with ElasticSession(
        models.identity(), max_threads=2, max_lanes=2, cache_dir=tmp_path_factory.mktemp("c")
    ) as session:
        yield session


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticSession]:
    with ElasticSession(models.loop(), max_threads=1, cache_dir=tmp_path_factory.mktemp("c")) as session:
        yield session


def solver(**changes: Any) -> Solver:
    return Solver(FAST, **{"max_cores": 2, "max_batch_size": 4, "max_lanes": 2, **changes})


def rows(value: float) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.full((1, 4), value, dtype=np.float32)}


def slow(turns: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.zeros(1, dtype=np.float32), "rounds": np.array([turns])}


# -- interrupts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_s", [60.0, -1.0], ids=["served", "rejected"])
def test_submit_may_be_interrupted_anywhere(identity: ElasticSession, budget_s: float) -> None:
    """Ctrl-C between any two bytecodes of `submit`: others are served, and the request was accepted or it was not."""
    with Scheduler(identity, solver()) as scheduler:
        for step in itertools.count():
            if not interrupted_at(step, lambda: scheduler.submit(rows(0), budget_s=budget_s)):
                break
            assert scheduler.submit(rows(step), budget_s=60).result(30)[0][0, 0] == step
        assert step > 50, "the trace saw nothing"
        scheduler.close(timeout_s=30)
        found = scheduler.statistics()
    assert found.waiting == found.running == 0
    assert step <= found.met < 2 * step + 2
    assert found.submitted == found.met + found.late + sum(found.rejected.values())


def test_cancel_may_be_interrupted_anywhere(identity: ElasticSession) -> None:
    """The same for giving up."""
    with Scheduler(identity, solver()) as scheduler:
        for step in itertools.count():
            future = scheduler.submit(rows(0), budget_s=60)
            interrupted = interrupted_at(step, future.cancel)
            assert scheduler.submit(rows(step), budget_s=60).result(30)[0][0, 0] == step
            assert not wait([future], 30).not_done
            if not interrupted:
                break
        assert scheduler.close(timeout_s=30)
        assert scheduler.statistics().waiting == 0


@pytest.mark.parametrize("drain", [True, False])
def test_close_may_be_interrupted_anywhere(identity: ElasticSession, drain: bool) -> None:
    """Broken off and made again, it ends everything: no lock is left held, and no thread."""
    before = set(threading.enumerate())
    for step in itertools.count():
        scheduler = Scheduler(identity, solver())
        futures = [scheduler.submit(rows(i), budget_s=60) for i in range(3)]
        interrupted = interrupted_at(step, lambda: scheduler.close(drain=drain))  # noqa: B023
        assert scheduler.close(timeout_s=30)
        assert all(future.done() for future in futures)
        if not interrupted:
            break
    assert step > 50, "the trace saw nothing"
    assert set(threading.enumerate()) <= before


def test_context_may_be_interrupted_by_signals(tmp_path: Path) -> None:
    """Real signals at random instants, in the main thread, while it submits, cancels, waits and closes."""
    path = models.save(models.identity(), tmp_path / "identity.onnx")
    script = f"""
import random, signal, threading
from concurrent.futures import CancelledError
import numpy as np
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession

def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(0)
x = {{"x": np.ones((1, 4), dtype=np.float32)}}
interrupts = 0
with ElasticSession({str(path)!r}, max_threads=1) as session:
    solver = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=1, max_batch_size=4)
    for _ in range(30):
        try:
            with Scheduler(session, solver) as scheduler:
                for _ in range(30):
                    try:
                        # Again after a while, should the exception be swallowed in a destructor.
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 6e-4), 0.05)
                        while True:
                            future = scheduler.submit(x, budget_s=60)
                            if rng.random() < 0.3:
                                future.cancel()
                            elif rng.random() < 0.3:
                                future.result(30)
                    except (KeyboardInterrupt, RuntimeError, CancelledError):  # RuntimeError: the future's own lock
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        interrupts += 1
                    assert scheduler.submit(x, budget_s=60).result(30)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-3))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert scheduler.close(timeout_s=30)
        found = scheduler.statistics()
        assert found.waiting == found.running == 0, found
        ended = found.met + found.late + found.cancelled + sum(found.rejected.values())
        assert found.submitted == ended, found
    # A lock of a client's own future that it left held when it was interrupted is waited for by no other thread.
    left = {{thread.name for thread in threading.enumerate()}} - {{"MainThread", "sponge-settle"}}
    assert not left, left
print(interrupts)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 900


def test_client_near_the_end_of_its_stack_breaks_nothing(identity: ElasticSession) -> None:
    """Its own submit may fail by it; no decision for others does."""
    with Scheduler(identity, solver()) as scheduler:

        def deeper() -> None:
            scheduler.submit(rows(0), budget_s=60)
            deeper()

        with pytest.raises(RecursionError):
            deeper()
        assert scheduler.submit(rows(1), budget_s=60).result(30)[0][0, 0] == 1
        assert scheduler.statistics().failure is None


def test_future_that_was_left_locked_holds_nobody_up(identity: ElasticSession) -> None:
    """Python's ``Condition`` may stay locked when its holder is interrupted; only that client waits for its answer."""
    with Scheduler(identity, solver()) as scheduler:
        future = scheduler.submit(rows(1), budget_s=60)
        rejected = scheduler.submit(rows(1), budget_s=-1)
        locked = scheduler.submit(rows(2), budget_s=60)
        with locked._condition, rejected._condition:
            for _ in range(4):
                assert scheduler.submit(rows(3), budget_s=60).result(30)[0][0, 0] == 3
        assert future.result(30)[0][0, 0] == 1
        assert locked.result(30)[0][0, 0] == 2
        assert rejected.exception(30) is not None


# -- ends --------------------------------------------------------------------------------------------------------


def test_callback_that_closes_within_close_is_told(loop: ElasticSession) -> None:
    """It would wait for the close that waits for it."""
    scheduler = Scheduler(loop, solver(max_lanes=1, max_cores=1, max_batch_size=1))
    running = scheduler.submit(slow(5_000), budget_s=600)
    waiting = scheduler.submit(slow(1), budget_s=600)
    told: list[object] = []

    def close(_: Any) -> None:
        try:
            told.append(scheduler.close())
        except RuntimeError as error:
            told.append(error)

    waiting.add_done_callback(close)
    assert scheduler.close(drain=False)
    assert running.done()
    assert isinstance(waiting.exception(), SchedulerClosed)
    assert len(told) == 1
    assert "callback" in str(told[0])


def test_close_from_a_signal_handler_within_close(loop: ElasticSession) -> None:
    """A service that is told to end twice: the second time, from within the first, it does not wait for itself."""
    scheduler = Scheduler(loop, solver(max_lanes=1, max_cores=1, max_batch_size=1))
    futures = [scheduler.submit(slow(20_000), budget_s=600) for _ in range(50)]
    answers: list[bool] = []

    def handler(*_: Any) -> None:
        answers.append(scheduler.close(drain=False))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert scheduler.close(drain=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert answers == [True]
    assert all(future.done() for future in futures)
    assert isinstance(futures[-1].exception(), SchedulerClosed), "the second one did not want to wait"


def test_parts_are_closed_once_whatever_they_raise(identity: ElasticSession) -> None:
    """The second is closed even if the first fails; the error is heard of, and closing is over."""
    closed: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "first":
                raise OSError("gone")

    before = set(threading.enumerate())
    scheduler = Scheduler(identity, solver())
    scheduler.own(Part("first"), Part("second"))
    with pytest.raises(OSError, match="gone"):
        scheduler.close()
    assert scheduler.close()
    assert closed == ["first", "second"]
    assert set(threading.enumerate()) <= before


def test_close_from_many_threads(loop: ElasticSession) -> None:
    """One drains, one turns away, one has no time: all come back, every request has one outcome."""
    scheduler = Scheduler(loop, solver(max_lanes=1, max_cores=1, max_batch_size=1))
    futures = [scheduler.submit(slow(3_000), budget_s=600) for _ in range(5)]
    answers: dict[str, bool] = {}
    ways: dict[str, dict[str, Any]] = {
        "drain": {"drain": True},
        "abort": {"drain": False},
        "timed": {"drain": True, "timeout_s": 0.0},
    }
    threads = [
        threading.Thread(target=lambda name=name, how=how: answers.update({name: scheduler.close(**how)}))
        for name, how in ways.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers["drain"]
    assert answers["abort"]
    assert all(future.done() for future in futures)
    found = scheduler.statistics()
    assert found.met + found.late + found.rejected.get("closed", 0) == 5


def test_exception_in_the_block_does_not_wait_for_ever(
    loop: ElasticSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that hangs must not keep a failing program from ending; it is told what was left."""
    monkeypatch.setattr("sponge.live.scheduler.EXIT_TIMEOUT_S", 0.01)
    scheduler = Scheduler(loop, solver(max_lanes=1, max_cores=1, max_batch_size=1))
    future = scheduler.submit(slow(50_000), budget_s=600)
    with pytest.raises(KeyError), scheduler:
        raise KeyError
    assert not future.done()
    assert "still running" in caplog.text
    assert scheduler.close()
    assert future.result()


@pytest.mark.parametrize("drain", [True, False])
def test_submitting_while_it_closes(identity: ElasticSession, drain: bool) -> None:
    """Clients submit without pause into a closing scheduler: each request is served, told, or refused."""
    for _ in range(2):
        scheduler = Scheduler(identity, solver())
        futures: list[Future[Any]] = []
        threads = [threading.Thread(target=submit_until_closed, args=(scheduler, futures)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait([scheduler.submit(rows(0), budget_s=60)])
        assert scheduler.close(drain=drain)
        for thread in threads:
            thread.join()
        assert not wait(futures, 30).not_done
        found = scheduler.statistics()
        assert found.waiting == 0
        assert found.submitted <= len(futures) + 1


def submit_until_closed(scheduler: Scheduler, futures: list[Future[Any]]) -> None:
    try:
        while True:
            futures.append(scheduler.submit(rows(1), budget_s=60))
    except SchedulerClosed:
        return


# -- controllers that break the contract ---------------------------------------------------------------------------


class Raising(Controller):
    """Fails at the first event of a kind, once armed."""

    fails_at: type[Event] | None = None

    def handle(self, event: Event, *, now: float) -> list[Action]:
        if self.fails_at is not None and isinstance(event, self.fails_at):
            raise ZeroDivisionError("a bug in the policy")
        return super().handle(event, now=now)


@pytest.mark.parametrize("kind", [Arrived, BatchFinished, Drain, Abort, CpuApplied, Tick])
def test_controller_that_raises(loop: ElasticSession, kind: type[Event], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever runs finishes, whatever waits gets one clear error, it is said once, and everything can be closed."""
    controller = Raising(solver(max_lanes=1, max_cores=1, max_batch_size=1))
    scheduler = Scheduler(loop, controller=controller)
    futures = [scheduler.submit(slow(3_000), budget_s=600) for _ in range(2)]
    controller.fails_at = kind
    expiring = scheduler.submit(slow(1), budget_s=0.05)  # somebody has to be told by a tick
    futures.append(expiring)
    scheduler.close(drain=kind is not Abort, timeout_s=60)
    outcomes = [future.exception(30) for future in futures]
    assert scheduler.close(timeout_s=60)
    failed = [outcome for outcome in outcomes if isinstance(outcome, ControllerFailed)]
    found = scheduler.statistics()
    if failed:
        assert "a bug in the policy" in str(failed[0])
        assert isinstance(failed[0].__cause__, ZeroDivisionError)
        assert found.failure == repr(failed[0].__cause__)
        assert caplog.text.count("the controller failed") == 1
        assert len({id(error) for error in failed}) == len(failed)
    assert kind in (Drain, Abort, CpuApplied, Tick) or failed
    assert found.met + found.late + sum(found.rejected.values()) == found.submitted == 3
    with pytest.raises(SchedulerClosed):
        scheduler.submit(slow(1), budget_s=60)


class Faulty(Controller):
    """Does what it is told to instead of what it should."""

    actions: tuple[Action, ...] = ()

    def handle(self, event: Event, *, now: float) -> list[Action]:
        if isinstance(event, Arrived) and self.actions:
            return list(self.actions)
        return super().handle(event, now=now)


def batch(lane: int, *request_ids: int) -> Batch:
    return Batch(batch_id=0, request_ids=request_ids, rows=1, group=0, lane=lane, cores=1.0, threads=1, expected_s=0.1)


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        ((StartBatch(batch(1, 0)),), "lane 1"),
        ((StartBatch(batch(-1, 0)),), "lane -1"),
        ((StartBatch(batch(0, 0)), StartBatch(batch(0, 1))), "busy"),
        ((None,), "NoneType"),
    ],
)
def test_controller_that_asks_for_the_impossible(identity: ElasticSession, actions: Any, reason: str) -> None:
    """A batch on a lane that is not there, or not free, would be lost: it is an error, and everybody is told."""
    controller = Faulty(solver(max_lanes=1, max_cores=1))
    with Scheduler(identity, controller=controller) as scheduler:
        assert scheduler.submit(rows(1), budget_s=60).result(30)
        controller.actions = actions
        future = scheduler.submit(rows(0), budget_s=60)
        error = future.exception(30)
        assert error is None or isinstance(error, ControllerFailed)
        scheduler.statistics()
        with pytest.raises(ControllerFailed, match=reason):
            scheduler.submit(rows(0), budget_s=60)


def test_controller_that_forgets_a_request(identity: ElasticSession) -> None:
    """Nobody hears of it but its client, when the scheduler is closed."""
    controller = Faulty(solver())
    with Scheduler(identity, controller=controller) as scheduler:
        assert scheduler.submit(rows(1), budget_s=60).result(30)
        controller.actions = (SetCpu(1.0),)
        future = scheduler.submit(rows(0), budget_s=60)
    assert isinstance(future.exception(30), SchedulerClosed)


def test_controller_that_turns_away_what_runs(identity: ElasticSession) -> None:
    """The batch finds nothing left to run; the client hears one thing."""
    from sponge.core.values import RejectReason

    controller = Faulty(solver(max_lanes=1, max_cores=1))
    with Scheduler(identity, controller=controller) as scheduler:
        assert scheduler.submit(rows(1), budget_s=60).result(30)
        heard: list[Any] = []
        controller.actions = (StartBatch(batch(0, 1)), Reject(1, RejectReason.CLOSED))
        scheduler.submit(rows(0), budget_s=60).add_done_callback(heard.append)
        controller.actions = ()
    assert len(heard) <= 1


# -- memory --------------------------------------------------------------------------------------------------------


def test_nothing_of_a_settled_request_is_kept(identity: ElasticSession) -> None:
    """Futures that nobody reads, inputs and outputs: the scheduler holds none of them once they are settled."""

    class Watched(np.ndarray):  # plain arrays cannot be watched through a dict of them
        pass

    with Scheduler(identity, solver()) as scheduler:
        seen: list[weakref.ref[Any]] = []
        for budget_s in (60.0, -1.0) * 100:
            x = np.ones((1, 4), dtype=np.float32).view(Watched)
            future = scheduler.submit({"x": x}, budget_s=budget_s)
            seen += [weakref.ref(x), weakref.ref(future)]
            if future.exception(30) is None:
                seen += [weakref.ref(output) for output in future.result()]
            del x, future
        cancelled = scheduler.submit(rows(0), budget_s=60)
        cancelled.cancel()
        seen.append(weakref.ref(cancelled))
        del cancelled
        for _ in range(2):  # both lanes have had something else since
            wait([scheduler.submit(rows(0), budget_s=60) for _ in range(8)])
        gc.collect()
        alive = [ref() for ref in seen if ref() is not None]
        assert not alive, alive[:3]
        assert not scheduler._service.entries


def test_shapes_without_end_are_not_remembered_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a new shape each time costs nothing that stays; each is still answered."""
    monkeypatch.setattr("sponge.live.scheduler.MAX_GROUPS", 10)
    with (
        ElasticSession(models.several(), max_threads=1, cache_dir=tmp_path) as session,
        Scheduler(session, solver(max_lanes=1, max_cores=1)) as scheduler,
    ):
        for side in [*range(2, 40), 2, 3]:
            image = np.full((1, 3, side, 4), 1.0, dtype=np.float32)
            inputs = {"image": image, "scale": np.ones((1, 1), dtype=np.float32), "tag": np.array([side])}
            assert scheduler.submit(inputs, budget_s=60).result(30)[2].tolist() == [side + 1]
        assert len(scheduler._groups) <= 10


def test_scaler_that_exits_costs_nothing(identity: ElasticSession, caplog: pytest.LogCaptureFixture) -> None:
    """Not even ``SystemExit`` ends a thread of the scheduler."""

    class Leaving(ThreadScaler):
        def scale(self, cores: float) -> float:
            raise SystemExit

    with Scheduler(identity, solver(), Leaving()) as scheduler:
        for i in range(20):
            assert scheduler.submit(rows(i), budget_s=60).result(30)[0][0, 0] == i
        assert scheduler.statistics().failure is None
        assert scheduler.statistics().cpu_control_errors > 0
    assert caplog.text.count("CPU control fails") == 1


def test_clock_that_raises_costs_no_request_its_outcome(identity: ElasticSession) -> None:
    """It counts as standing still; the client whose own call meets the error is told by it, and was not accepted."""
    readings = itertools.count()

    def clock() -> float:
        if next(readings) % 7 == 3:
            raise OSError("no clock today")
        return time.monotonic()

    accepted: list[Future[Any]] = []
    with Scheduler(identity, solver(), clock=clock) as scheduler:
        for i in range(500):
            try:
                accepted.append(scheduler.submit(rows(float(i)), budget_s=60.0))
            except OSError:
                continue
        done, waiting = wait(accepted, timeout=60.0)
        assert not waiting
        assert len(done) > 300
        assert all(future.exception() is None for future in done)
        statistics = scheduler.statistics()
    assert statistics.submitted == statistics.met + statistics.late == len(accepted)


def test_requests_that_wait_in_the_inbox_are_decided_about_together(loop: ElasticSession) -> None:
    """What came in while nobody could look is one burst: its first request must not start by itself."""
    seen: list[bool] = []

    def recorder(now: float, event: Event, actions: list[Action]) -> None:
        if isinstance(event, Arrived):
            seen.append(event.more)

    one_lane = solver(max_cores=1, max_lanes=1)
    with Scheduler(loop, one_lane, recorder=recorder) as scheduler:
        engine = scheduler._service.engine
        with engine._busy:  # whoever is at it takes a while
            futures = [scheduler.submit(slow(1), budget_s=60.0) for _ in range(4)]
        futures.append(scheduler.submit(slow(1), budget_s=60.0))
        wait(futures)
        assert scheduler.statistics().batches < 5
    assert seen[:3] == [True, True, True]
    assert seen[-1] is False
