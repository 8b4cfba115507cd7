"""What observers of a scheduler are told, and that they cannot harm it; on real ONNX Runtime sessions."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import numpy as np
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.core.values import RejectReason, Request
from sponge.errors import DeadlineExceeded, ModelError
from sponge.live.observing import Observer, ServedBatch
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    """Looks up a table: an index out of range makes the model raise."""
    with ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as made:
        yield made


def solver(latency: LatencyModel = FAST) -> Solver:
    return Solver(latency, max_cores=2, max_batch_size=16, max_lanes=2)


def index(value: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"i": np.array([value], dtype=np.int64)}


class Notebook(Observer):
    """Keeps all it is told."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.gone: dict[int, RejectReason | None] = {}
        self.batches: list[ServedBatch] = []
        self.cores: list[float] = []

    def submitted(self, request: Request) -> None:
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request

    def left(self, request: Request, reason: RejectReason | None, now: float) -> None:
        assert self.requests[request.request_id] is request
        assert request.request_id not in self.gone
        self.gone[request.request_id] = reason

    def served(self, served: ServedBatch) -> None:
        self.batches.append(served)

    def resized(self, cores: float, now: float) -> None:
        self.cores.append(cores)

    def answered(self) -> Counter[int]:
        return Counter(
            r.request_id for batch in self.batches for run in batch.runs if run.answered for r in run.requests
        )


def test_every_request_is_told_in_once_and_out_once(session: ElasticSession) -> None:
    """Served, failed, turned away or cancelled: what comes in goes out exactly once, as the statistics count it."""
    seen = Notebook()
    with Scheduler(session, solver()) as scheduler:
        scheduler.observe(seen)
        futures = [scheduler.submit(index(1000 if i % 50 == 7 else i), budget_s=60) for i in range(100)]
        futures += [scheduler.submit(index(1), budget_s=-1.0) for _ in range(5)]
        for future in futures[::9]:
            future.cancel()
        wait(futures)
    found = scheduler.statistics()
    answered = seen.answered()
    assert set(answered.values()) == {1}
    assert answered.keys() | seen.gone.keys() == seen.requests.keys() == set(range(105))
    assert not answered.keys() & seen.gone.keys()
    assert len(answered) == found.met + found.late + found.failed
    reasons = Counter(seen.gone.values())
    assert reasons[None] == found.cancelled
    assert reasons[RejectReason.DEADLINE] == found.rejected.get("deadline", 0) == 5
    assert len(seen.batches) == found.batches
    failed = [run for batch in seen.batches for run in batch.runs if run.answered and run.error is not None]
    assert len(failed) == found.failed
    assert all(len(run.requests) == 1 for run in failed)
    assert seen.cores[0] > 0
    assert len(seen.cores) >= found.resizes


def test_runs_tell_when_they_were(session: ElasticSession) -> None:
    """Arrival, lane, run and end are in order, on the scheduler's clock."""
    seen = Notebook()
    with Scheduler(session, solver()) as scheduler:
        scheduler.observe(seen)
        before = scheduler.now()
        wait([scheduler.submit(index(i), budget_s=60) for i in range(20)])
    after = scheduler.now()
    for batch in seen.batches:
        (run,) = batch.runs
        assert batch.as_planned
        assert run.rows == batch.batch.rows == len(run.requests)
        assert before <= min(request.arrived_at for request in run.requests)
        assert max(request.arrived_at for request in run.requests) <= batch.started_at <= run.finished_at <= after
        assert batch.started_at - 1e-3 <= run.started_at <= run.finished_at


def test_a_batch_that_is_parted_tells_all_its_runs(session: ElasticSession) -> None:
    """The run that failed for all answers nobody; the culprit's answers it with the error."""
    held = threading.Event()
    seen = Notebook()
    with Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=16, max_lanes=1)) as scheduler:
        first = scheduler.submit(index(0), budget_s=60)
        first.add_done_callback(lambda _: held.wait(60))  # keeps the only lane, so that the others wait together
        first.result(60)
        scheduler.observe(seen)
        futures = [scheduler.submit(index(1000 if i == 2 else i), budget_s=60) for i in range(4)]
        held.set()
        wait(futures)
        with pytest.raises(ModelError):
            futures[2].result()
    (batch,) = seen.batches
    assert not batch.as_planned
    assert [(len(run.requests), run.answered, run.error is None) for run in batch.runs] == [
        (4, False, False),
        (2, True, True),
        (2, False, False),
        (1, True, False),
        (1, True, True),
    ]


@pytest.mark.parametrize("method", ["submitted", "left", "served", "resized"])
def test_an_observer_that_raises_is_dropped(
    session: ElasticSession, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Its error is logged once, others are still told, and every client has its answer."""
    calls = []

    def broken(*_: Any) -> None:
        calls.append(method)
        raise RuntimeError("a broken observer")

    bad, good = Observer(), Notebook()
    setattr(bad, method, broken)
    with caplog.at_level(logging.ERROR, "sponge"), Scheduler(session, solver()) as scheduler:
        scheduler.observe(bad)
        scheduler.observe(good)
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                scheduler.submit(index(1), budget_s=-1).result(60)
            assert scheduler.submit(index(3), budget_s=60).result(60)[0] == [30]
    assert calls == [method]
    assert caplog.text.count("is told nothing any more") == 1
    assert len(good.requests) == 6
    assert len(good.gone) == len(good.answered()) == 3


def test_who_stops_watching_is_told_nothing(session: ElasticSession) -> None:
    """A request under way when watching begins, or ends, is nobody's error."""
    seen = Notebook()
    with Scheduler(session, solver()) as scheduler:
        stop = scheduler.observe(seen)
        stop()
        stop()
        scheduler.submit(index(1), budget_s=60).result(60)
        cancelled = scheduler.submit(index(1), budget_s=60)
        if cancelled.cancel():
            with pytest.raises(CancelledError):
                cancelled.result()
    assert not seen.requests
    assert not seen.batches
