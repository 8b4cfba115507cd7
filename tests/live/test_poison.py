"""Requests and models that are out to do harm: whoever sent them hears of it, and nobody else is harmed."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from sponge.core.controller import Controller
from sponge.core.events import Arrived, Event, Tick
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded, ModelError, SchedulerClosed
from sponge.live import scheduler as scheduler_module
from sponge.live.observing import ModelRun, Observer, ServedBatch
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

PER_BATCH = LatencyModel(1e-6, 0.0, 0.0, 1e-2)
"""A batch costs the same whatever its size: the controller likes large ones."""

Inputs = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make sessions of the test models, once each."""
    made: dict[str, ElasticSession] = {}
    cache = tmp_path_factory.mktemp("cache")

    def get(name: str) -> ElasticSession:
        if name not in made:
            made[name] = ElasticSession(getattr(models, name)(), max_threads=2, max_lanes=2, cache_dir=cache)
        return made[name]

    yield get
    for session in made.values():
        session.close()


def solver(**changes: Any) -> Solver:
    return Solver(PER_BATCH, **{"max_cores": 2, "max_batch_size": 16, "max_lanes": 1, **changes})


def turns(number: int, value: float = 0.0) -> Inputs:
    """Input of the ``loop`` model, which returns the value after that many turns; 10,000 take some 0.3 s."""
    return {"x": np.full(1, value, dtype=np.float32), "rounds": np.array([number])}


def submit_at_once(
    scheduler: Scheduler,
    first: Inputs,
    others: list[tuple[Inputs, float]],
    then: Callable[[], object] = lambda: None,
) -> list[Future[Any]]:
    """Submit requests with their budgets so that they wait together, beside one that is in no hurry.

    *then* is done before any of them is handled. The other one has been answered when this returns.
    """
    with scheduler._engine._busy:  # all wait in the inbox, and are handled in one go
        patient = scheduler.submit(first, budget_s=600)
        futures = [scheduler.submit(inputs, budget_s=budget_s) for inputs, budget_s in others]
        then()
    scheduler._engine._wake()
    patient.exception(60)
    return futures


class Runs(Observer):
    """Notes every run of the model."""

    def __init__(self) -> None:
        self.noted: list[ModelRun] = []

    def served(self, served: ServedBatch) -> None:
        self.noted.extend(served.runs)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Raising(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, name: str) -> Any:
        raise OSError("the file behind this mapping is gone")

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


GOOD = np.ones((1, 4), dtype=np.float32)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "wrong name": ({"z": GOOD}, ValueError, "input 'x' is missing"),
    "one name too many": ({"x": GOOD, "z": GOOD}, ValueError, "no input 'z'"),
    "no input": ({}, ValueError, "input 'x' is missing"),
    "a name that is no string": ({3: GOOD}, ValueError, "input 'x' is missing"),
    "no mapping": ([("x", GOOD)], TypeError, "must be a mapping"),
    "nothing": (None, TypeError, "must be a mapping"),
    "wrong width": ({"x": np.ones((1, 5), np.float32)}, ValueError, "axis 1 of input 'x' must be 4"),
    "one axis too few": ({"x": np.ones(4, np.float32)}, ValueError, "must have 2 axes"),
    "one axis too many": ({"x": np.ones((1, 1, 4), np.float32)}, ValueError, "must have 2 axes"),
    "no axis": ({"x": np.array(1, np.float32)}, ValueError, "must have 2 axes"),
    "a number": ({"x": np.float32(1)}, TypeError, "must be a numpy.ndarray"),
    "a list": ({"x": [[1.0, 2.0, 3.0, 4.0]]}, TypeError, "must be a numpy.ndarray"),
    "no rows": ({"x": np.ones((0, 4), np.float32)}, ValueError, "has no rows"),
    "too many rows": ({"x": np.ones((17, 4), np.float32)}, ValueError, "max_batch_size=16 rows, got 17"),
    "wrong dtype": ({"x": np.ones((1, 4))}, TypeError, "must be of dtype float32, got float64"),
    "the other byte order": ({"x": GOOD.astype(">f4")}, TypeError, "must be of dtype float32, got >f4"),
    "objects": ({"x": GOOD.astype(object)}, TypeError, "must be of dtype float32, got object"),
    "strings": ({"x": GOOD.astype(str)}, TypeError, "must be of dtype float32, got <U"),
    "records": ({"x": np.zeros((1, 4), "f4,f4")}, TypeError, "must be of dtype float32"),
    "instants": ({"x": np.zeros((1, 4), "M8[s]")}, TypeError, "must be of dtype float32, got datetime64"),
    "a mapping that raises": (Raising(), OSError, "mapping is gone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_at_once(sessions: Any, case: str) -> None:
    """The caller hears of it, naming input and value; it is no request, and the batch that it came amid is served."""
    inputs, kind, match = REFUSED[case]
    with Scheduler(sessions("identity"), solver(), slo_s=60) as scheduler:
        futures = [scheduler.submit({"x": GOOD}) for _ in range(8)]
        with pytest.raises(kind, match=match):
            scheduler.submit(inputs)
        futures += [scheduler.submit({"x": GOOD}) for _ in range(8)]
        assert all(np.array_equal(future.result(60)[0], GOOD) for future in futures)
        assert scheduler.statistics().submitted == 16


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["list"], Unprintable()], ids=lambda value: type(value).__name__)
def test_objects_among_strings_are_refused(sessions: Any, value: Any) -> None:
    """ONNX Runtime makes text of anything, None included, and crashes the process where that raises."""
    array = np.array([["a", "b"]], dtype=object)
    with Scheduler(sessions("strings"), solver(), slo_s=60) as scheduler:
        assert scheduler.submit({"x": array}).result(60)
        array[0, 1] = value
        for submit in (scheduler.submit, sessions("strings").run):
            with pytest.raises(TypeError, match="input 'x' must hold str only, got"):
                submit({"x": array})


# -- odd but right -----------------------------------------------------------------------------------------------------


class Tagged(np.ndarray[Any, Any]):
    """A subclass whose view is not to be trusted."""

    def view(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("must not be called")


def odd_arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of shape (1, 4) that hold 32-bit floats in unusual ways."""
    plain = np.array([[1.5, -2.5, 3.5, -4.5]], dtype=np.float32)
    frozen = plain.copy()
    frozen.flags.writeable = False
    np.save(folder / "plain.npy", plain)
    masked = np.ma.masked_array(plain, mask=[[0, 1, 0, 0]])
    return {
        "every other": np.repeat(plain, 2, axis=1)[:, ::2],
        "backwards": plain[:, ::-1],
        "by columns": np.asfortranarray(np.vstack([plain, plain]))[:1],
        "one value": np.broadcast_to(np.float32(7), (1, 4)),
        "strides of megabytes": np.lib.stride_tricks.as_strided(
            np.arange(1 << 20, dtype=np.float32), (1, 4), (4, 1 << 20)
        ),
        "unaligned": np.frombuffer(b"." + plain.tobytes(), dtype=np.float32, offset=1).reshape(1, 4),
        "read-only": frozen,
        "a file": np.load(folder / "plain.npy", mmap_mode="r"),
        "masked": masked,
        "a matrix": plain.copy().view(np.matrix),
        "a subclass": plain.copy().view(Tagged),
        "not numbers": np.array([[np.nan, np.inf, -np.inf, -0.0]], dtype=np.float32),
        "denormal": np.full((1, 4), 1e-42, dtype=np.float32),
    }


def test_odd_arrays_are_served_alone_and_together(sessions: Any, tmp_path: Path) -> None:
    """Whatever lies in memory how, each gets the bits that it sent, and no neighbour is touched."""
    arrays = odd_arrays(tmp_path)
    with Scheduler(sessions("identity"), solver(), slo_s=60) as scheduler:
        alone = {name: scheduler.submit({"x": array}).result(60)[0] for name, array in arrays.items()}
        together = {name: scheduler.submit({"x": array}) for name, array in arrays.items()}
        for name, array in arrays.items():
            sent = np.ascontiguousarray(np.asarray(array)).tobytes()
            assert alone[name].tobytes() == sent, name
            assert together[name].result(60)[0].tobytes() == sent, name


def test_rows_that_are_not_numbers_do_not_spread(sessions: Any) -> None:
    """Rows are joined, not mixed: beside NaN and infinity the others come out as they do without."""
    bare = ort.InferenceSession(models.matmul_chain())
    rng = np.random.default_rng(0)
    requests = [rng.standard_normal((1, 512), dtype=np.float32) for _ in range(16)]
    for i, value in ((3, np.nan), (8, np.inf), (12, 1e38)):
        requests[i][:] = value
    with Scheduler(sessions("matmul_chain"), solver(), slo_s=60) as scheduler:
        futures = [scheduler.submit({"x": x}) for x in requests]
        for x, future in zip(requests, futures, strict=True):
            np.testing.assert_allclose(future.result(60)[0], bare.run(None, {"x": x})[0], atol=1e-4)


# -- changed after submitting ------------------------------------------------------------------------------------------


def replace(inputs: Inputs) -> None:
    inputs["x"] = np.zeros(3, dtype=np.float32)
    inputs["rounds"] = np.ones(3, dtype=np.int64)


def recast(inputs: Inputs) -> None:
    inputs["x"] = inputs["x"].astype(np.float64)


def empty(inputs: Inputs) -> None:
    inputs.clear()


def swell(inputs: Inputs) -> None:
    inputs["z"] = inputs["x"]


def reshape(inputs: Inputs) -> None:
    inputs["x"].shape = (1, 1)


def reinterpret(inputs: Inputs) -> None:
    inputs["x"].dtype = np.dtype(np.int32)


@pytest.mark.parametrize("change", [replace, recast, empty, swell, reshape, reinterpret])
@pytest.mark.parametrize("culprit", [0, 5])
def test_what_is_done_to_inputs_after_submitting_harms_nobody(
    sessions: Any, change: Callable[[Inputs], None], culprit: int
) -> None:
    """The mapping and its arrays' shapes are as they were; the batch is joined from what was checked."""
    with Scheduler(sessions("loop"), solver(), slo_s=600, settings=Settings(hold=False)) as scheduler:
        runs = Runs()
        scheduler.observe(runs)
        requests = [turns(1, float(i)) for i in range(16)]
        futures = submit_at_once(
            scheduler, turns(1), [(inputs, 60.0) for inputs in requests], then=lambda: change(requests[culprit])
        )
        assert [future.result(60)[0].tolist() for future in futures] == [[float(i)] for i in range(16)]
        assert scheduler.submit(turns(1, 3.0)).result(60)[0].tolist() == [3.0], "and nothing stays behind"
    assert max(run.rows for run in runs.noted) == 16
    assert all(run.error is None for run in runs.noted)


@pytest.mark.parametrize("copy_inputs", [False, True])
def test_numbers_changed_after_submitting(sessions: Any, copy_inputs: bool) -> None:
    """Without a copy the client that writes into its array gets what it wrote, and nobody else does."""
    settings = Settings(hold=False)
    with Scheduler(sessions("loop"), solver(), settings=settings, copy_inputs=copy_inputs) as scheduler:
        requests = [turns(1, float(i)) for i in range(16)]
        futures = submit_at_once(
            scheduler, turns(1), [(inputs, 60.0) for inputs in requests], then=lambda: requests[5]["x"].fill(99.0)
        )
        results = [future.result(60)[0][0] for future in futures]
    assert results[5] == (5.0 if copy_inputs else 99.0)
    assert results[:5] + results[6:] == [float(i) for i in range(16) if i != 5]


def test_strings_changed_after_submitting(sessions: Any) -> None:
    """They are always copied: an object that is no string would crash ONNX Runtime."""
    with Scheduler(sessions("strings"), solver(), slo_s=600) as scheduler:
        with scheduler._engine._busy:  # nothing is started meanwhile
            arrays = [np.array([[f"a{i}", "b"]], dtype=object) for i in range(4)]
            futures = [scheduler.submit({"x": array}) for array in arrays]
            for array in arrays:
                array[0, 1] = Unprintable()
        scheduler.submit({"x": np.array([["c", "d"]], dtype=object)}).result(60)
        assert [future.result(60)[0].tolist() for future in futures] == [[[f"a{i}", "b"]] for i in range(4)]


# -- inputs that make the model raise ----------------------------------------------------------------------------------


def index(value: int) -> Inputs:
    return {"i": np.array([value])}


POISON: dict[str, tuple[str, Callable[[int], Inputs], Inputs, Callable[[int], list[Any]]]] = {
    # model, a good request by number, the poisonous one, the good one's answer
    "index out of range": ("lookup", index, index(999), lambda i: [10.0 * i]),
    "no number": (
        "parsed",
        lambda i: {"x": np.array([str(i)], dtype=object)},
        {"x": np.array(["none"], dtype=object)},
        lambda i: [float(i)],
    ),
    "no memory": (
        "expanded",
        lambda i: {"x": np.array([i], np.float32), "n": np.array([1])},
        {"x": np.array([0], np.float32), "n": np.array([1 << 44])},
        lambda i: [float(i)],
    ),
    "overflow of a size": (
        "expanded",
        lambda i: {"x": np.array([i], np.float32), "n": np.array([1])},
        {"x": np.array([0], np.float32), "n": np.array([1 << 62])},
        lambda i: [float(i)],
    ),
    "no such shape": (
        "reshaped",
        lambda i: {"x": np.array([i], np.float32), "n": np.array([1])},
        {"x": np.array([0], np.float32), "n": np.array([2])},
        lambda i: [float(i)],
    ),
}


@pytest.mark.parametrize("case", POISON)
def test_one_request_that_makes_the_model_raise(sessions: Any, case: str) -> None:
    """It fails with the model's own words; the fifteen beside it are answered, and in time."""
    name, good, bad, answer = POISON[case]
    with Scheduler(sessions(name), solver(), settings=Settings(hold=False)) as scheduler:
        futures = submit_at_once(scheduler, good(0), [(bad if i == 5 else good(i), 60.0) for i in range(16)])
        for i, future in enumerate(futures):
            if i == 5:
                with pytest.raises(ModelError, match="the model failed on request 6: ") as caught:
                    future.result(60)
                assert caught.value.__cause__ is not None
            else:
                assert future.result(60)[0].tolist() == answer(i)
        statistics = scheduler.statistics()
    assert (statistics.met, statistics.late, statistics.failed, statistics.batches) == (16, 0, 1, 2)


@pytest.mark.parametrize(
    ("culprits", "expected_runs"),
    [({5}, 9), ({0}, 9), ({15}, 9), ({0, 15}, 15), (set(range(16)), 31)],
)
def test_search_for_the_culprit(sessions: Any, culprits: set[int], expected_runs: int) -> None:
    """Halving takes 1 + 2·log2(16) runs for one culprit; the urgent are answered first; the drift does not see it."""
    with Scheduler(sessions("lookup"), solver(), settings=Settings(hold=False)) as scheduler:
        for _ in range(100):
            runs = Runs()
            stop = scheduler.observe(runs)
            last_is_most_urgent = [(index(999 if i in culprits else i), 60.0 + i) for i in reversed(range(16))]
            futures = submit_at_once(scheduler, index(-999), last_is_most_urgent)
            assert not wait(futures, 60).not_done
            assert scheduler._engine.wait_until_idle(Tick(), 60)
            stop()
            searched = [run for run in runs.noted if run.requests[0].deadline - run.requests[0].arrived_at < 100]
            assert len(searched) == expected_runs
            assert sum(run.error is not None and run.answered for run in searched) == len(culprits)
            tried = [request for run in searched for request in run.requests if run.answered]
            assert tried == sorted(tried, key=lambda request: request.deadline)
        controller = scheduler.controller
        assert isinstance(controller, Controller)
        assert controller.drift_scale() == 1.0


def test_model_that_always_raises(sessions: Any) -> None:
    """Each request gets an error of its own, in less than two runs a request, and the service goes on."""
    with Scheduler(sessions("lookup"), solver(), slo_s=60) as scheduler:
        runs = Runs()
        scheduler.observe(runs)
        futures = [scheduler.submit(index(-999)) for _ in range(1000)]
        errors = [future.exception(60) for future in futures]
        assert all(isinstance(error, ModelError) for error in errors)
        assert [error.request_id for error in errors if isinstance(error, ModelError)] == list(range(1000))
        assert scheduler.submit(index(3)).result(60)[0].tolist() == [30.0]
        assert scheduler.statistics().failed == 1000
    assert 1000 <= len(runs.noted) <= 2000


def test_errors_do_not_keep_the_inputs(sessions: Any) -> None:
    """A service that logs errors must not thereby keep the images that caused them, nor wait for the collector."""
    gc.collect()
    gc.disable()
    try:
        with Scheduler(sessions("lookup"), solver(), slo_s=60) as scheduler:
            arrays = [np.array([-999]) for _ in range(16)]
            dropped = [weakref.ref(array) for array in arrays]
            futures = [scheduler.submit({"i": array}) for array in arrays]
            errors = [future.exception(60) for future in futures]
            del arrays, futures
            scheduler.submit(index(1)).result(60)  # the lane has let go of the batch
            assert [ref() for ref in dropped] == [None] * 16
            assert all(isinstance(error, ModelError) for error in errors)
    finally:
        gc.enable()


def test_model_whose_rows_cannot_be_told_apart(sessions: Any) -> None:
    """Once that has shown, requests are not joined any more: a batch of as many rows by chance would be misread."""
    session = ElasticSession(models.positive_rows(), max_threads=1)
    with session, Scheduler(session, solver(max_cores=1), slo_s=60) as scheduler:
        runs = Runs()
        scheduler.observe(runs)
        for _ in range(3):
            xs = [np.full((1, 4), i % 3, dtype=np.float32) for i in range(20)]
            futures = [scheduler.submit({"x": x}) for x in xs]
            assert [len(future.result(60)[0]) for future in futures] == [int(i % 3 > 0) for i in range(20)]
        assert not session.separable
    joined = [len(run.requests) > 1 for run in runs.noted]
    assert joined.count(True) == 1
    assert "one by one" in session.notes[-1]


def test_warming_up_tells_whether_rows_can_be_told_apart() -> None:
    """Better known before the first request than by its wrong answer."""
    places = models.with_output(
        models.tensor("y", models.INT64, ["found", 2]),
        models.node("NonZero", ["x"], ["columns"]),
        models.node("Transpose", ["columns"], ["y"]),
    )
    with ElasticSession(places, max_threads=1) as session:
        assert session.separable
        session.warm_up([1, 4], shapes={"x": (3,)})
        assert not session.separable
    with ElasticSession(models.identity(), max_threads=1) as session:
        session.warm_up([1, 4])
        assert session.separable


# -- a model that hangs ------------------------------------------------------------------------------------------------

HANG = 100_000
"""Turns of the loop: some seconds, on one thread."""


def test_hanging_batch_holds_up_only_its_lane(sessions: Any) -> None:
    """The other lane serves on."""
    with Scheduler(sessions("loop"), solver(max_batch_size=1, max_lanes=2), slo_s=600) as scheduler:
        hanging = scheduler.submit(turns(HANG))
        for i in range(20):
            assert scheduler.submit(turns(1, float(i))).result(60)[0].tolist() == [float(i)]
        assert not hanging.done()
        assert hanging.result(120)


def test_who_waits_for_a_hanging_model_is_told(sessions: Any) -> None:
    """As soon as it is certain, not when the model comes back; and closing does not wait longer than it was told."""
    scheduler = Scheduler(sessions("loop"), solver(max_batch_size=1))
    hanging = scheduler.submit(turns(HANG), budget_s=600)
    while not scheduler.statistics().running:
        time.sleep(0.001)
    late = [scheduler.submit(turns(1), budget_s=0.2 + 0.01 * i) for i in range(10)]
    patient = scheduler.submit(turns(1), budget_s=600)
    assert all(isinstance(future.exception(60), DeadlineExceeded) for future in late)
    assert not hanging.done()
    assert not scheduler.close(timeout_s=0.0)
    assert isinstance(patient.exception(60), SchedulerClosed)
    assert not hanging.done()
    assert scheduler.close()
    assert hanging.done()


def test_lane_outlives_whatever_goes_wrong_in_it(sessions: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its own code fails once, in the midst of answering: the request has an error, and the next is served."""
    with Scheduler(sessions("identity"), solver(max_lanes=1), slo_s=60, name="frail") as scheduler:
        assert scheduler.submit({"x": GOOD}).result(60)
        (lane,) = scheduler._service._lanes
        answer = lane._answer

        def fail_once(*arguments: Any) -> float:
            lane._answer = answer  # type: ignore[method-assign]
            raise OSError("something that cannot happen")

        lane._answer = fail_once  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="something that cannot happen"):
            scheduler.submit({"x": GOOD}).result(60)
        assert scheduler.submit({"x": GOOD}).result(60)
        statistics = scheduler.statistics()
    assert (statistics.met, statistics.failed, statistics.running) == (2, 1, 0)
    assert "in the midst of a batch" in caplog.text


# -- many shapes -------------------------------------------------------------------------------------------------------


def test_ever_new_shapes_do_not_fill_the_memory(sessions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of shapes is bounded, and forgetting one mixes nothing up."""
    monkeypatch.setattr(scheduler_module, "MAX_GROUPS", 16)
    with Scheduler(sessions("any_width"), solver(), slo_s=60) as scheduler:
        futures = {}
        for width in [*range(1, 100), *range(1, 100)]:
            futures[scheduler.submit({"x": np.full((1, width), width, dtype=np.float32)})] = width
        for future, width in futures.items():
            assert future.result(60)[0].tolist() == [[float(width)] * width]
        assert len(scheduler._groups) <= 16


def test_shapes_that_come_at_once_get_numbers_of_their_own(sessions: Any) -> None:
    """Two shapes with one number would be joined into one batch."""
    groups: list[int] = []

    def record(now: float, event: Event, actions: Any) -> None:
        if isinstance(event, Arrived):
            groups.append(event.request.group)

    class Meeting(dict[Any, int]):
        """Lets two threads come as far as this before either goes on."""

        def setdefault(self, key: Any, value: int = 0) -> int:
            barrier.wait(60)
            return super().setdefault(key, value)

    barrier = threading.Barrier(2)
    with Scheduler(sessions("any_width"), solver(), slo_s=60, recorder=record) as scheduler:
        scheduler._groups = Meeting()
        xs = [np.ones((1, width), dtype=np.float32) for width in (3, 5)]
        threads = [threading.Thread(target=lambda x=x: scheduler.submit({"x": x}).result(60)) for x in xs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(groups)) == 2
