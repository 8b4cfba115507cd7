"""Metrics of schedulers for Prometheus: ``sponge.integrations.prometheus.collect(scheduler)``.

Rules, and why they hold:

* What the scheduler counts anyway is read from it when Prometheus asks; only distributions are followed as they come,
  into plain lists of counts, since a histogram object for each costs more than the rest of an observation.
* Labels are bounded: the scheduler's name, and how a request ended. Nothing that a client sends becomes a label.
* A scheduler is referred to weakly, so that one that nobody holds any more can end (and is then no longer shown).

Needs: ``pip install "sponge-serving[prometheus]"``.
"""

from __future__ import annotations

import math
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

import sponge
from sponge.core.values import Request
from sponge.errors import SpongeError
from sponge.live.observing import Observer, ServedBatch
from sponge.live.scheduler import Scheduler

# Finest where deadlines of interactive services lie.
_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(1.5, 2.0, 3.0, 5.0, 10.0),
)
_SLACK = (-1.0, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.0, *_SECONDS[3:])
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_RATIO = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "sponge_request_budget_seconds": ("Time left until the deadline when a request arrived.", _SECONDS),
    "sponge_request_slack_seconds": (
        "What is left of the budget at arrival after the predicted latency of the request alone on all cores; "
        "below 0 it is lost already.",
        _SLACK,
    ),
    "sponge_queue_delay_seconds": ("From arrival to the start of the run that answered.", _SECONDS),
    "sponge_response_seconds": ("From arrival to the answer.", _SECONDS),
    "sponge_batch_rows": ("Rows of a batch when it was planned.", _ROWS),
    "sponge_batch_duration_seconds": ("Duration of a batch that ran as planned.", _SECONDS),
    "sponge_latency_model_ratio": (
        "Measured duration of a batch over the predicted one, which follows the drift: 1 is right.",
        _RATIO,
    ),
}
"""Name, help and upper bounds of the buckets."""

COUNTERS = {
    "sponge_requests": "Requests that have ended, by how: met or late (answered), failed, cancelled, rejected_*.",
    "sponge_batches": "Batches that were run.",
    "sponge_resizes": "Changes of the allocation.",
    "sponge_allocated_core_seconds": "Integral of the allocation over time.",
    "sponge_cpu_seconds": "CPU time used by the lanes and the model's worker threads.",
    "sponge_throttled_seconds": "Time for which the kernel stopped the model's threads, summed over CPUs.",
    "sponge_cpu_control_errors": "Attempts to put the allocation in force, or to find it in force, that failed.",
}
"""Name, without the ``_total`` that it is shown with, and help."""

GAUGES = {
    "sponge_queue_length": "Requests that wait.",
    "sponge_running_requests": "Requests in batches that run.",
    "sponge_allocated_cores": "Allocation in force.",
    "sponge_max_cores": "Cores that all batches may use together.",
    "sponge_arrivals_per_second": "Estimated arrival rate, in rows.",
    "sponge_cpu_control_fault": "1 while the allocation asked for is not in force, else 0.",
    "sponge_drift_ratio": "How many times longer recent batches took than the profile says (its tail).",
}
"""Name and help."""


def collect(
    scheduler: Scheduler, registry: CollectorRegistry = REGISTRY, *, name: str | None = None
) -> SchedulerCollector:
    """Show a scheduler's metrics in *registry* until it is closed; parameters as of `SchedulerCollector`."""
    collector = SchedulerCollector(scheduler, registry, name=name)
    scheduler.own(collector)
    return collector


class SchedulerCollector(Observer):
    """Metrics of one scheduler, from its making until `close`.

    Parameters
    ----------
    scheduler
        Watched; not kept alive.
    registry
        By default prometheus_client's own.
    name
        Value of the label ``scheduler``; by default the scheduler's name.

    Raises
    ------
    ValueError
        If the registry already shows a scheduler of that name.
    """

    def __init__(
        self, scheduler: Scheduler, registry: CollectorRegistry = REGISTRY, *, name: str | None = None
    ) -> None:
        self.name = scheduler.name if name is None else name
        self._scheduler = weakref.ref(scheduler)
        self._distributions = {metric: _Distribution(bounds) for metric, (_, bounds) in HISTOGRAMS.items()}
        self._fastest_s: dict[int, float] = {}
        self._lock = threading.Lock()
        self._exporter = _Exporter.of(registry)
        self._exporter.add(self)
        self._stop = scheduler.observe(self)

    def close(self) -> None:
        """Take the metrics out of the registry; again, it does nothing."""
        self._stop()
        self._exporter.remove(self)

    # -- what is followed ----------------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """Count the budget and the slack."""
        budget_s = request.deadline - request.arrived_at
        if math.isinf(budget_s):  # no deadline: nothing to distribute
            return
        slack_s = budget_s - self._fastest(request.rows)
        with self._lock:
            self._distributions["sponge_request_budget_seconds"].add(budget_s)
            if not math.isnan(slack_s):
                self._distributions["sponge_request_slack_seconds"].add(slack_s)

    def served(self, served: ServedBatch) -> None:
        """Count a batch, and the delays of its requests."""
        found = self._distributions
        delay, response = found["sponge_queue_delay_seconds"], found["sponge_response_seconds"]
        with self._lock:
            found["sponge_batch_rows"].add(served.batch.rows)
            for run in served.runs:
                if run.answered:
                    for request in run.requests:
                        delay.add(run.started_at - request.arrived_at)
                        if run.error is None:
                            response.add(run.finished_at - request.arrived_at)
            if served.as_planned:
                duration_s = served.runs[0].finished_at - served.runs[0].started_at
                found["sponge_batch_duration_seconds"].add(duration_s)
                if served.batch.expected_s > 0:
                    found["sponge_latency_model_ratio"].add(duration_s / served.batch.expected_s)

    def _fastest(self, rows: int) -> float:
        fastest_s = self._fastest_s.get(rows)
        if fastest_s is None:
            scheduler = self._scheduler()
            fastest_s = self._fastest_s[rows] = math.nan if scheduler is None else scheduler.fastest_s(rows)
        return fastest_s

    # -- what is asked -------------------------------------------------------------------------------------------

    def add_to(self, families: _Families) -> None:
        """Add this scheduler's samples; nothing of one that is gone, or belongs to the parent of a fork."""
        scheduler = self._scheduler()
        if scheduler is None:
            return
        try:
            found, condition = scheduler.statistics(), scheduler.condition()
        except SpongeError:
            return
        outcomes = {"met": found.met, "late": found.late, "failed": found.failed, "cancelled": found.cancelled}
        rejected = dict.fromkeys(("deadline", "queue_full", "closed"), 0) | dict(found.rejected)
        outcomes |= {f"rejected_{reason}": count for reason, count in rejected.items()}
        for outcome, count in outcomes.items():
            families.counters["sponge_requests"].add_metric([self.name, outcome], count)
        values: dict[str, float | None] = {
            "sponge_batches": found.batches,
            "sponge_resizes": found.resizes,
            "sponge_allocated_core_seconds": found.allocated_core_s,
            "sponge_cpu_seconds": found.cpu_s,
            "sponge_throttled_seconds": condition["throttled_s"],
            "sponge_cpu_control_errors": found.cpu_control_errors,
            "sponge_queue_length": found.waiting,
            "sponge_running_requests": found.running,
            "sponge_allocated_cores": found.cores,
            "sponge_max_cores": condition["max_cores"],
            "sponge_arrivals_per_second": condition["arrival_rate_rps"],
            "sponge_cpu_control_fault": float(bool(found.cpu_control_fault)),
            "sponge_drift_ratio": condition["drift_scale"],
        }
        for metric, value in values.items():
            if value is not None:
                (families.gauges if metric in GAUGES else families.counters)[metric].add_metric([self.name], value)
        families.info.add_metric([self.name], {"version": sponge.__version__, "cpu_control": found.cpu_control})
        with self._lock:
            for metric, distribution in self._distributions.items():
                distribution.add_to(families.histograms[metric], self.name)


class _Distribution:
    """Counts of values by bucket; the caller holds a lock."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, name: str) -> None:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if math.isinf(bound) else str(bound), total))
        family.add_metric([name], buckets, self._sum)


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        one = ["scheduler"]
        self.counters = {
            name: CounterMetricFamily(name, text, labels=[*one, "outcome"] if name == "sponge_requests" else one)
            for name, text in COUNTERS.items()
        }
        self.gauges = {name: GaugeMetricFamily(name, text, labels=one) for name, text in GAUGES.items()}
        self.histograms = {
            name: HistogramMetricFamily(name, text, labels=one) for name, (text, _) in HISTOGRAMS.items()
        }
        self.info = InfoMetricFamily("sponge", "Version, and by what the allocation is enforced.", labels=one)

    def __iter__(self) -> Iterator[Metric]:
        yield from (*self.counters.values(), *self.gauges.values(), *self.histograms.values(), self.info)


class _Exporter(Collector):
    """What stands in a registry for all of its schedulers: a metric's name may be registered only once."""

    _all: ClassVar[weakref.WeakKeyDictionary[CollectorRegistry, _Exporter]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = weakref.ref(registry)
        self._collectors: dict[str, SchedulerCollector] = {}

    @classmethod
    def of(cls, registry: CollectorRegistry) -> _Exporter:
        """Return the one of a registry."""
        with cls._lock:
            return cls._all.setdefault(registry, cls(registry))

    def add(self, collector: SchedulerCollector) -> None:
        with self._lock:
            if collector.name in self._collectors:
                raise ValueError(
                    f"name must differ among the schedulers of a registry, got {collector.name!r} again: pass another "
                    "name, or another registry"
                )
            registry = self._registry()
            if not self._collectors and registry is not None:
                registry.register(self)
            self._collectors[collector.name] = collector

    def remove(self, collector: SchedulerCollector) -> None:
        with self._lock:
            if self._collectors.get(collector.name) is not collector:
                return
            del self._collectors[collector.name]
            registry = self._registry()
            if not self._collectors and registry is not None:
                registry.unregister(self)

    def collect(self) -> Iterable[Metric]:
        """Ask all schedulers."""
        families = _Families()
        for collector in list(self._collectors.values()):
            collector.add_to(families)
        return families
