"""The live scheduler on real ONNX Runtime sessions."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from sponge.core.actions import Action, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import Event
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded, ModelError, QueueFull, SchedulerClosed
from sponge.live.cgroup import CgroupScaler
from sponge.live.scalers import ThreadScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)
PER_BATCH = LatencyModel(1e-6, 0.0, 0.0, 1e-2)
"""A batch costs the same whatever its size: the controller likes large ones."""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make sessions of the test models, once each."""
    made: dict[str, ElasticSession] = {}
    cache = tmp_path_factory.mktemp("cache")

    def get(name: str) -> ElasticSession:
        if name not in made:
            model: bytes = getattr(models, name)()
            made[name] = ElasticSession(model, max_threads=2, max_lanes=2, cache_dir=cache)
        return made[name]

    yield get
    for session in made.values():
        session.close()


def solver(latency: LatencyModel = FAST, **changes: Any) -> Solver:
    return Solver(latency, **{"max_cores": 2, "max_batch_size": 16, "max_lanes": 2, **changes})


def rows(value: float, count: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.full((count, 4), value, dtype=np.float32)}


def slow(turns: int) -> dict[str, np.ndarray[Any, Any]]:
    """Input of the ``loop`` model; 10,000 turns take some 0.3 s."""
    return {"x": np.zeros(1, dtype=np.float32), "rounds": np.array([turns])}


def test_every_client_gets_its_own_answer(sessions: Any) -> None:
    """Sixteen threads, requests of one to three rows, batches of any mix: results match inputs, none is lost."""
    with Scheduler(sessions("matmul_chain"), solver(PER_BATCH)) as scheduler:
        bare = ort.InferenceSession(models.matmul_chain())
        wrong: list[str] = []

        def client(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(12):
                x = rng.standard_normal((int(rng.integers(1, 4)), 512), dtype=np.float32)
                (y,) = scheduler.submit({"x": x}, budget_s=60).result(60)
                if not np.allclose(y, bare.run(None, {"x": x})[0], atol=1e-4):
                    wrong.append(f"client {seed}")

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        statistics = scheduler.statistics()
    assert statistics.submitted == statistics.met == 16 * 12
    assert statistics.waiting == statistics.running == 0
    assert statistics.batches < statistics.submitted, "nothing was batched"
    assert statistics.slo_attainment == 1.0


def test_several_inputs_and_shapes(sessions: Any) -> None:
    """Requests of different shapes never share a batch; every output comes back in its dtype."""
    with Scheduler(sessions("several"), solver(PER_BATCH)) as scheduler:
        futures = []
        for i in range(40):
            side = 4 if i % 2 else 6
            image = np.full((1, 3, side, side), i, dtype=np.float32)
            scale = np.full((1, 1), 2, dtype=np.float32)
            inputs = {"image": image, "scale": scale, "tag": np.array([i])}
            futures.append((i, side, scheduler.submit(inputs, budget_s=60)))
        for i, side, future in futures:
            scaled, mean, tag = future.result(60)
            assert scaled.shape == (1, 3, side, side)
            assert scaled[0, 0, 0, 0] == 2 * i
            assert mean.tolist() == [i]
            assert tag.tolist() == [i + 1]
            assert tag.dtype == np.int64


def test_strings_and_non_contiguous_arrays(sessions: Any) -> None:
    """What `check` lets through is served, alone and in a batch."""
    with Scheduler(sessions("strings"), solver(PER_BATCH)) as scheduler:
        futures = [scheduler.submit({"x": np.array([[f"a{i}", "b"]], dtype=object)}, budget_s=60) for i in range(10)]
        assert [future.result(60)[0].tolist() for future in futures] == [[[f"a{i}", "b"]] for i in range(10)]
    with Scheduler(sessions("identity"), solver(PER_BATCH)) as scheduler:
        wide = np.arange(80, dtype=np.float32).reshape(10, 8)[:, ::2]
        futures = [scheduler.submit({"x": wide[i : i + 1]}, budget_s=60) for i in range(10)]
        assert all(np.array_equal(future.result(60)[0], wide[i : i + 1]) for i, future in enumerate(futures))


def test_asyncio_clients(sessions: Any) -> None:
    """`infer` awaits without blocking the loop, and raises what the future raises."""
    with Scheduler(sessions("identity"), solver(), slo_s=30.0) as scheduler:

        async def clients() -> list[Any]:
            answers = await asyncio.gather(*(scheduler.infer(rows(i)) for i in range(50)))
            with pytest.raises(DeadlineExceeded):
                await scheduler.infer(rows(0), budget_s=-1.0)
            return answers

        answers = asyncio.run(clients())
    assert [answer[0][0, 0] for answer in answers] == list(range(50))


def test_poisonous_request_fails_alone(sessions: Any) -> None:
    """The model raises for the whole batch; the culprit is found and the fifteen others are served."""
    with Scheduler(sessions("lookup"), solver(PER_BATCH, max_lanes=1)) as scheduler:
        for culprits in ({5}, {0, 15}, set(range(16))):
            indices = [999 if i in culprits else i for i in range(16)]
            futures = [scheduler.submit({"i": np.array([index])}, budget_s=60) for index in indices]
            for i, future in enumerate(futures):
                if i in culprits:
                    with pytest.raises(ModelError, match="the model failed") as caught:
                        future.result(60)
                    assert caught.value.__cause__ is not None
                else:
                    assert future.result(60)[0].tolist() == [10.0 * i]
        statistics = scheduler.statistics()
    assert statistics.failed == 19
    assert statistics.met == 29


def test_engine_survives_a_model_that_always_fails(sessions: Any) -> None:
    """Its requests fail, each with its own error; the next one is still answered."""
    with Scheduler(sessions("lookup"), solver()) as scheduler:
        bad = [scheduler.submit({"i": np.array([-999])}, budget_s=60) for _ in range(100)]
        assert all(isinstance(future.exception(60), ModelError) for future in bad)
        assert len({id(future.exception()) for future in bad}) == 100
        assert scheduler.submit({"i": np.array([3])}, budget_s=60).result(60)[0].tolist() == [30.0]


def test_model_whose_output_does_not_follow_the_batch(sessions: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be parted, so its requests are run one by one: right, and said so."""
    with Scheduler(sessions("positive_rows"), solver(PER_BATCH, max_lanes=1)) as scheduler:
        futures = [scheduler.submit(rows(i % 3), budget_s=60) for i in range(20)]
        assert [len(future.result(60)[0]) for future in futures] == [int(i % 3 > 0) for i in range(20)]
    assert caplog.text.count("one by one") == 1, "said once"


def test_bad_requests_are_refused_at_once(sessions: Any) -> None:
    """The caller hears of it, naming argument and value; nobody else does."""
    with Scheduler(sessions("identity"), solver()) as scheduler:
        bad: list[tuple[Any, dict[str, Any], str]] = [
            ({"z": rows(0)["x"]}, {"budget_s": 1}, "x"),
            (rows(0, 17), {"budget_s": 1}, "max_batch_size=16 rows, got 17"),
            (rows(0), {}, "budget_s or deadline must be given"),
            (rows(0), {"budget_s": math.nan}, "nan"),
            (rows(0), {"budget_s": 1, "deadline": 2}, "only one of"),
        ]
        for inputs, more, match in bad:
            with pytest.raises(ValueError, match=match):
                scheduler.submit(inputs, **more)
        with pytest.raises(TypeError, match="x"):
            scheduler.submit({"x": [[1.0, 2, 3, 4]]}, budget_s=1)  # type: ignore[dict-item]
        assert scheduler.submit(rows(1), budget_s=60).result(60)[0][0, 0] == 1
        assert scheduler.statistics().submitted == 1


def test_deadlines_as_budget_instant_and_default(sessions: Any) -> None:
    """Three ways to say when the answer is due, and no deadline at all."""
    with Scheduler(sessions("identity"), solver(), slo_s=30.0) as scheduler:
        assert scheduler.submit(rows(1)).result(60)
        assert scheduler.submit(rows(1), deadline=scheduler.now() + 30).result(60)
        assert scheduler.submit(rows(1), budget_s=math.inf).result(60)
        for more in ({"budget_s": 0.0}, {"deadline": scheduler.now() - 1}, {"budget_s": -math.inf}):
            with pytest.raises(DeadlineExceeded, match="cannot meet its deadline"):
                scheduler.submit(rows(1), **more).result(60)
        assert scheduler.statistics().rejected == {"deadline": 3}


def test_cancelled_request_does_not_run(sessions: Any) -> None:
    """Cancelled while it waits behind a slow one: it leaves the queue, and the count says so."""
    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1)) as scheduler:
        first = scheduler.submit(slow(20_000), budget_s=600)
        second = scheduler.submit(slow(1), budget_s=600)
        assert second.cancel()
        assert second.cancel(), "again is the same"
        assert second.cancelled()
        assert first.result(60)
        with pytest.raises(CancelledError):
            second.result(60)
        assert not first.cancel(), "done already"
        statistics = scheduler.statistics()
    assert (statistics.met, statistics.cancelled, statistics.batches) == (1, 1, 1)


def test_cancelling_an_awaiting_task_cancels_the_request(sessions: Any) -> None:
    """A client that hangs up must not cost a run."""
    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1)) as scheduler:

        async def clients() -> None:
            first = asyncio.ensure_future(scheduler.infer(slow(20_000), budget_s=600))
            await asyncio.sleep(0)
            second = asyncio.ensure_future(scheduler.infer(slow(1), budget_s=600))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await first

        asyncio.run(clients())
        assert scheduler.statistics().cancelled == 1


def test_full_queue_is_told(sessions: Any) -> None:
    """Bounded: what does not fit is turned away, what fits is served."""
    with Scheduler(
        sessions("loop"), solver(max_lanes=1, max_batch_size=1), settings=Settings(max_queue=3)
    ) as scheduler:
        futures = [scheduler.submit(slow(10_000 if i == 0 else 1), budget_s=600) for i in range(10)]
        outcomes = [future.exception(60) for future in futures]
    assert outcomes[:4] == [None] * 4
    assert all(isinstance(outcome, QueueFull) and "max_queue" in str(outcome) for outcome in outcomes[4:])


def test_close_serves_what_waits(sessions: Any) -> None:
    """Draining loses nothing; afterwards nothing is accepted."""
    scheduler = Scheduler(sessions("identity"), solver(PER_BATCH))
    futures = [scheduler.submit(rows(i), budget_s=60) for i in range(200)]
    assert scheduler.close()
    assert all(future.done() for future in futures)
    assert [future.result()[0][0, 0] for future in futures] == list(range(200))
    with pytest.raises(SchedulerClosed, match="no request is accepted"):
        scheduler.submit(rows(0), budget_s=60)
    assert scheduler.close(), "again does nothing"
    assert scheduler.statistics().cpu_s > 0, "kept after closing"


def test_close_without_drain_tells_those_who_wait(sessions: Any) -> None:
    """The running batch finishes, the others get one clear error each."""
    scheduler = Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1))
    futures = [scheduler.submit(slow(20_000 if i == 0 else 1), budget_s=600) for i in range(5)]
    assert scheduler.close(drain=False)
    assert futures[0].result()
    assert all(isinstance(future.exception(), SchedulerClosed) for future in futures[1:])
    assert scheduler.statistics().rejected == {"closed": 4}


def test_close_gives_up_after_its_time_and_can_be_completed(sessions: Any) -> None:
    """A hanging model must not hang the shutdown; what waited is told, and a later call ends the rest."""
    before = set(threading.enumerate())
    scheduler = Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1))
    futures = [scheduler.submit(slow(40_000), budget_s=600) for _ in range(2)]
    assert not scheduler.close(timeout_s=0.0)
    assert isinstance(futures[1].exception(60), SchedulerClosed)
    assert futures[0].result(60), "what runs is not broken off"
    assert scheduler.close()
    assert set(threading.enumerate()) <= before


def test_close_from_a_callback_is_refused(sessions: Any) -> None:
    """It would wait for the thread that it runs on."""
    with Scheduler(sessions("identity"), solver()) as scheduler:
        caught: list[BaseException] = []
        called = threading.Event()

        def close(_: Any) -> None:
            try:
                scheduler.close()
            except RuntimeError as error:
                caught.append(error)
            called.set()

        scheduler.submit(rows(0), budget_s=60).add_done_callback(close)
        assert called.wait(60)
        # a callback that was added to a future already done runs on the client's own thread, which may close
        assert caught or scheduler.close()


def test_request_cancelled_while_it_is_turned_away_is_heard_of(sessions: Any) -> None:
    """Both events wait in the inbox: whoever waits for the future must hear of its end, and it counts once."""
    with Scheduler(sessions("identity"), solver()) as scheduler:
        with scheduler._engine._busy:
            future = scheduler.submit(rows(0), budget_s=-1.0)
            assert future.cancel()
        scheduler.submit(rows(1), budget_s=60).result(60)
        assert not wait([future], 60).not_done
        assert future.cancelled()
        statistics = scheduler.statistics()
    assert (statistics.submitted, statistics.met, statistics.cancelled, statistics.rejected) == (2, 1, 1, {})


def test_client_that_settles_its_future_is_left_alone(sessions: Any) -> None:
    """It is the client's business; the lane goes on."""
    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1)) as scheduler:
        first = scheduler.submit(slow(5_000), budget_s=600)
        second = scheduler.submit(slow(1), budget_s=600)
        second.set_result([])
        assert first.result(60)
        assert scheduler.submit(slow(1), budget_s=600).result(60)
        assert second.result() == []


def test_callback_that_exits_costs_nobody_else(sessions: Any, caplog: pytest.LogCaptureFixture) -> None:
    """``Future`` lets SystemExit through to the thread that settles it, which is a lane."""

    def leave(_: Any) -> None:
        raise SystemExit

    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1)) as scheduler:
        first = scheduler.submit(slow(5_000), budget_s=600)
        first.add_done_callback(leave)
        assert scheduler.submit(slow(1), budget_s=600).result(60)
        assert scheduler.submit(slow(1), budget_s=600).result(60)
    assert "callback of a future failed" in caplog.text


def test_deadline_in_centuries_does_not_end_the_alarm(sessions: Any) -> None:
    """A number that large is somebody's way to say none; the alarm still turns others away in time."""
    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1), name="patient") as scheduler:
        futures = [scheduler.submit(slow(5_000), budget_s=1e12) for _ in range(3)]
        assert not wait(futures, 60).not_done
        assert any(thread.name == "patient-alarm" for thread in threading.enumerate())


def test_recorder_that_fails_is_given_up(sessions: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk under a log must not end the service."""

    def record(now: float, event: Event, actions: list[Action]) -> None:
        raise OSError("no space left")

    with Scheduler(sessions("identity"), solver(), recorder=record) as scheduler:
        futures = [scheduler.submit(rows(i), budget_s=60) for i in range(50)]
        assert [future.result(60)[0][0, 0] for future in futures] == list(range(50))
    assert caplog.text.count("recorder failed") == 1


def test_scaler_that_fails_leaves_the_allocation(sessions: Any) -> None:
    """Whatever it raises: service goes on with what is in force, and the count says so."""

    class Broken(ThreadScaler):
        def scale(self, cores: float) -> float:
            raise OSError("gone")

    with Scheduler(sessions("identity"), solver(), Broken()) as scheduler:
        futures = [scheduler.submit(rows(i), budget_s=60) for i in range(50)]
        assert [future.result(60)[0][0, 0] for future in futures] == list(range(50))
        assert scheduler.statistics().cpu_control_errors > 0


def test_failed_start_leaves_no_thread(sessions: Any) -> None:
    """If the threads cannot be put under the quota, nothing that was started stays."""

    class Refusing(ThreadScaler):
        def adopt(self, thread_ids: Any) -> None:
            raise OSError("not permitted")

    session = sessions("identity")
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="not permitted"):
        Scheduler(session, solver(), Refusing())
    assert set(threading.enumerate()) <= before


def test_closing_ends_the_threads(sessions: Any) -> None:
    """Lanes and alarm are gone; nothing keeps the scheduler alive."""
    session = sessions("identity")
    before = set(threading.enumerate())
    scheduler = Scheduler(session, solver(), name="ending")
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert names == {"ending-lane-0", "ending-lane-1", "ending-alarm"}
    scheduler.close()
    assert set(threading.enumerate()) <= before
    gc.collect()


def test_callbacks_may_submit(sessions: Any) -> None:
    """A client's callback runs outside of the engine: submitting from it, even when turned away, is fine."""
    with Scheduler(sessions("identity"), solver()) as scheduler:
        done = threading.Event()
        chain: list[float] = []

        def again(future: Any) -> None:
            if len(chain) == 20:
                done.set()
                return
            chain.append(0.0 if future.exception() else float(future.result()[0][0, 0]))
            budget_s = 60.0 if len(chain) % 2 else -1.0
            scheduler.submit(rows(len(chain)), budget_s=budget_s).add_done_callback(again)

        scheduler.submit(rows(0), budget_s=60).add_done_callback(again)
        assert done.wait(60)
    assert chain == [0.0 if i % 2 == 0 else float(i) for i in range(20)]


def test_recorded_run_replays_to_the_same_actions(sessions: Any) -> None:
    """The promise that makes simulation mean something: same events, same instants, same actions."""
    log: list[tuple[float, Event, list[Action]]] = []
    plan = solver(PER_BATCH)
    rng = np.random.default_rng(0)
    with Scheduler(
        sessions("identity"), plan, recorder=lambda now, event, actions: log.append((now, event, list(actions)))
    ) as scheduler:
        futures = []
        for i in range(300):
            futures.append(scheduler.submit(rows(i), budget_s=float(rng.uniform(0.0, 0.2))))
            if i % 7 == 0:
                futures[-1].cancel()
        assert not wait(futures, 60).not_done
    again = Controller(plan)
    assert [again.handle(event, now=now) for now, event, _ in log] == [actions for _, _, actions in log]
    assert sum(isinstance(action, StartBatch) for _, _, actions in log for action in actions) > 10


def test_earliest_deadline_first_within_a_lane(sessions: Any) -> None:
    """What was queued behind a slow request leaves in the order of its deadlines."""
    with Scheduler(sessions("loop"), solver(max_lanes=1, max_batch_size=1)) as scheduler:
        order: list[int] = []
        first = scheduler.submit(slow(20_000), budget_s=600)
        futures = []
        for i, budget_s in enumerate([300.0, 100.0, 400.0, 200.0]):
            future = scheduler.submit(slow(1), budget_s=budget_s)
            future.add_done_callback(lambda _, i=i: order.append(i))
            futures.append(future)
        wait([first, *futures], 60)
    assert order == [1, 3, 0, 2]


def test_fixed_batch_axis_is_served_one_by_one(sessions: Any) -> None:
    """A request is then one run of the declared rows."""
    with Scheduler(sessions("fixed_batch"), solver(PER_BATCH)) as scheduler:
        assert scheduler.controller.max_batch_size == 1
        futures = [scheduler.submit(rows(i, 3), budget_s=60) for i in range(20)]
        assert all((future.result(60)[0] == 2 * i).all() for i, future in enumerate(futures))


def test_only_the_model_s_threads_are_limited(sessions: Any) -> None:
    """Lanes and workers are under the quota; the clients, the alarm and the main thread are not."""
    session = sessions("matmul_chain")
    if not CgroupScaler.probe().quota_allowed:
        pytest.skip(CgroupScaler.probe().explain())
    with CgroupScaler() as scaler, Scheduler(session, solver(), scaler, name="limited") as scheduler:
        x = {"x": np.ones((1, 512), dtype=np.float32)}
        for _ in range(5):
            scheduler.submit(x, budget_s=60).result(60)
        adopted = {
            thread.native_id for thread in threading.enumerate() if thread.name.startswith("limited-lane")
        } | set(session.thread_ids())
        groups = {tid: Path(f"/proc/self/task/{tid}/cgroup").read_text() for tid in adopted}
        assert all("sponge-" in text for text in groups.values())
        others = {int(path.name) for path in Path("/proc/self/task").iterdir()} - adopted
        assert others
        assert not any("sponge-" in Path(f"/proc/self/task/{tid}/cgroup").read_text() for tid in others)
        statistics = scheduler.statistics()
    assert "cgroup" in statistics.cpu_control
    assert statistics.resizes > 1
    assert statistics.allocated_core_s > 0
    assert statistics.cpu_s > 0
    assert statistics.cpu_control_errors == 0


def test_allocation_follows_the_load(sessions: Any) -> None:
    """Idle floor before and after, the lanes' cores in between."""
    log: list[float] = []

    class Recording(ThreadScaler):
        def scale(self, cores: float) -> float:
            log.append(cores)
            return super().scale(cores)

    with Scheduler(
        sessions("loop"), solver(max_batch_size=1), Recording(), settings=Settings(linger_s=0.0)
    ) as scheduler:
        wait([scheduler.submit(slow(5_000), budget_s=600) for _ in range(4)], 60)
    assert log[0] == log[-1] == Settings().idle_cores
    assert max(log) == 2.0


def test_arguments_that_do_not_fit_are_refused(sessions: Any) -> None:
    """At construction, naming what is wrong."""
    session = sessions("identity")
    with pytest.raises(ValueError, match="max_threads=2, got 4"):
        Scheduler(session, solver(max_cores=4))
    with pytest.raises(ValueError, match="solver must be given"):
        Scheduler(session)
    with pytest.raises(ValueError, match="slo_s must be positive, got -1"):
        Scheduler(session, solver(), slo_s=-1)
