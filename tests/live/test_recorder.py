"""What a scheduler remembers for its report, on real ONNX Runtime sessions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.core.values import Batch, RejectReason, Request
from sponge.live.observing import ModelRun, ServedBatch
from sponge.live.recorder import RunRecorder
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from sponge.measure import Ending
from tests.live import models

SOLVER = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=2, max_batch_size=16, max_lanes=2)


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    """Looks up a table: an index out of range makes the model raise."""
    with ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as made:
        yield made


def index(value: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"i": np.array([value], dtype=np.int64)}


def test_recording_agrees_with_the_statistics(session: ElasticSession) -> None:
    """Two ways of counting the same run; the second is what is shown to people."""
    with Scheduler(session, SOLVER, name="mine") as scheduler:
        scheduler.record()
        futures = [scheduler.submit(index(1000 if i % 50 == 7 else i), budget_s=60) for i in range(100)]
        futures += [scheduler.submit(index(1), budget_s=-1) for _ in range(5)]
        futures += [scheduler.submit(index(1), budget_s=math.inf)]
        wait(futures)
    found, run = scheduler.statistics(), scheduler.recording()
    assert run.name == "mine"
    assert len(run) == found.submitted == 106
    assert run.count(Ending.MET) == found.met
    assert run.count(Ending.LATE) == found.late
    assert run.count(Ending.FAILED) == found.failed == 2
    assert run.count(Ending.REJECTED) == 5
    assert len(run.batch_rows) == found.batches
    assert np.all(np.diff(run.arrived_at_s) >= 0)
    assert np.count_nonzero(run.budget_s == math.inf) == 1
    served = np.isfinite(run.finished_at_s)
    assert np.count_nonzero(served) == found.met + found.late
    assert np.all(run.queue_delay_s[served] >= 0)
    assert np.all(run.response_s[served] >= run.queue_delay_s[served])
    assert run.allocation.end_s >= run.finished_at_s[served].max()
    # What was allocated before the recording began is in the statistics alone.
    assert 0 < run.allocation.core_seconds <= found.allocated_core_s + 1e-9
    assert run.facts["enforced by"] == "threads"
    assert run.fastest_s == pytest.approx(SOLVER.latency.latency_s(1, 2))


def test_a_closed_scheduler_allocates_no_more(session: ElasticSession) -> None:
    """What is paid for ends with the scheduler, however late somebody asks."""
    now = 0.0
    with Scheduler(session, SOLVER, clock=lambda: now) as scheduler:
        scheduler.record()
        scheduler.submit(index(1), budget_s=60).result(60)
    before = scheduler.statistics().allocated_core_s, scheduler.recording().allocation.core_seconds
    now = 1e6
    assert (scheduler.statistics().allocated_core_s, scheduler.recording().allocation.core_seconds) == before


def test_report_is_a_page(session: ElasticSession, tmp_path: Path) -> None:
    """The few lines of the documentation."""
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        with pytest.raises(RuntimeError, match="call record"):
            scheduler.report(tmp_path / "too-soon.html")
        scheduler.record(limit=50)
        wait([scheduler.submit(index(i), budget_s=60) for i in range(80)])
        scheduler.report(tmp_path / "report.html")  # while it runs
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What the scheduler &#x27;detector&#x27; did" in text
    assert "earlier ones are no longer remembered" in text
    assert not (tmp_path / "too-soon.html").exists()


def batch(number: int, requests: int = 4) -> ServedBatch:
    """One of a regular run: a batch each second, arrived half a second before."""
    ids = tuple(range(number * requests, (number + 1) * requests))
    made = tuple(Request(request_id=i, arrived_at=number - 0.5, deadline=number + 1.0) for i in ids)
    planned = Batch(batch_id=number, request_ids=ids, rows=4, group=0, lane=0, cores=1, threads=1, expected_s=0.25)
    run = ModelRun(requests=made, rows=requests, started_at=number, finished_at=number + 0.5, answered=True)
    return ServedBatch(batch=planned, started_at=number, runs=(run,))


def test_memory_is_bounded_and_the_last_is_kept() -> None:
    """A service runs for months; what is remembered is the end, and consistent in itself."""
    recorder = RunRecorder(100)
    for number in range(1000):
        recorder.resized(1.0 + number % 2, float(number))
        recorder.served(batch(number))
        if number % 10 == 0:
            recorder.left(Request(request_id=-1, arrived_at=number, deadline=number), RejectReason.QUEUE_FULL, number)
    run = recorder.recording("r", 1000.0, fastest_s=math.nan, facts={})
    assert len(run) <= 100
    assert len(run) + run.forgotten == 4100
    assert len(run) >= 90
    assert run.arrived_at_s[0] == 0.0
    assert np.all(run.queue_delay_s[np.isfinite(run.finished_at_s)] == 0.5)
    assert run.count(Ending.QUEUE_FULL) in (2, 3)
    assert len(run.batch_rows) == 100
    assert np.all(run.batch_s / run.batch_expected_s == 2.0)
    assert run.allocation.mean_cores == pytest.approx(1.5, abs=0.05)
    assert run.allocation.end_s == 1000.0 - 974.5
    size = sum(ring._values.itemsize * len(ring._values) for ring in (recorder._requests, recorder._batches))
    assert size <= 64 * 100


def test_a_recording_of_nothing_is_empty() -> None:
    """Asked for before anybody came."""
    run = RunRecorder(10).recording("r", 5.0, fastest_s=math.nan, facts={})
    assert len(run) == 0
    assert run.allocation.core_seconds == 0.0
    with pytest.raises(ValueError, match="limit must be an integer of at least 1, got 0"):
        RunRecorder(0)
