"""A batcher that learns its latency while it serves, waits by it and sheds by it: what BentoML does."""

from __future__ import annotations

import math
from collections import deque

import attrs
import numpy as np

from sponge.core.events import BatchFinished
from sponge.core.latency import Latency
from sponge.core.values import Request
from sponge.sim.baselines.base import Baseline, Order, Running, require

_SAMPLES_KEPT = 50
_SAMPLES_SKIPPED = 2
_REFRESHES_PER_S = 0.2
_WAIT_SHARE = 0.95
_TICK_S = 0.001
_LEAST_PER_REQUEST_S = 1e-6


@attrs.frozen(slots=True)
class _Lesson:
    """One step of the training that begins with the first requests."""

    size: int
    """Requests that its batch should have."""
    until_batches: int
    """Over when so many batches have been counted."""
    patience: float
    """Of the first request, in predicted times of a single one; 0 for starting at once."""
    shed_above: int
    """Requests in the queue above which those are shed that have waited for the largest latency; before the samples
    count, one more for each that will not."""


_LESSONS = (
    _Lesson(1, _SAMPLES_SKIPPED + 1, 0, 6),
    _Lesson(1, _SAMPLES_SKIPPED + 2, 0, 6),
    _Lesson(2, _SAMPLES_SKIPPED + 3, 5, 5),
    _Lesson(3, _SAMPLES_SKIPPED + 4, 7, 3),
)


class OnlineFit:
    """Least squares of ``duration = a·n + b`` over the last batches.

    As long as all of them had the same size, only ``a·n + b`` is known. Least squares then returns the shortest vector
    ``(a, b)``, which for single requests is half of their latency each: a batch of ``n`` is expected to take
    ``(n + 1)/2`` times as long as a single request, whatever is true.

    Parameters
    ----------
    max_latency_s
        From which the first guess is made: ``a`` a fifteenth of it, at most 2 s, ``b`` half as much.
    """

    def __init__(self, max_latency_s: float) -> None:
        self.per_request_s = min(2.0, max_latency_s * 2.0 / 30.0)
        self.per_batch_s = min(1.0, max_latency_s / 30.0)
        self.wait_s = 0.01
        """Mean time that the first request of a batch has waited."""
        self.batches = 0
        """Counted until the training is over."""
        self._samples: deque[tuple[int, float, float]] = deque(maxlen=_SAMPLES_KEPT)
        self._tokens = 1.0
        self._refilled_at: float | None = None

    def latency_s(self, requests: int) -> float:
        """Return the expected duration of a batch of so many requests [s]."""
        return self.per_request_s * requests + self.per_batch_s

    def learn(self, requests: int, duration_s: float, wait_s: float, now: float) -> None:
        """Take in a batch; fit anew unless that was done less than 5 s ago."""
        if self.batches < _LESSONS[-1].until_batches:
            self.batches += 1
            if self.batches <= _SAMPLES_SKIPPED:
                return
        self._samples.append((requests, duration_s, wait_s))
        refilled = 0.0 if self._refilled_at is None else (now - self._refilled_at) * _REFRESHES_PER_S
        tokens = min(1.0, self._tokens + refilled)
        if tokens >= 1.0:
            self._tokens, self._refilled_at = tokens - 1.0, now
            self.refresh()

    def refresh(self) -> None:
        """Fit to the samples; there must be one."""
        sizes, durations, waits = (np.array(column, dtype=np.float64) for column in zip(*self._samples, strict=True))
        design = np.stack([sizes, np.ones_like(sizes)], axis=1)
        (per_request_s, per_batch_s), *_ = np.linalg.lstsq(design, durations, rcond=None)
        self.per_request_s = max(_LEAST_PER_REQUEST_S, float(per_request_s))
        self.per_batch_s = max(0.0, float(per_batch_s))
        self.wait_s = float(waits.mean())


class OnlineFitBatcher(Baseline):
    """BentoML's dispatcher: static cores, batches and shedding by a latency that is fitted while serving.

    With ``n`` requests in the queue, of which the first has waited ``w_0`` and the last ``w_n``, and the fit
    ``a·n + b``:

    * the first is turned away if ``n > 1`` and ``w_0 + a·n + b`` reaches the largest latency, also while a batch runs,
      and also if the queue is longer than any batch may be;
    * the free lane waits for company while ``n·(w_n + 1 ms + a)`` is at most 0.95 times the mean wait of the last 50
      batches, and no batch is full;
    * then the *newest* requests are served first.

    The first six batches are training: four single requests, of which the first two are not looked at, then one batch
    of 2 and one of 3 if as many come before their first request has waited too long. Where only single requests come,
    the fit is left with half the latency in each coefficient (see `OnlineFit`), and the first burst is judged by that.

    Parameters
    ----------
    cores
        Total allocation [cores], > 0.
    max_batch_size
        Rows of a batch at most, ≥ 1.
    max_latency_s
        What every request is promised [s], > 0; deadlines are not looked at.
    lanes
        Workers, ≥ 1, each on ``cores / lanes``.
    order
        ``"lifo"``: the newest first, as there; ``"fifo"`` for what one would expect.
    latency
        For the forecasts that batches carry; decisions do not use it.
    max_queue
        Waiting requests at most, ≥ 1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    There the dispatcher looks at the queue every millisecond; here it is woken when a decision is due. There batches of
    the last training step start also when no worker is free, and batches hold one request fewer than the maximum; here
    neither.

    References
    ----------
    BentoML 1.0, ``bentoml/_internal/marshal/dispatcher.py``, ``CorkDispatcher`` and ``Optimizer``.
    """

    def __init__(
        self,
        cores: float,
        *,
        max_batch_size: int,
        max_latency_s: float = 1.0,
        lanes: int = 1,
        order: Order = "lifo",
        latency: Latency | None = None,
        max_queue: int = 1024,
    ) -> None:
        super().__init__(
            initial_cores=cores,
            order=order,
            max_batch_size=max_batch_size,
            max_lanes=lanes,
            max_queue=max_queue,
            latency=latency,
        )
        require(0 < max_latency_s < math.inf, "max_latency_s", "positive and finite", max_latency_s)
        self.max_latency_s = max_latency_s
        self.fit = OnlineFit(max_latency_s)
        self._lessons = [lesson for lesson in _LESSONS if lesson.size <= max_batch_size]
        self._patience_s = 0.0

    @property
    def training(self) -> bool:
        """Whether the first batches are still being used to learn from."""
        return bool(self._lessons)

    def _on_finish(self, running: Running, event: BatchFinished, now: float) -> None:
        if not event.ok:
            return
        duration_s = now - running.started_at if event.service_s is None else event.service_s
        requests = len(running.batch.request_ids)
        self.fit.learn(requests, duration_s, running.started_at - running.first_arrived_at, now)
        while self._lessons and self.fit.batches >= self._lessons[0].until_batches:
            over = self._lessons.pop(0)
            if over.until_batches > _SAMPLES_SKIPPED + 1:
                self.fit.refresh()
            if self._lessons:
                patience_s = self._lessons[0].patience * self.fit.latency_s(1)
                self._patience_s = min(_WAIT_SHARE * self.max_latency_s, patience_s)

    def _turn_away(self, now: float) -> Request | None:
        return self._oldest() if now >= self._gives_up_at() else None

    def _gives_up_at(self) -> float:
        """Instant from which the first request is not worth serving."""
        waiting, first = self.queue_length, self._oldest()
        if self._lessons:
            kept = self._lessons[0].shed_above + max(0, _SAMPLES_SKIPPED - self.fit.batches)
            return first.arrived_at + self.max_latency_s if waiting > kept else math.inf
        if waiting > 1:
            return first.arrived_at + (self.max_latency_s - self.fit.latency_s(waiting))
        return math.inf if self._lane_is_free() else first.arrived_at + self.max_latency_s

    def _rows_to_start(self, now: float) -> int | None:
        if not self._draining and now < self._holds_until():
            return None
        return max(self._lessons[0].size, self._head().rows) if self._lessons else self.max_batch_size

    def _holds_until(self) -> float:
        """Instant until which a free lane waits for company."""
        waiting = self.queue_length
        if self._lessons:
            size = self._lessons[0].size
            if size == 1 or waiting >= size:
                return -math.inf
            return self._oldest().arrived_at + (self._patience_s - self.fit.latency_s(size))
        if self._queue.rows >= self.max_batch_size:
            return -math.inf
        newest = next(reversed(self._waiting.values()))
        share_s = _WAIT_SHARE * self.fit.wait_s / waiting
        return newest.arrived_at + (share_s - _TICK_S - self.fit.per_request_s)

    def _waits_until(self) -> float | None:
        until = self._gives_up_at()
        return min(until, self._holds_until()) if self._lane_is_free() else until
