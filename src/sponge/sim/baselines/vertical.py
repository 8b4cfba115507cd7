"""A recommender like that of the Kubernetes vertical pod autoscaler: a percentile of past usage, and a margin."""

from __future__ import annotations

import math

from sponge.core.actions import Action
from sponge.core.events import BatchFinished
from sponge.core.latency import Latency
from sponge.sim.baselines.base import Order, Running, require
from sponge.sim.baselines.static import StaticController

_FIRST_BUCKET_CORES = 0.001
_BUCKET_GROWTH = 1.05
_LARGEST_CORES = 1000.0
_LEAST_WEIGHT = 0.1
"""Of a sample, before decay; else samples weigh as many as the cores that were allocated when they were taken."""
_LARGEST_EXPONENT = 100.0
"""Weights grow with time instead of decaying; beyond this power of two all are scaled back."""


class DecayingHistogram:
    """Weights of samples in buckets, each 5 % wider than the one before; a sample's weight halves every half-life.

    Parameters
    ----------
    half_life_s
        [s], > 0.

    References
    ----------
    Kubernetes autoscaler, vertical-pod-autoscaler/pkg/recommender/util, ``histogram.go``, ``decaying_histogram.go``;
    the CPU histogram's options are those of ``model/aggregations_config.go``.
    """

    def __init__(self, half_life_s: float) -> None:
        require(0 < half_life_s < math.inf, "half_life_s", "positive and finite", half_life_s)
        self._half_life_s = half_life_s
        self._weights = [0.0] * (self._bucket(_LARGEST_CORES) + 1)
        self._reference: float | None = None

    def add(self, value: float, weight: float, at: float) -> None:
        """Add a sample that was taken at an instant [s]; instants must not decrease by more than some half-lives."""
        if self._reference is None:
            self._reference = at
        exponent = (at - self._reference) / self._half_life_s
        if exponent > _LARGEST_EXPONENT:
            self._weights = [kept * 2.0**-exponent for kept in self._weights]
            self._reference = at
            exponent = 0.0
        self._weights[min(self._bucket(value), len(self._weights) - 1)] += weight * 2.0**exponent

    def percentile(self, share: float) -> float:
        """Return the end of the bucket up to which lies this share of the weight, in [0, 1]; 0 without samples."""
        threshold = share * math.fsum(self._weights)
        below = 0.0
        for bucket, weight in enumerate(self._weights):
            below += weight
            if weight > 0 and below >= threshold:
                return _FIRST_BUCKET_CORES * (_BUCKET_GROWTH ** (bucket + 1) - 1) / (_BUCKET_GROWTH - 1)
        return 0.0

    def _bucket(self, value: float) -> int:
        if value < _FIRST_BUCKET_CORES:
            return 0
        return math.floor(math.log(value * (_BUCKET_GROWTH - 1) / _FIRST_BUCKET_CORES + 1, _BUCKET_GROWTH))


class RecommenderController(StaticController):
    """VPA-like: the allocation follows a high percentile of the CPU usage of the last hours, with a margin.

    One lane on the whole allocation. Every *sample_s* the mean of the cores that batches kept busy since the last
    sample goes into a `DecayingHistogram`; every *update_s* the allocation becomes its *percentile* times *margin*,
    within the limits, if that differs enough. Deadlines and queues are not looked at. Between updates it is a
    `StaticController`.

    Parameters
    ----------
    initial_cores
        Allocation at the start [cores], > 0.
    min_cores, max_cores
        Limits of the allocation [cores], > 0.
    max_batch_size, window_s, order, latency, max_queue
        As of `StaticController`.
    percentile
        Share of the samples that the allocation would have been enough for, in (0, 1].
    margin
        Factor on it, ≥ 1.
    half_life_s
        After which a sample counts half [s], > 0; 24 hours there, some minutes to see anything in a short run.
    sample_s
        Between two samples [s], > 0: the resolution of the metrics server.
    update_s
        Between two updates [s], a multiple of *sample_s*: the recommender runs once a minute.
    least_change
        A recommendation within this share of the allocation is not followed, ≥ 0: the updater's rule for long-lived
        pods.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Kubernetes autoscaler, vertical-pod-autoscaler: target CPU percentile 0.9, safety margin 15 %, histogram half-life
    24 hours, recommender interval 1 minute, updater's minimal change 10 %.
    """

    def __init__(
        self,
        initial_cores: float,
        *,
        max_cores: float = 16.0,
        min_cores: float = 0.025,
        max_batch_size: int = 1,
        window_s: float = 0.0,
        order: Order = "fifo",
        percentile: float = 0.9,
        margin: float = 1.15,
        half_life_s: float = 86_400.0,
        sample_s: float = 15.0,
        update_s: float = 60.0,
        least_change: float = 0.1,
        latency: Latency | None = None,
        max_queue: int = 1024,
    ) -> None:
        super().__init__(
            initial_cores,
            order=order,
            max_batch_size=max_batch_size,
            window_s=window_s,
            latency=latency,
            max_queue=max_queue,
        )
        require(0 < sample_s < math.inf, "sample_s", "positive and finite", sample_s)
        require(0 < min_cores <= max_cores < math.inf, "min_cores", f"> 0 and <= max_cores={max_cores:g}", min_cores)
        require(0 < percentile <= 1, "percentile", "above 0 and at most 1", percentile)
        require(1 <= margin < math.inf, "margin", "at least 1 and finite", margin)
        require(0 <= least_change < math.inf, "least_change", "finite and not negative", least_change)
        samples = round(update_s / sample_s)
        multiple = samples >= 1 and math.isclose(samples * sample_s, update_s)
        require(multiple, "update_s", f"a multiple of sample_s={sample_s:g}", update_s)
        self.period_s = sample_s
        self.min_cores = min_cores
        self.max_cores = max_cores
        self.percentile = percentile
        self.margin = margin
        self.least_change = least_change
        self._samples_per_update = samples
        self._usage = DecayingHistogram(half_life_s)
        self._used_core_s = 0.0
        self._used_until = -math.inf

    def recommendation_cores(self) -> float:
        """Return what the usage so far asks for [cores], within the limits."""
        return min(max(self._usage.percentile(self.percentile) * self.margin, self.min_cores), self.max_cores)

    def _on_finish(self, running: Running, event: BatchFinished, now: float) -> None:
        self._used_core_s += running.batch.cores * (now - max(self._used_until, running.started_at))

    def _on_period(self, ended_at: float, actions: list[Action]) -> None:
        assert self.period_s is not None
        assert self._cores_asked is not None
        for running in self._lanes:
            if running is not None:
                since = max(self._used_until, running.started_at)
                self._used_core_s += running.batch.cores * max(0.0, ended_at - since)
        usage_cores, self._used_core_s, self._used_until = self._used_core_s / self.period_s, 0.0, ended_at
        self._usage.add(usage_cores, max(self._cores_asked, _LEAST_WEIGHT), ended_at)
        if (self._periods + 1) % self._samples_per_update == 0:
            cores = self.recommendation_cores()
            if abs(cores - self._cores_asked) >= self.least_change * self._cores_asked:
                self._ask(cores, actions)

    def _watches(self) -> bool:
        # An idle service still shrinks, and has to be woken for it.
        cores = self._cores_asked or 0.0
        return not self.idle or cores - self.min_cores > self.least_change * cores
