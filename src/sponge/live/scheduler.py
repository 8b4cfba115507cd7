"""Scheduler: the live shell around a controller, as clients see it.

It holds the requests, one runner thread per lane (`sponge.live.lane`) and the engine (`sponge.live.engine`), which runs
the controller. A request's entry is taken out of the table exactly once, by the lane that runs it or by the engine that
turns it away or sees it cancelled, and whoever takes it settles its future.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import attrs
import numpy as np

from sponge.core.controller import Controller
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, Drain, Tick
from sponge.core.protocol import ControllerProtocol
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.core.values import Batch, RejectReason, Request
from sponge.errors import DeadlineExceeded, QueueFull, SchedulerClosed, SpongeError
from sponge.live.engine import Engine, Recorder, Settlement
from sponge.live.lane import Entry, Lane, Outputs, settle
from sponge.live.observing import Observer, Observers
from sponge.live.scalers import CpuScaler, ThreadScaler
from sponge.live.session import ElasticSession, SessionOrModel
from sponge.live.statistics import Statistics

_log = logging.getLogger("sponge")


class _RequestFuture(Future[Outputs]):
    """A future whose cancellation takes the request out of the queue."""

    def __init__(self, cancelled: Callable[[], None]) -> None:
        super().__init__()
        self._cancelled = cancelled

    def cancel(self) -> bool:
        """Cancel the request unless it runs already or is done; return whether it is cancelled."""
        already = self.cancelled()
        cancelled = super().cancel()
        if cancelled and not already:
            self._cancelled()
        return cancelled


class Scheduler:
    """Serves requests by their deadlines, on as few cores as that takes.

    Parameters
    ----------
    session
        The model: an `ElasticSession`, or whatever makes one (a session, a path); one made here is closed with
        the scheduler.
    solver
        Latency model, core range, largest batch and lanes. May be left out if *controller* is given.
    scaler
        Puts the allocation in force (`CgroupScaler`); None: the thread count alone limits the model. It is told which
        threads run the model; closing it is up to the caller.
    controller
        Decides; by default a `Controller` on *solver* with *settings*.
    settings
        Of the default controller.
    slo_s
        Budget of a request that is submitted without one [s]; None: every request must bring its own.
    clock
        Seconds, never decreasing; deadlines are instants on it.
    recorder
        Called with every event, its instant and the actions that followed, one at a time. It must be quick.
    name
        Prefix of the thread names.

    Raises
    ------
    ValueError
        If the arguments do not fit each other.
    """

    def __init__(
        self,
        session: ElasticSession | SessionOrModel,
        solver: Solver | None = None,
        scaler: CpuScaler | None = None,
        *,
        controller: ControllerProtocol | None = None,
        settings: Settings | None = None,
        slo_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
        name: str = "sponge",
    ) -> None:
        if slo_s is not None and not slo_s > 0:
            raise ValueError(f"slo_s must be positive, got {slo_s}")
        self._owned: list[Any] = []
        if not isinstance(session, ElasticSession):
            session = ElasticSession(session, max_threads=None if solver is None else math.ceil(solver.max_cores))
            self.own(session)
        self.session = session
        try:
            self.controller = controller or _default_controller(self.session, solver, settings)
            self.session.reserve(self.controller.max_lanes)
        except BaseException:
            for owned in self._owned:
                owned.close()
            raise
        self.scaler: CpuScaler = scaler or ThreadScaler()
        self.slo_s = slo_s
        self._clock = clock
        self._name = name
        self._ids = itertools.count()
        self._observers = Observers()
        self._groups: dict[Any, int] = {}
        self._entries: dict[int, Entry] = {}
        self._closing = self._stopped = False
        self._closed = threading.Lock()
        self._rejected: Counter[str] = Counter()
        self._cancelled = 0
        self._cores = 0.0
        self._cores_since = self._started_at = clock()
        self._allocated_core_s = 0.0
        self._resizes = self._cpu_control_errors = 0
        self._cpu_s_before = self.session.cpu_s()
        self._engine = Engine(
            self.controller,
            start=self._start,
            scale=self._scale,
            leave=self._leave,
            clock=clock,
            recorder=recorder,
            name=f"{name}-alarm",
        )
        self._lanes = [self._make_lane(index) for index in range(self.controller.max_lanes)]
        try:
            self.scaler.adopt([*(lane.thread_id for lane in self._lanes), *self.session.thread_ids()])
        except BaseException:
            self.close(drain=False)
            raise
        _open_schedulers.add(self)
        self._engine.post(Tick())  # the controller's first allocation

    # -- clients -------------------------------------------------------------------------------------------------

    def submit(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        budget_s: float | None = None,
        deadline: float | None = None,
    ) -> Future[Outputs]:
        """Queue one request; thread-safe.

        Parameters
        ----------
        inputs
            Input name to array, the batch along axis 0 (usually one row). The arrays are read when the batch starts:
            they must not be changed before the future is done.
        budget_s
            Time left for this request [s]; ``inf`` for no deadline. By default the scheduler's *slo_s*.
        deadline
            The instant by which the answer is due instead [s on the scheduler's clock, see `now`].

        Returns
        -------
        concurrent.futures.Future
            Gives the outputs of ``session.run`` for this request's rows. Its exception is `DeadlineExceeded` if the
            request was turned away, `QueueFull`, `ModelError`, or `SchedulerClosed`. Cancelling it takes the request
            out of the queue unless it already runs. Its callbacks run on the scheduler's threads: they must be quick,
            and must not wait for another request.

        Raises
        ------
        ValueError, TypeError
            If the inputs do not fit the model, or the deadline is missing or not a number.
        SchedulerClosed
            If the scheduler is closed.
        """
        arrived_at = self._clock()
        deadline = self._deadline(arrived_at, budget_s, deadline)
        rows, shapes = self.session.check(inputs)
        if rows > self.controller.max_batch_size:
            raise ValueError(
                f"a request must have at most max_batch_size={self.controller.max_batch_size} rows, got {rows}"
            )
        if self._closing:
            raise SchedulerClosed()
        group = self._groups.get(shapes)
        if group is None:
            group = self._groups.setdefault(shapes, len(self._groups))
        request_id = next(self._ids)
        future = _RequestFuture(lambda: self._engine.post(Cancelled(request_id)))
        request = Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline, rows=rows, group=group)
        if self._observers.watching:
            self._observers.submitted(request)
        self._entries[request_id] = Entry(request, inputs, future)
        self._engine.post(Arrived(request))
        return future

    async def infer(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        budget_s: float | None = None,
        deadline: float | None = None,
    ) -> Outputs:
        """Queue one request and wait for its outputs without blocking the event loop.

        Arguments and errors are those of `submit` and its future. Cancelling the awaiting task cancels the request.
        """
        return await asyncio.wrap_future(self.submit(inputs, budget_s=budget_s, deadline=deadline))

    def now(self) -> float:
        """Return the scheduler's clock [s], on which deadlines are instants."""
        return self._clock()

    @property
    def closed(self) -> bool:
        """Whether no request is accepted any more."""
        return self._closing

    def statistics(self) -> Statistics:
        """Return a snapshot of what has been done so far."""
        lanes = self._lanes
        batches = sum(lane.batches for lane in lanes)
        rows = sum(lane.rows for lane in lanes)
        now = self._clock()
        return Statistics(
            submitted=self._engine.arrived,
            met=sum(lane.met for lane in lanes),
            late=sum(lane.late for lane in lanes),
            failed=sum(lane.failed for lane in lanes),
            rejected=dict(self._rejected),
            cancelled=self._cancelled + sum(lane.cancelled for lane in lanes),
            waiting=len(self._entries),
            running=sum(lane.running for lane in lanes),
            batches=batches,
            mean_batch_size=rows / batches if batches else 0.0,
            cores=self._cores,
            allocated_core_s=self._allocated_core_s + self._cores * (now - self._cores_since),
            resizes=self._resizes,
            cpu_s=sum(lane.cpu_s() for lane in lanes) + self.session.cpu_s() - self._cpu_s_before,
            cpu_control=self.scaler.how,
            cpu_control_errors=self._cpu_control_errors,
        )

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell *observer* of every request, batch and allocation from now on; return what ends it."""
        self._observers.add(observer)
        self._observers.tell(lambda one: one.resized(self._cores, self._clock()) if one is observer else None)
        return lambda: self._observers.remove(observer)

    # -- life cycle ----------------------------------------------------------------------------------------------

    def own(self, *parts: Any) -> None:
        """Close these with the scheduler, in this order, after everything that uses them."""
        self._owned.extend(parts)

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Accept no more requests, serve (or turn away) those that wait, and stop.

        Parameters
        ----------
        drain
            Serve what waits; else its futures get `SchedulerClosed`. Running batches always finish.
        timeout_s
            How long to wait for that [s]; what then still waits is turned away.

        Returns
        -------
        bool
            False if a batch was still running when the time was up; nothing waits any more, and a later call ends the
            rest.

        Raises
        ------
        RuntimeError
            If called from a future's callback on one of the scheduler's own threads.
        """
        here = threading.current_thread()
        if self._engine.owns_thread(here) or any(lane.owns_thread(here) for lane in self._lanes):
            raise RuntimeError("close must not be called from a future's callback: it would wait for itself")
        if not self._closed.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            return False
        try:
            return self._stopped or self._close(drain, timeout_s)
        finally:
            self._closed.release()

    def _close(self, drain: bool, timeout_s: float | None) -> bool:
        self._closing = True
        drained = self._engine.wait_until_idle(Drain() if drain else Abort(), timeout_s)
        # What still waits when the time is up, or was submitted in between, is told.
        if not self._engine.wait_until_idle(Abort(), None if drained else 0.0):
            return False
        for lane in self._lanes:
            lane.stop()
        self._engine.stop()
        self._stopped = True
        for owned in self._owned:
            owned.close()
        _open_schedulers.discard(self)
        return True

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    # -- what the engine asks for --------------------------------------------------------------------------------

    def _start(self, batch: Batch) -> None:
        self._lanes[batch.lane].start(batch)

    def _leave(self, request_id: int, reason: RejectReason | None, now: float) -> Settlement | None:
        """Take out a request that will not run. Whoever takes the entry, a lane or the engine, settles it."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        if self._observers.watching:
            self._observers.left(entry.request, None if entry.future.cancelled() else reason, now)
        if reason is None or entry.future.cancelled():
            self._cancelled += 1
            return partial(settle, entry.future, None)
        self._rejected[reason.value] += 1
        return partial(settle, entry.future, self._error(entry, reason, now))

    def _scale(self, cores: float, now: float) -> float:
        """Put an allocation in force; return what is in force then."""
        try:
            applied = self.scaler.scale(cores)
        except Exception as error:  # CpuControlError, or whatever a scaler of the user's own raises
            if not self._cpu_control_errors:
                _log.warning("the allocation stays at %g cores: %s", self._cores, error)
            self._cpu_control_errors += 1
            return self._cores
        if applied != self._cores:
            self._allocated_core_s += self._cores * (now - self._cores_since)
            self._cores, self._cores_since = applied, now
            self._resizes += 1
            if self._observers.watching:
                self._observers.resized(applied, now)
        return applied

    def _error(self, entry: Entry, reason: RejectReason, now: float) -> SpongeError:
        if reason is RejectReason.DEADLINE:
            return DeadlineExceeded(entry.request_id, entry.deadline, now)
        if reason is RejectReason.QUEUE_FULL:
            return QueueFull(entry.request_id, self.controller.max_queue)
        return SchedulerClosed(entry.request_id)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _make_lane(self, index: int) -> Lane:
        return Lane(
            index,
            self.session,
            max_rows=self.controller.max_batch_size,
            take=lambda request_id: self._entries.pop(request_id, None),
            finished=lambda lane, service_s: self._engine.post(BatchFinished(lane, service_s is not None, service_s)),
            clock=self._clock,
            observers=self._observers,
            name=f"{self._name}-lane-{index}",
        )

    def _deadline(self, now: float, budget_s: float | None, deadline: float | None) -> float:
        if deadline is None:
            if budget_s is None:
                budget_s = self.slo_s
                if budget_s is None:
                    raise ValueError("budget_s or deadline must be given, since the scheduler has no slo_s")
            deadline = now + budget_s
        elif budget_s is not None:
            raise ValueError(f"only one of budget_s and deadline may be given, got {budget_s} and {deadline}")
        if math.isnan(deadline):
            raise ValueError(f"budget_s and deadline must be numbers, got {budget_s} and {deadline}")
        return float(deadline)


def _default_controller(session: ElasticSession, solver: Solver | None, settings: Settings | None) -> Controller:
    if solver is None:
        raise ValueError("solver must be given where controller is not, got None")
    if solver.max_cores > session.max_threads:
        raise ValueError(
            f"max_cores of the solver must be at most the session's max_threads={session.max_threads}, "
            f"got {solver.max_cores:g}"
        )
    if not session.dynamic_batch and solver.max_batch_size > 1:
        _log.info("the model's batch axis is fixed: its requests are served one by one")
        solver = attrs.evolve(solver, max_batch_size=1)
    return Controller(solver, settings)


_open_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    for scheduler in list(_open_schedulers):
        scheduler.close(drain=False, timeout_s=5.0)
