"""Spans and metrics as the OpenTelemetry SDK exports them, of a scheduler on real ONNX Runtime sessions."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded
from sponge.integrations import opentelemetry as ours
from sponge.integrations.opentelemetry import instrument
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

SOLVER = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=1, max_batch_size=16, max_lanes=1)


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    """Looks up a table: an index out of range makes the model raise."""
    with ElasticSession(models.lookup(), max_threads=1, max_lanes=1) as made:
        yield made


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracers(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def index(value: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"i": np.array([value], dtype=np.int64)}


def named(spans: tuple[ReadableSpan, ...], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def attribute(span: ReadableSpan, name: str) -> Any:
    assert span.attributes is not None
    return span.attributes[name]


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def identity(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def test_a_request_is_in_the_trace_that_it_came_from(
    session: ElasticSession, tracers: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """Client, request and queue in one trace; batch and run in another, linked in both directions."""
    began, tracer = time.time_ns(), tracers.get_tracer("client")
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        instrument(scheduler, tracer_provider=tracers)
        with tracer.start_as_current_span("client") as client:
            scheduler.submit(index(1), budget_s=60).result(60)
    spans = exporter.get_finished_spans()
    (request,), (queue,), (batch,), (run,) = (
        named(spans, f"sponge.{name}") for name in ("request", "queue", "batch", "run")
    )
    assert request.parent == client.get_span_context()
    assert identity(request)[0] == identity(queue)[0] == client.get_span_context().trace_id
    assert parent(queue) == identity(request)[1]
    assert parent(batch) is None
    assert parent(run) == identity(batch)[1]
    assert identity(batch)[0] != identity(request)[0]
    assert [link.context for link in batch.links] == [request.context]
    assert [link.context for link in request.links] == [batch.context]
    assert attribute(request, "sponge.request.outcome") == "met"
    assert attribute(request, "sponge.request.budget_s") == pytest.approx(60, abs=0.01)
    assert attribute(batch, "sponge.batch.rows") == 1
    assert attribute(batch, "sponge.scheduler") == "detector"
    # One after the other, on the wall clock (to a millisecond: the scheduler's is another one).
    instants = [began, request.start_time, queue.end_time, run.end_time, request.end_time, time.time_ns()]
    assert all(b - a > -1_000_000 for a, b in pairwise(instants) if a is not None and b)
    assert request.start_time == queue.start_time
    assert run.start_time == queue.end_time


def test_a_batch_links_its_requests_and_shows_the_culprit(
    session: ElasticSession, tracers: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """Four clients' traces meet in one batch; the request at fault is the one whose span is an error."""
    held = threading.Event()
    tracer = tracers.get_tracer("client")
    clients, futures = [], []
    with Scheduler(session, SOLVER) as scheduler:
        first = scheduler.submit(index(0), budget_s=60)
        first.add_done_callback(lambda _: held.wait(60))  # keeps the only lane, so that the others wait together
        first.result(60)
        instrument(scheduler, tracer_provider=tracers)
        for value in (1, 2, 1000, 3):
            with tracer.start_as_current_span("client") as client:
                clients.append(client.get_span_context())
                futures.append(scheduler.submit(index(value), budget_s=60))
        held.set()
        wait(futures)
    spans = exporter.get_finished_spans()
    requests = sorted(named(spans, "sponge.request"), key=lambda span: attribute(span, "sponge.request.id"))
    assert [request.parent for request in requests] == clients
    assert [request.status.status_code is StatusCode.ERROR for request in requests] == [False, False, True, False]
    assert [attribute(request, "sponge.request.outcome") for request in requests] == ["met", "met", "failed", "met"]
    (batch,) = named(spans, "sponge.batch")
    assert {link.context.span_id for link in batch.links} == {identity(request)[1] for request in requests}
    runs = named(spans, "sponge.run")
    assert [attribute(run, "sponge.run.rows") for run in runs] == [4, 2, 2, 1, 1]
    assert [run.status.status_code is StatusCode.ERROR for run in runs] == [True, False, True, True, False]
    assert all(parent(run) == identity(batch)[1] for run in runs)
    assert [event.name for event in requests[2].events] == ["exception"]


def test_who_was_turned_away_or_gave_up_has_a_span(
    session: ElasticSession, tracers: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """The requests that one looks for are those that got no answer."""
    held = threading.Event()
    with Scheduler(session, SOLVER) as scheduler:
        telemetry = instrument(scheduler, tracer_provider=tracers)
        first = scheduler.submit(index(0), budget_s=math.inf)
        first.add_done_callback(lambda _: held.wait(60))
        first.result(60)
        assert scheduler.submit(index(1), budget_s=60).cancel()
        with pytest.raises(DeadlineExceeded):
            scheduler.submit(index(1), budget_s=-1).result(60)
        assert telemetry.flush(60)
        assert exporter.get_finished_spans()
        held.set()
    assert not telemetry._contexts
    spans = named(exporter.get_finished_spans(), "sponge.request")
    found = {attribute(span, "sponge.request.outcome"): span for span in spans}
    assert found.keys() == {"met", "cancelled", "rejected_deadline"}
    assert found["rejected_deadline"].status.status_code is StatusCode.ERROR
    assert found["cancelled"].status.status_code is StatusCode.UNSET
    assert found["met"].attributes is not None
    assert "sponge.request.budget_s" not in found["met"].attributes


def test_metrics_count_what_the_scheduler_counted(session: ElasticSession) -> None:
    """Through the SDK's reader, with the units that the names promise."""
    reader = InMemoryMetricReader()
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        instrument(scheduler, meter_provider=MeterProvider([reader]))
        futures = [scheduler.submit(index(1000 if i == 7 else i), budget_s=60) for i in range(50)]
        futures += [scheduler.submit(index(1), budget_s=-1) for _ in range(3)]
        wait(futures)
    data, found = reader.get_metrics_data(), scheduler.statistics()
    assert data is not None
    shown = {m.name: m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics}
    outcomes = Counter[Any]()
    for point in shown["sponge.requests"].data.data_points:
        assert point.attributes is not None
        outcomes[point.attributes["sponge.request.outcome"]] += point.value  # type: ignore[union-attr]
    assert outcomes == {"met": found.met, "failed": 1, "rejected_deadline": 3}
    sizes = {name: metric.data.data_points[0] for name, metric in shown.items()}
    assert sizes["sponge.request.slack"].count == 53  # type: ignore[union-attr]
    assert sizes["sponge.request.queue_delay"].count == 50  # type: ignore[union-attr]
    assert sizes["sponge.request.duration"].count == 49  # type: ignore[union-attr]
    assert sizes["sponge.batch.size"].count == found.batches  # type: ignore[union-attr]
    assert sizes["sponge.resizes"].value == found.resizes  # type: ignore[union-attr]
    assert 0 < sizes["sponge.cpu.time"].value <= found.cpu_s  # type: ignore[union-attr]
    assert sizes["sponge.queue.length"].value == 0  # type: ignore[union-attr]
    assert shown["sponge.request.duration"].unit == "s"


def test_what_is_not_sampled_makes_no_batch(session: ElasticSession, exporter: InMemorySpanExporter) -> None:
    """Sampling is the service's decision, and holds for what its requests cause."""
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Scheduler(session, SOLVER) as scheduler:
        instrument(scheduler, tracer_provider=provider)
        scheduler.submit(index(1), budget_s=60).result(60)
    assert exporter.get_finished_spans() == ()


def test_too_much_is_dropped_and_counted(
    session: ElasticSession, tracers: TracerProvider, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter that hangs costs spans, neither answers nor memory."""
    monkeypatch.setattr(ours, "MOST_WAITING", 5)
    hanging = threading.Event()

    class Hanging(SimpleSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            assert hanging.wait(60)
            super().on_end(span)

    tracers.add_span_processor(Hanging(exporter))
    with Scheduler(session, SOLVER) as scheduler:
        telemetry = instrument(scheduler, tracer_provider=tracers)
        for i in range(30):
            assert scheduler.submit(index(i), budget_s=60).result(60)[0] == [10 * i]
        hanging.set()
    assert telemetry.dropped >= 30 - 5 - 2
    assert not telemetry._contexts
    assert len(named(exporter.get_finished_spans(), "sponge.request")) == 2 * (30 - telemetry.dropped)


def test_telemetry_that_fails_is_given_up(
    session: ElasticSession, tracers: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once, and the service goes on."""

    class Broken(SimpleSpanProcessor):
        def on_start(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("a broken processor")

    tracers.add_span_processor(Broken(InMemorySpanExporter()))
    with Scheduler(session, SOLVER) as scheduler:
        telemetry = instrument(scheduler, tracer_provider=tracers)
        for i in range(5):
            assert scheduler.submit(index(i), budget_s=60).result(60)[0] == [10 * i]
        telemetry._thread.join(60)
        assert not telemetry._thread.is_alive()
    assert caplog.text.count("failed and is given up") == 1


def test_telemetry_does_not_keep_a_scheduler_alive(session: ElasticSession, tracers: TracerProvider) -> None:
    """Nor its own thread beyond it."""
    scheduler = Scheduler(session, SOLVER)
    telemetry = instrument(scheduler, tracer_provider=tracers)
    service = scheduler._service
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del scheduler
        gc.collect()
    assert telemetry.scheduler is None
    service.close(True, 30)
    telemetry._thread.join(30)
    assert not telemetry._thread.is_alive()


def test_the_sdk_is_not_needed() -> None:
    """A library must not choose the SDK for its user."""
    script = (
        "import sys, sponge.integrations.opentelemetry; "
        "print(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
