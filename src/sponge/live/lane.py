"""A lane: the thread that runs one batch at a time and answers its requests.

The lane's thread does its share of the model's work (ONNX Runtime uses the calling thread as one of its own), so it is
under the CPU quota together with the workers. It therefore does as little Python as it can.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from sponge.core.values import Batch, Request
from sponge.errors import ModelError
from sponge.live.batching import BatchBuffers, Inputs, part
from sponge.live.engine import Signal
from sponge.live.futures import Outputs, RequestFuture, claim, settle
from sponge.live.observing import ModelRun, Observers, ServedBatch
from sponge.live.session import ElasticSession

_log = logging.getLogger("sponge")


class Entry:
    """A request as the live shell holds it."""

    __slots__ = ("deadline", "future", "inputs", "request", "request_id", "rows")

    def __init__(self, request: Request, inputs: Inputs, future: RequestFuture) -> None:
        self.request = request
        self.request_id = request.request_id
        self.inputs = inputs
        self.rows = request.rows
        self.deadline = request.deadline
        self.future = future


class Lane:
    """One runner thread.

    Parameters
    ----------
    index
        Number of the lane.
    session
        What runs the batches.
    max_rows
        Rows of the largest batch.
    take
        Hands over a request's entry by its id, or None if it is gone.
    finished
        Called when the lane is free again, with the lane and the service time [s], or None if that says nothing about
        the model.
    called
        Called with the lane when it has nothing to do and was woken by `call`.
    clock
        The scheduler's clock.
    observers
        Told of every batch.
    name
        Of the thread.
    """

    def __init__(
        self,
        index: int,
        session: ElasticSession,
        *,
        max_rows: int,
        take: Callable[[int], Entry | None],
        finished: Callable[[Lane, float | None], None],
        called: Callable[[Lane], None],
        clock: Callable[[], float],
        observers: Observers,
        name: str,
    ) -> None:
        self.index = index
        self.met = self.late = self.failed = self.batches = self.rows = self.running = self.cancelled = 0
        self.serving: Sequence[Entry] = ()
        """Requests of the batch that runs."""
        self._session = session
        self._buffers = BatchBuffers(max_rows)
        self._width_of: dict[int, int] = {}
        self._take = take
        self._finished = finished
        self._called = called
        self._clock = clock
        self._observers = observers
        self._runs: list[ModelRun] | None = None  # of the batch that runs, while somebody watches
        self._batch: Batch | None = None
        self._ended_cpu_s: float | None = None
        self._signal = Signal()
        self._resting = self._stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """Native id of the thread."""
        native_id = self._thread.native_id
        assert native_id is not None  # the thread has been started
        return native_id

    def owns_thread(self, thread: threading.Thread) -> bool:
        """Tell whether this is the lane's thread."""
        return thread is self._thread

    def cpu_s(self) -> float:
        """Return the CPU time that the thread has used [s]."""
        if self._ended_cpu_s is not None or self._thread.ident is None:
            return self._ended_cpu_s or 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def start(self, batch: Batch) -> None:
        """Run a batch; the lane must be free."""
        self._batch = batch
        self._signal.set()

    def has_work(self) -> bool:
        """Tell whether a batch has been started that the thread has not taken up yet."""
        return self._batch is not None

    def call(self) -> bool:
        """Wake the thread if it has nothing to do; return whether it has nothing to do."""
        if not self._resting or self._batch is not None:
            return False
        self._signal.set()
        return True

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the thread, which must be free; return whether it has ended in time."""
        self._stopping = True
        self._signal.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            self._resting = True
            self._signal.wait()
            self._resting = False
            batch, self._batch = self._batch, None
            if batch is not None:
                self._run_batch(batch)
                continue
            stopping = self._stopping  # asked first: a call that came before it is answered
            self._called(self)
            if stopping and self._batch is None:
                self._ended_cpu_s = time.thread_time()
                return

    def _run_batch(self, batch: Batch) -> None:
        """Serve a batch and say that the lane is free; nothing that goes wrong may end the thread or lose a request."""
        service_s = None
        try:
            service_s = self._serve(batch)
        except BaseException as error:
            _log.exception("lane %d failed in the midst of a batch", self.index)
            for entry in self.serving:
                if entry.future.is_stuck() or not entry.future.done():
                    self._fail(entry, error.with_traceback(None))
        self.running = 0
        self.serving = ()
        try:
            self._finished(self, service_s)
        except BaseException:  # the engine has the event all the same
            _log.exception("handling the end of a batch of lane %d failed", self.index)

    def _serve(self, batch: Batch) -> float | None:
        """Run what has not been cancelled; return the service time if the batch ran as planned [s]."""
        started_at = self._watch()
        self.serving = [entry for entry in map(self._take, batch.request_ids) if entry is not None]
        entries = [entry for entry in self.serving if self._claim(entry)]
        if not entries:
            return None
        rows = sum(entry.rows for entry in entries)
        self.batches += 1
        self.rows += rows
        self.running = len(entries)
        one_by_one = len(entries) > 1 and not self._session.separable
        service_s = (self._one_by_one if one_by_one else self._attempt)(batch, entries, rows)
        self.running = 0
        if self._runs is not None:
            self._observers.served(ServedBatch(batch=batch, started_at=started_at, runs=tuple(self._runs)))
        return service_s if rows == batch.rows else None

    def _watch(self) -> float:
        """Begin to note the runs of a batch if somebody watches; return the instant, 0 if nobody does [s]."""
        if not self._observers.watching:
            self._runs = None
            return 0.0
        self._runs = []
        return self._clock()

    def _note(
        self,
        entries: Sequence[Entry],
        started_at: float,
        finished_at: float,
        answered: bool,
        error: BaseException | None,
    ) -> None:
        """Note a run of the model for those who watch."""
        if self._runs is not None:
            requests = tuple([entry.request for entry in entries])
            run = ModelRun(
                requests=requests,
                rows=sum([request.rows for request in requests]),
                started_at=started_at,
                finished_at=finished_at,
                answered=answered,
                error=error,
            )
            self._runs.append(run)

    def _claim(self, entry: Entry) -> bool:
        """Return whether the request is still to be run: not cancelled, nor settled by its client."""
        claimed = claim(entry.future)
        self.cancelled += entry.future.gave_up
        if not claimed and self._observers.watching:
            self._observers.left(entry.request, None, self._clock())
        return claimed

    def _attempt(self, batch: Batch, entries: Sequence[Entry], rows: int) -> float | None:
        """Run these requests together and answer them; return the service time, or None if they had to be parted.

        If the model raises, the request at fault is found by halving, the more urgent half first, and the others are
        served.
        """
        started_at = time.perf_counter()
        failure: BaseException | None = None
        parts: Sequence[Outputs] | None = None
        try:
            inputs = self._buffers.join(batch.group, [entry.inputs for entry in entries], rows)
            outputs = self._session.run(inputs, threads=self._width(batch.threads))
            parts = [outputs] if len(entries) == 1 else part(outputs, [entry.rows for entry in entries])
        except BaseException as error:  # whatever a custom operator may raise: its requests fail, not the lane
            _log.debug("a run of %d requests failed", len(entries), exc_info=True)
            # Its frames refer to these requests and their futures, and those to it: memory until the next collection.
            failure = error.with_traceback(None)
        if parts is not None:
            service_s = time.perf_counter() - started_at
            finished_at = self._answer(entries, parts)
            self._note(entries, finished_at - service_s, finished_at, True, None)
            return service_s
        if self._runs is not None:
            now = self._clock()
            ended = len(entries) == 1 and failure is not None
            self._note(entries, now - (time.perf_counter() - started_at), now, ended, failure)
        if failure is None:
            self._session.not_separable()
            smaller = [[entry] for entry in entries]
        elif len(entries) == 1:
            self._fail(entries[0], failure)
            return None
        else:
            middle = (len(entries) + 1) // 2
            smaller = [list(entries[:middle]), list(entries[middle:])]
        for some in smaller:
            self._attempt(batch, some, sum(entry.rows for entry in some))
        return None

    def _one_by_one(self, batch: Batch, entries: Sequence[Entry], rows: int) -> float | None:
        """Run each request alone; return the service time of all, or None if the model raised.

        The time counts as the batch's: that is how long such a batch takes, and the drift must come to know it.
        """
        started_at = time.perf_counter()
        ran = [self._attempt(batch, [entry], entry.rows) is not None for entry in entries]
        return time.perf_counter() - started_at if all(ran) else None

    def _width(self, threads: int) -> int:
        """The session's width for a number of threads; it need not have every one."""
        width = self._width_of.get(threads)
        if width is None:
            width = self._width_of[threads] = self._session.width_for(threads)
        return width

    def _answer(self, entries: Sequence[Entry], parts: Sequence[Outputs]) -> float:
        """Settle the requests; return the instant by which they are judged [s]."""
        finished_at = self._clock()
        for entry, outputs in zip(entries, parts, strict=True):
            if finished_at <= entry.deadline:
                self.met += 1
            else:
                self.late += 1
            settle(entry.future, outputs)
        return finished_at

    def _fail(self, entry: Entry, error: BaseException) -> None:
        self.failed += 1
        failure = ModelError(entry.request_id, str(error))
        failure.__cause__ = error
        settle(entry.future, failure)
