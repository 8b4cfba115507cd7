"""Other policies with the interface of the core's ``Controller``: they run live and simulated as it does.

`StaticController` holds one allocation from the first event to the last. With ``order="fifo"`` and
single-request batches it is a service without a scheduler; with ``order="edf"`` and batches it is a good
one, whose only fault is that it pays for its cores all the time.
"""

from __future__ import annotations

from typing import Literal

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.edf import EdfQueue
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.latency import Latency
from sponge.core.values import Batch, RejectReason, Request, intra_op_threads


class StaticController:
    """A fixed allocation, split evenly over a fixed number of lanes.

    Parameters
    ----------
    cores
        Total allocation [cores], > 0; asked for once, at the first event.
    order
        ``"fifo"``: by arrival; ``"edf"``: by deadline. Ties leave by sequence number.
    max_batch_size
        Rows of a batch at most, ≥ 1. A free lane takes whatever is waiting, up to this many.
    window_s
        How long the longest-waiting request lets a batch that is not full wait for company [s], ≥ 0.
    lanes
        Batches that run at the same time, ≥ 1, each on ``cores / lanes``.
    drop_late
        Turn away, when a lane is free for it, what can no longer finish in time: by the prediction of
        *latency* if that is given, else what is past its deadline. Without it every request is served,
        however late.
    latency
        Predicts the service time; without one, batches say that they expect 0 s.
    max_queue
        Waiting requests at most, ≥ 1; a further one is turned away.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        cores: float,
        *,
        order: Literal["fifo", "edf"],
        max_batch_size: int,
        window_s: float = 0.0,
        lanes: int = 1,
        drop_late: bool = False,
        latency: Latency | None = None,
        max_queue: int = 1024,
    ) -> None:
        if not 0 < cores < float("inf"):
            raise ValueError(f"cores must be positive and finite, got {cores!r}")
        if order not in ("fifo", "edf"):
            raise ValueError(f"order must be 'fifo' or 'edf', got {order!r}")
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size!r}")
        if not 0 <= window_s < float("inf"):
            raise ValueError(f"window_s must be finite and not negative, got {window_s!r}")
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, got {lanes!r}")
        if max_queue < 1:
            raise ValueError(f"max_queue must be at least 1, got {max_queue!r}")
        self.cores = float(cores)
        self.order = order
        self.max_batch_size = max_batch_size
        self.max_lanes = lanes
        self.max_queue = max_queue
        self.window_s = window_s
        self.drop_late = drop_late
        self.latency = latency
        self._lane_cores = self.cores / lanes
        self._threads = intra_op_threads(self._lane_cores)
        self._expected_s: dict[int, float] = {}
        self._queue = EdfQueue()
        # The requests as they came: in the queue a FIFO request bears its arrival as its deadline.
        self._waiting: dict[int, Request] = {}
        self._busy = [False] * lanes
        self._asked = False
        self._draining = False
        self._aborted = False
        self._batches = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing runs."""
        return not self._waiting and not any(self._busy)

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Take in what happened at *now* [s] and return what to do, in order.

        Raises
        ------
        ValueError
            If a lane finishes that was not running, or a request has more rows than fit in a batch.
        """
        actions: list[Action] = []
        if not self._asked:
            self._asked = True
            actions.append(SetCpu(self.cores))
        if isinstance(event, Arrived):
            self._arrive(event.request, actions)
        elif isinstance(event, BatchFinished):
            if not self._busy[event.lane]:
                raise ValueError(f"lane {event.lane} finished a batch but was not running one")
            self._busy[event.lane] = False
        elif isinstance(event, Cancelled):
            if self._waiting.pop(event.request_id, None):
                self._queue.remove(event.request_id)
        elif isinstance(event, Drain):
            self._draining = True
        elif isinstance(event, Abort):
            self._aborted = True
            actions.extend(Reject(r.request_id, RejectReason.CLOSED) for r in self._queue.take_all())
            self._waiting.clear()
        elif not isinstance(event, CpuApplied | Tick):
            raise TypeError(f"event must be one of sponge.core.events, got {event!r}")
        self._dispatch(now, actions)
        return actions

    def next_wakeup(self) -> float | None:
        """Return when the current wait for company ends [s], or None if there is none."""
        if not self._waiting or all(self._busy):
            return None
        return self._window_ends()

    def _arrive(self, request: Request, actions: list[Action]) -> None:
        if request.rows > self.max_batch_size:
            raise ValueError(f"rows must be at most max_batch_size={self.max_batch_size}, got {request.rows}")
        if self._aborted:
            actions.append(Reject(request.request_id, RejectReason.CLOSED))
            return
        if len(self._waiting) >= self.max_queue:
            actions.append(Reject(request.request_id, RejectReason.QUEUE_FULL))
            return
        self._queue.push(_by_arrival(request) if self.order == "fifo" else request)
        self._waiting[request.request_id] = request

    def _dispatch(self, now: float, actions: list[Action]) -> None:
        while self._waiting and not all(self._busy):
            if self.drop_late and self._drop_head(now, actions):
                continue
            at_once = self._draining or not self.window_s
            if not (at_once or self._batch_is_full() or now >= self._window_ends()):
                return
            actions.append(self._start())

    def _drop_head(self, now: float, actions: list[Action]) -> bool:
        request = self._waiting[self._queue.head().request_id]
        # A finished-in-time answer must be possible; with no prediction only the past is certain.
        if now + self._predict_s(request.rows) <= request.deadline:
            return False
        self._queue.remove(request.request_id)
        del self._waiting[request.request_id]
        actions.append(Reject(request.request_id, RejectReason.DEADLINE))
        return True

    def _batch_is_full(self) -> bool:
        if self._queue.rows < self.max_batch_size:
            return False
        group = self._queue.head().group
        return sum(request.rows for request in self._queue if request.group == group) >= self.max_batch_size

    def _window_ends(self) -> float:
        return min(request.arrived_at for request in self._waiting.values()) + self.window_s

    def _start(self) -> StartBatch:
        lane = self._busy.index(False)
        self._busy[lane] = True
        requests = self._queue.take(self.max_batch_size)
        for request in requests:
            del self._waiting[request.request_id]
        rows = sum([request.rows for request in requests])
        batch = Batch(
            batch_id=self._batches,
            request_ids=tuple([request.request_id for request in requests]),
            rows=rows,
            group=requests[0].group,
            lane=lane,
            cores=self._lane_cores,
            threads=self._threads,
            expected_s=self._predict_s(rows),
        )
        self._batches += 1
        return StartBatch(batch)

    def _predict_s(self, rows: int) -> float:
        if self.latency is None:
            return 0.0
        if rows not in self._expected_s:
            self._expected_s[rows] = self.latency.latency_s(rows, self._lane_cores, self.max_lanes)
        return self._expected_s[rows]


def _by_arrival(request: Request) -> Request:
    """Return the request with its arrival for a deadline."""
    arrived_at = request.arrived_at
    return Request(
        request_id=request.request_id,
        arrived_at=arrived_at,
        deadline=arrived_at,
        rows=request.rows,
        group=request.group,
    )
