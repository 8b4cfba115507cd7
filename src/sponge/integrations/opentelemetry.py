"""Traces and metrics of schedulers by OpenTelemetry: ``sponge.integrations.opentelemetry.instrument(scheduler)``.

Rules, and why they hold:

* Only the API package is needed here; what becomes of spans and metrics is up to the SDK that the service has set up,
  and without one nothing is made.
* A request's span belongs to the trace in which it was submitted: the context is captured there, on the client's
  thread. A batch serves requests of many traces, so it has a trace of its own, and spans of both are linked.
* Making a span takes longer than handing out a batch. So it is done on a thread of its own, afterwards, with the times
  at which things happened; what it cannot keep up with is dropped and counted, and serving never waits for it.
* A scheduler is referred to weakly, so that one that nobody holds any more can end.

Needs: ``pip install "sponge-serving[opentelemetry]"``.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Iterable
from queue import SimpleQueue
from typing import TypeAlias

import attrs
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import Link, Span, StatusCode, TracerProvider

import sponge
from sponge.core.values import RejectReason, Request
from sponge.errors import SpongeError
from sponge.live.observing import ModelRun, Observer, ServedBatch
from sponge.live.scheduler import Scheduler

_log = logging.getLogger("sponge")

MOST_WAITING = 10_000
"""Batches and leavings that may wait to be made into spans."""


@attrs.frozen(slots=True)
class _Left:
    request: Request
    reason: RejectReason | None
    now: float


_Told: TypeAlias = ServedBatch | _Left | threading.Event | None
"""What the thread gets: something that happened, somebody who waits until it comes, or None for the end."""


def instrument(
    scheduler: Scheduler,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> SchedulerTelemetry:
    """Make spans and metrics of a scheduler until it is closed; parameters as of `SchedulerTelemetry`."""
    telemetry = SchedulerTelemetry(scheduler, tracer_provider=tracer_provider, meter_provider=meter_provider)
    scheduler.own(telemetry)
    return telemetry


class SchedulerTelemetry(Observer):
    """Spans and metrics of one scheduler, from its making until `close`.

    Parameters
    ----------
    scheduler
        Watched; not kept alive.
    tracer_provider, meter_provider
        By default the global ones.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self.dropped = 0
        """Batches and leavings of which no spans were made, since too many were waiting."""
        self._name = scheduler.name
        self._scheduler = weakref.ref(scheduler)
        self._tracer = trace.get_tracer("sponge", sponge.__version__, tracer_provider)
        self._instruments = _Instruments(self, meter_provider)
        self._contexts: dict[int, Context] = {}
        self._told: SimpleQueue[_Told] = SimpleQueue()
        self._offset_s = time.time() - scheduler.now()
        self._stop = scheduler.observe(self)
        self._thread = threading.Thread(target=self._work, name=f"{scheduler.name}-telemetry", daemon=True)
        self._thread.start()

    @property
    def scheduler(self) -> Scheduler | None:
        """What is watched; None if it is gone."""
        return self._scheduler()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until spans of all that has happened are handed to the SDK; return whether they were in time."""
        handed = threading.Event()
        self._told.put(handed)
        return not self._thread.is_alive() or handed.wait(timeout_s)

    def close(self) -> None:
        """Watch no more, and hand on what waits; again, it does nothing."""
        self._stop()
        self._told.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- on the scheduler's threads ------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """Capture the context in which the request came."""
        self._contexts[request.request_id] = otel_context.get_current()

    def left(self, request: Request, reason: RejectReason | None, now: float) -> None:
        """Pass on a request that will not run."""
        self._pass_on(_Left(request, reason, now), (request,))

    def served(self, served: ServedBatch) -> None:
        """Pass on a batch."""
        self._pass_on(served, (request for run in served.runs if run.answered for request in run.requests))

    def _pass_on(self, told: ServedBatch | _Left, requests: Iterable[Request]) -> None:
        if self._told.qsize() < MOST_WAITING:
            self._told.put(told)
            return
        self.dropped += 1
        for request in requests:
            self._contexts.pop(request.request_id, None)

    # -- on a thread of its own ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while (told := self._told.get()) is not None:
            try:
                if isinstance(told, threading.Event):
                    told.set()
                elif isinstance(told, _Left):
                    self._tell_left(told)
                else:
                    self._tell_served(told)
            except Exception:
                _log.exception("telemetry of the scheduler %r failed and is given up", self._name)
                self._stop()
                self._contexts.clear()
                return

    def _tell_left(self, left: _Left) -> None:
        outcome = "cancelled" if left.reason is None else f"rejected_{left.reason.value}"
        span = self._request_span(left.request, outcome)
        if left.reason is not None:
            span.set_status(StatusCode.ERROR, f"turned away: {left.reason.value}")
        self._child(span, "sponge.queue", left.request.arrived_at).end(self._ns(left.now))
        span.end(self._ns(left.now))
        self._instruments.left(left.request, outcome)

    def _tell_served(self, served: ServedBatch) -> None:
        spans = [self._request_spans(run) for run in served.runs if run.answered]
        recorded = [span for some in spans for span in some if span.is_recording()]
        if recorded:
            self._batch_span(served, recorded)
        for run, some in zip((run for run in served.runs if run.answered), spans, strict=True):
            for span in some:
                span.end(self._ns(run.finished_at))
        self._instruments.served(served)

    def _request_spans(self, run: ModelRun) -> list[Span]:
        spans = []
        for request in run.requests:
            span = self._request_span(request, outcome_of(request, run))
            if run.error is not None:
                span.set_status(StatusCode.ERROR, str(run.error))
                span.record_exception(run.error, timestamp=self._ns(run.finished_at))
            if span.is_recording():
                self._child(span, "sponge.queue", request.arrived_at).end(self._ns(run.started_at))
            spans.append(span)
        return spans

    def _request_span(self, request: Request, outcome: str) -> Span:
        attributes: dict[str, str | int | float] = {
            "sponge.scheduler": self._name,
            "sponge.request.id": request.request_id,
            "sponge.request.rows": request.rows,
            "sponge.request.outcome": outcome,
        }
        budget_s = request.deadline - request.arrived_at
        if math.isfinite(budget_s):  # some exporters write JSON, which has no infinity
            attributes["sponge.request.budget_s"] = budget_s
        return self._tracer.start_span(
            "sponge.request",
            context=self._contexts.pop(request.request_id, Context()),
            attributes=attributes,
            start_time=self._ns(request.arrived_at),
        )

    def _batch_span(self, served: ServedBatch, requests: list[Span]) -> None:
        batch = served.batch
        span = self._tracer.start_span(
            "sponge.batch",
            context=Context(),
            links=[Link(request.get_span_context()) for request in requests],
            attributes={
                "sponge.scheduler": self._name,
                "sponge.batch.id": batch.batch_id,
                "sponge.batch.rows": batch.rows,
                "sponge.batch.lane": batch.lane,
                "sponge.batch.cores": batch.cores,
                "sponge.batch.threads": batch.threads,
                "sponge.batch.expected_s": batch.expected_s,
            },
            start_time=self._ns(served.started_at),
        )
        for request in requests:
            request.add_link(span.get_span_context())
        for run in served.runs:
            part = self._child(span, "sponge.run", run.started_at)
            part.set_attribute("sponge.run.rows", run.rows)
            if run.error is not None:
                part.set_status(StatusCode.ERROR, str(run.error))
                part.record_exception(run.error, timestamp=self._ns(run.finished_at))
            part.end(self._ns(run.finished_at))
        span.end(self._ns(served.runs[-1].finished_at))

    def _child(self, parent: Span, name: str, started_at: float) -> Span:
        context = trace.set_span_in_context(parent, Context())
        return self._tracer.start_span(name, context=context, start_time=self._ns(started_at))

    def _ns(self, instant: float) -> int:
        """Return an instant of the scheduler's clock as OpenTelemetry counts, ns since 1970."""
        return round((instant + self._offset_s) * 1e9)


def outcome_of(request: Request, run: ModelRun) -> str:
    """Return how a request that was run ended: met, late or failed."""
    if run.error is not None:
        return "failed"
    return "met" if run.finished_at <= request.deadline else "late"


class _Instruments:
    """The metrics: distributions as they come, and what is read when the SDK asks."""

    def __init__(self, telemetry: SchedulerTelemetry, provider: MeterProvider | None) -> None:
        meter = metrics.get_meter("sponge", sponge.__version__, provider)
        self._telemetry = weakref.ref(telemetry)
        self._name = telemetry._name
        self._attributes = {"sponge.scheduler": self._name}
        histogram = meter.create_histogram
        self._requests = meter.create_counter("sponge.requests", "{request}", "Requests that have ended, by how.")
        self._slack = histogram("sponge.request.slack", "s", "Budget at arrival less the predicted latency; 0 if lost.")
        self._delay = histogram("sponge.request.queue_delay", "s", "From arrival to the start of the run.")
        self._response = histogram("sponge.request.duration", "s", "From arrival to the answer.")
        self._rows = histogram("sponge.batch.size", "{row}", "Rows of a batch.")
        self._duration = histogram("sponge.batch.duration", "s", "Of a batch that ran as planned.")
        self._ratio = histogram("sponge.batch.measured_over_predicted", "1", "1: the latency model is right.")
        gauge, counter = meter.create_observable_gauge, meter.create_observable_counter
        gauge("sponge.cores.allocated", [self._cores], "{core}", "Allocation in force.")
        gauge("sponge.queue.length", [self._waiting], "{request}", "Requests that wait.")
        counter("sponge.cores.allocated_time", [self._allocated], "s", "Integral of the allocation over time.")
        counter("sponge.cpu.time", [self._cpu], "s", "CPU time used by the model's threads.")
        counter("sponge.resizes", [self._resizes], "{resize}", "Changes of the allocation.")

    def left(self, request: Request, outcome: str) -> None:
        self._requests.add(1, {**self._attributes, "sponge.request.outcome": outcome})
        self._observe_slack(request)

    def served(self, served: ServedBatch) -> None:
        same = self._attributes
        for run in served.runs:
            for request in run.requests if run.answered else ():
                self._requests.add(1, {**same, "sponge.request.outcome": outcome_of(request, run)})
                self._observe_slack(request)
                self._delay.record(run.started_at - request.arrived_at, same)
                if run.error is None:
                    self._response.record(run.finished_at - request.arrived_at, same)
        self._rows.record(served.batch.rows, same)
        if served.as_planned:
            duration_s = served.runs[0].finished_at - served.runs[0].started_at
            self._duration.record(duration_s, same)
            if served.batch.expected_s > 0:
                self._ratio.record(duration_s / served.batch.expected_s, same)

    def _observe_slack(self, request: Request) -> None:
        telemetry = self._telemetry()
        scheduler = None if telemetry is None else telemetry.scheduler
        if scheduler is not None:
            slack_s = request.deadline - request.arrived_at - scheduler.fastest_s(request.rows)
            if math.isfinite(slack_s):
                self._slack.record(max(0.0, slack_s), self._attributes)  # histograms take nothing below 0

    def _cores(self, _: CallbackOptions) -> list[Observation]:
        return self._read("cores")

    def _waiting(self, _: CallbackOptions) -> list[Observation]:
        return self._read("waiting")

    def _allocated(self, _: CallbackOptions) -> list[Observation]:
        return self._read("allocated_core_s")

    def _cpu(self, _: CallbackOptions) -> list[Observation]:
        return self._read("cpu_s")

    def _resizes(self, _: CallbackOptions) -> list[Observation]:
        return self._read("resizes")

    def _read(self, figure: str) -> list[Observation]:
        """One figure of the statistics; nothing of a scheduler that is gone, or belongs to the parent of a fork."""
        telemetry = self._telemetry()
        scheduler = None if telemetry is None else telemetry.scheduler
        if scheduler is None:
            return []
        try:
            return [Observation(getattr(scheduler.statistics(), figure), self._attributes)]
        except SpongeError:
            return []
