"""What all baselines share: the queue, the lanes, the allocation, periods, closing.

Rules, and why they hold:

* A policy overrides a few hooks; what arrives, starts, ends and is turned away is booked here and nowhere else. So two
  baselines differ in what they decide and in nothing besides.
* Periods are counted from the first event and end when the first event at or after their end is handled, before that
  event itself: what arrives at the very end of a period belongs to the next one. A controller that has nothing to
  decide while nobody comes does not ask to be woken for it.
* The cores in force are what the last `CpuApplied` says; before the first one, what was asked for.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.edf import EdfQueue
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.latency import Latency
from sponge.core.values import Batch, RejectReason, Request, intra_op_threads

Order: TypeAlias = Literal["fifo", "edf", "lifo"]
"""First come first served, earliest deadline first, last come first served; ties leave by sequence number."""

_TOLERANCE_CORES = 1e-9


def require(fine: bool, name: str, range_: str, value: object) -> None:
    """Refuse an argument that is out of range.

    Raises
    ------
    ValueError
        If not *fine*; it names the argument and its value.
    """
    if not fine:
        raise ValueError(f"{name} must be {range_}, got {value!r}")


@attrs.define(slots=True)
class Running:
    """A batch on its lane. Not frozen, since one is made for every batch."""

    batch: Batch
    started_at: float
    first_arrived_at: float
    """Arrival of the request that has waited longest."""


class Baseline:
    """A controller whose decisions are hooks: by itself it keeps its allocation and starts whatever is waiting.

    Parameters
    ----------
    initial_cores
        Asked for at the first event [cores], > 0.
    order
        Who leaves the queue first.
    max_batch_size
        Rows of a batch at most, ≥ 1.
    max_lanes
        Batches side by side at most, ≥ 1.
    max_queue
        Waiting requests at most, ≥ 1; a further one is turned away.
    latency
        Predicts service times; without one, batches say that they expect 0 s.
    period_s
        Length of a period [s], > 0; None for a policy without.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        *,
        initial_cores: float,
        order: Order,
        max_batch_size: int,
        max_lanes: int = 1,
        max_queue: int = 1024,
        latency: Latency | None = None,
        period_s: float | None = None,
    ) -> None:
        require(0 < initial_cores < float("inf"), "cores", "positive and finite", initial_cores)
        require(order in ("fifo", "edf", "lifo"), "order", "'fifo', 'edf' or 'lifo'", order)
        require(max_batch_size >= 1, "max_batch_size", "at least 1", max_batch_size)
        require(max_lanes >= 1, "lanes", "at least 1", max_lanes)
        require(max_queue >= 1, "max_queue", "at least 1", max_queue)
        require(period_s is None or 0 < period_s < float("inf"), "period_s", "positive and finite", period_s)
        self.order = order
        self.max_batch_size = max_batch_size
        self.max_lanes = max_lanes
        self.max_queue = max_queue
        self.latency = latency
        self.period_s = period_s
        self._initial_cores = float(initial_cores)
        # Each policy's order is an order of deadlines to the queue; the requests as they came are kept beside it.
        self._queue = EdfQueue()
        self._waiting: dict[int, Request] = {}
        self._lanes: list[Running | None] = [None] * max_lanes
        self._cores_asked: float | None = None
        self._cores_in_force: float | None = None
        self._started_at = 0.0
        self._periods = 0
        self._draining = False
        self._aborted = False
        self._batches = 0
        self._now = float("-inf")

    # -- the door --------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing runs."""
        return not self._waiting and not any(self._lanes)

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Take in what happened at *now* [s] and return what to do, in order.

        Raises
        ------
        ValueError
            If a lane finishes that was not running, or a request has more rows than fit in a batch.
        """
        now = self._now = now if now > self._now else self._now
        actions: list[Action] = []
        if self._cores_asked is None:
            self._started_at = now
            self._ask(self._initial_cores, actions)
        if self.period_s is not None:
            self._pass_periods(now, actions)
        if isinstance(event, Arrived):
            if len(self._waiting) >= self.max_queue:
                self._dispatch(now, actions)  # whoever of a burst can start now makes room
            self._arrive(event.request, now, actions)
            if event.more:
                return actions
        elif isinstance(event, BatchFinished):
            self._finish(event, now)
        elif isinstance(event, CpuApplied):
            self._cores_in_force = event.cores
            self._on_applied(event.cores)
        elif isinstance(event, Cancelled):
            self._take_out(event.request_id)
        elif isinstance(event, Drain):
            self._draining = True
        elif isinstance(event, Abort):
            self._aborted = True
            actions.extend(Reject(request.request_id, RejectReason.CLOSED) for request in self._queue.take_all())
            self._waiting.clear()
        elif not isinstance(event, Tick):
            raise TypeError(f"event must be one of sponge.core.events, got {event!r}")
        self._dispatch(now, actions)
        self._after(actions)
        return actions

    def next_wakeup(self) -> float | None:
        """Return when a `Tick` is due if nothing happens before [s], or None."""
        wakeup = self._waits_until() if self._waiting else None
        if self.period_s is not None and self._cores_asked is not None and self._watches():
            period_ends = self._period_ends()
            wakeup = period_ends if wakeup is None else min(wakeup, period_ends)
        return None if wakeup == float("inf") else wakeup

    # -- what a policy says ----------------------------------------------------------------------------------

    def _rows_to_start(self, now: float) -> int | None:
        """Return the rows that the next batch may have, or None to wait; a lane is free and somebody waits."""
        return self.max_batch_size

    def _waits_until(self) -> float | None:
        """Return when a decision about those who wait is due [s], if nothing happens before."""
        return None

    def _turn_away(self, now: float) -> Request | None:
        """Return a request that is waiting and is not worth serving any more, if there is one."""
        return None

    def _lane_is_free(self) -> bool:
        """Return whether one more batch may start."""
        return None in self._lanes

    def _lane_cores(self) -> float:
        """Return the cores of the next batch."""
        in_force = self._cores_in_force
        cores = self._cores_asked if in_force is None or in_force <= 0 else in_force
        return (cores or self._initial_cores) / self.max_lanes

    def _on_period(self, ended_at: float, actions: list[Action]) -> None:
        """Do what is due at the end of a period."""

    def _watches(self) -> bool:
        """Return whether the end of the running period may change anything though nobody comes before it."""
        return not self.idle

    def _on_arrival(self, request: Request, now: float) -> None:
        """Note an arrival, also of a request that is then turned away."""

    def _on_finish(self, running: Running, event: BatchFinished, now: float) -> None:
        """Note the end of a batch."""

    def _on_applied(self, cores: float) -> None:
        """Note that an allocation has come into force."""

    def _after(self, actions: list[Action]) -> None:
        """Do what remains to be done once everything is booked."""

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def _ask(self, cores: float, actions: list[Action]) -> None:
        if self._cores_asked is None or abs(cores - self._cores_asked) > _TOLERANCE_CORES:
            self._cores_asked = cores
            actions.append(SetCpu(cores))

    def _period_ends(self) -> float:
        assert self.period_s is not None
        return self._started_at + (self._periods + 1) * self.period_s

    def _pass_periods(self, now: float, actions: list[Action]) -> None:
        ends = self._period_ends()
        while ends <= now:
            self._on_period(ends, actions)
            self._periods += 1
            ends = self._period_ends()

    def _arrive(self, request: Request, now: float, actions: list[Action]) -> None:
        if request.rows > self.max_batch_size:
            raise ValueError(f"rows must be at most max_batch_size={self.max_batch_size}, got {request.rows!r}")
        self._on_arrival(request, now)
        if self._aborted:
            actions.append(Reject(request.request_id, RejectReason.CLOSED))
        elif len(self._waiting) >= self.max_queue:
            actions.append(Reject(request.request_id, RejectReason.QUEUE_FULL))
        else:
            self._queue.push(request if self.order == "edf" else _by_arrival(request, self.order))
            self._waiting[request.request_id] = request

    def _finish(self, event: BatchFinished, now: float) -> None:
        running = self._lanes[event.lane]
        if running is None:
            raise ValueError(f"lane {event.lane} finished a batch but was not running one")
        self._on_finish(running, event, now)
        self._lanes[event.lane] = None

    def _take_out(self, request_id: int) -> None:
        if self._waiting.pop(request_id, None) is not None:
            self._queue.remove(request_id)

    def _dispatch(self, now: float, actions: list[Action]) -> None:
        while self._waiting:
            hopeless = self._turn_away(now)
            if hopeless is not None:
                self._take_out(hopeless.request_id)
                actions.append(Reject(hopeless.request_id, RejectReason.DEADLINE))
                continue
            if not self._lane_is_free():
                return
            rows = self._rows_to_start(now)
            if rows is None:
                return
            actions.append(self._start(rows, now))

    def _start(self, max_rows: int, now: float) -> StartBatch:
        requests = self._queue.take(max_rows)
        head = requests[0]
        rows, first_arrived_at = head.rows, head.arrived_at
        del self._waiting[head.request_id]
        for request in requests[1:]:
            rows += request.rows
            first_arrived_at = min(first_arrived_at, request.arrived_at)
            del self._waiting[request.request_id]
        cores = self._lane_cores()
        lane = self._lanes.index(None)
        batch = Batch(
            batch_id=self._batches,
            request_ids=tuple([request.request_id for request in requests]),
            rows=rows,
            group=head.group,
            lane=lane,
            cores=cores,
            threads=intra_op_threads(cores),
            expected_s=self._expected_s(rows),
        )
        self._batches += 1
        self._lanes[lane] = Running(batch, now, first_arrived_at)
        return StartBatch(batch)

    # -- what policies ask -----------------------------------------------------------------------------------

    def _head(self) -> Request:
        """Return who leaves the queue next; somebody must be waiting."""
        return self._waiting[self._queue.head().request_id]

    def _oldest(self) -> Request:
        """Return who has waited longest; somebody must be waiting."""
        return next(iter(self._waiting.values()))

    def _has_rows(self, rows: int) -> bool:
        """Return whether as many rows wait that may share a batch with the head."""
        if self._queue.rows < rows:
            return False
        group = self._queue.head().group
        return sum(request.rows for request in self._queue if request.group == group) >= rows

    def _expected_s(self, rows: int) -> float:
        """Return the predicted service time of a batch that starts now [s]."""
        if self.latency is None:
            return 0.0
        return self.latency.latency_s(rows, self._lane_cores(), self.max_lanes)

    # -- for tests -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants."""
        self._queue.check()
        assert {request.request_id for request in self._queue} == self._waiting.keys()
        assert len(self._waiting) <= self.max_queue
        running = [entry.batch for entry in self._lanes if entry is not None]
        ids = [request_id for batch in running for request_id in batch.request_ids]
        assert len(ids) == len(set(ids))
        assert not any(request_id in self._waiting for request_id in ids)
        for lane, entry in enumerate(self._lanes):
            assert entry is None or entry.batch.lane == lane
        assert not (self._aborted and self._waiting)
        wakeup = self.next_wakeup()
        assert wakeup is None or wakeup > self._now, "a tick that would change nothing"


def _by_arrival(request: Request, order: Order) -> Request:
    """Return the request with a deadline that gives its place in this order."""
    return Request(
        request_id=request.request_id,
        arrived_at=request.arrived_at,
        deadline=request.arrived_at if order == "fifo" else -request.arrived_at,
        rows=request.rows,
        group=request.group,
    )
