"""Scheduler: the live shell around a controller.

Rules, and why they hold:

* There is no engine thread to hand a request over to. Whoever brings an event (a client that submits, a lane that has
  finished, the alarm) puts it into the inbox and, if nobody is at it, runs the controller on what is there. A request
  thus reaches a free lane in one thread switch instead of two, and a lane that has finished takes its next batch
  in none. Nobody ever waits for the engine: who finds it busy leaves the event to the one who runs it.
* Events are handled one at a time, each with its instant, so a recorded run replays exactly.
* Futures are settled outside of the engine: a client's callback may do anything, submit included.
* The alarm's thread sends a `Tick` when the controller asked for one, and takes over when the inbox does not empty, so
  that no client is kept working for the others.
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
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import attrs
import numpy as np

from sponge.core.actions import Action, SetCpu, StartBatch
from sponge.core.controller import Controller, ControllerProtocol, Settings
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.solver import Solver
from sponge.core.values import RejectReason, Request
from sponge.errors import CpuControlError, DeadlineExceeded, QueueFull, SchedulerClosed, SpongeError
from sponge.live.lane import Entry, Lane, Outputs, Signal, settle
from sponge.live.scalers import CpuScaler, ThreadScaler
from sponge.live.session import ElasticSession, SessionOrModel

_log = logging.getLogger("sponge")

_EVENTS_PER_TURN = 256
"""Events that one thread handles before it leaves the rest to the alarm's thread."""

Recorder = Callable[[float, Event, list[Action]], None]


@attrs.frozen(kw_only=True)
class Statistics:
    """What a scheduler has done so far: a snapshot of counts since it was started.

    Every submitted request is in exactly one of *met*, *late*, *failed*, *rejected* (by reason), *cancelled*,
    *waiting* and *running*, up to those that change hands during the snapshot.
    """

    submitted: int
    met: int
    """Answered by their deadline."""
    late: int
    """Answered after their deadline."""
    failed: int
    """Ended by an error of the model."""
    rejected: Mapping[str, int]
    """Turned away, by reason (`sponge.core.values.RejectReason`)."""
    cancelled: int
    waiting: int
    running: int
    batches: int
    mean_batch_size: float
    cores: float
    """Allocation now in force [cores]."""
    allocated_core_s: float
    """Integral of the allocation over time [core-seconds]."""
    resizes: int
    """Changes of the allocation."""
    cpu_s: float
    """CPU time used by the lanes and the sessions' workers [s]."""
    cpu_control: str
    """By what the allocation is enforced."""
    cpu_control_errors: int
    """Changes of the allocation that the kernel refused."""

    @property
    def slo_attainment(self) -> float:
        """Share of the ended requests that were answered by their deadline; 1 before the first ended."""
        ended = self.met + self.late + self.failed + sum(self.rejected.values())
        return self.met / ended if ended else 1.0


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
        self.controller = controller or _default_controller(self.session, solver, settings)
        self.scaler: CpuScaler = scaler or ThreadScaler()
        self.slo_s = slo_s
        self._clock = clock
        self._recorder = recorder
        self._name = name
        self._ids = itertools.count()
        self._groups: dict[Any, int] = {}
        self._entries: dict[int, Entry] = {}
        self._inbox: deque[Event] = deque()
        self._engine = threading.Lock()
        self._alarm = Signal()
        self._wakeup: float | None = None
        self._closing = False
        self._closed = threading.Lock()
        self._idle = threading.Event()
        self._stopped = False
        self._rejected: Counter[str] = Counter()
        self._cancelled = self._submitted = 0
        self._cores = 0.0
        self._cores_since = self._started_at = clock()
        self._allocated_core_s = 0.0
        self._resizes = self._cpu_control_errors = 0
        self._cpu_s_before = self.session.cpu_s()
        self.session.reserve(self.controller.max_lanes)
        self._lanes = [self._make_lane(index) for index in range(self.controller.max_lanes)]
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-alarm", daemon=True)
        self._watcher.start()
        self.scaler.adopt([*(lane.thread_id for lane in self._lanes), *self.session.thread_ids()])
        _open_schedulers.add(self)
        self._post(Tick())  # the controller's first allocation

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
            out of the queue unless it already runs.

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
        future = _RequestFuture(lambda: self._post(Cancelled(request_id)))
        self._entries[request_id] = Entry(request_id, inputs, rows, deadline, future)
        self._post(
            Arrived(Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline, rows=rows, group=group))
        )
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

    def statistics(self) -> Statistics:
        """Return a snapshot of what has been done so far."""
        lanes = self._lanes
        batches = sum(lane.batches for lane in lanes)
        rows = sum(lane.rows for lane in lanes)
        now = self._clock()
        return Statistics(
            submitted=self._submitted,
            met=sum(lane.met for lane in lanes),
            late=sum(lane.late for lane in lanes),
            failed=sum(lane.failed for lane in lanes),
            rejected=dict(self._rejected),
            cancelled=self._cancelled,
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
            False if a batch was still running when the time was up; its lane is left to itself.
        """
        with self._closed:
            if self._stopped:
                return True
            self._closing = True
            self._post(Drain() if drain else Abort())
            finished = self._idle.wait(timeout_s)
            self._post(Abort())
            # Without a time limit nothing runs any more; with one, what had waited is gone and the rest is told below.
            self._stopped = True
            if finished:
                for lane in self._lanes:
                    lane.stop()
            self._alarm.set()
            self._watcher.join()
            if finished:
                for owned in self._owned:
                    owned.close()
            _open_schedulers.discard(self)
            return finished

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    # -- the engine ----------------------------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        self._inbox.append(event)
        self._run_engine()

    def _run_engine(self) -> None:
        """Handle what is in the inbox, unless somebody is at it."""
        while self._inbox and self._engine.acquire(blocking=False):
            try:
                settled, left = self._turn()
            finally:
                self._engine.release()
            for entry, error in settled:
                settle(entry.future, error)
            if left:
                self._alarm.set()
                return

    def _turn(self) -> tuple[list[tuple[Entry, SpongeError | None]], bool]:
        """Handle some events; return the requests that have got their outcome by it, and whether events are left."""
        inbox, controller, clock = self._inbox, self.controller, self._clock
        settled: list[tuple[Entry, SpongeError | None]] = []
        for _ in range(_EVENTS_PER_TURN):
            if not inbox:
                break
            event = inbox.popleft()
            now = clock()
            if isinstance(event, Arrived):
                self._submitted += 1
            elif isinstance(event, Cancelled):
                # Whoever takes the entry, a lane or the engine, is the one who settles it.
                entry = self._entries.pop(event.request_id, None)
                if entry is not None:
                    settled.append((entry, None))
                self._cancelled += 1
            actions = controller.handle(event, now=now)
            if self._recorder is not None:
                self._recorder(now, event, actions)
            for action in actions:
                if isinstance(action, StartBatch):
                    self._lanes[action.batch.lane].start(action.batch)
                elif isinstance(action, SetCpu):
                    inbox.appendleft(CpuApplied(self._scale(action.cores, now)))
                else:
                    entry = self._entries.pop(action.request_id, None)
                    if entry is not None:
                        settled.append((entry, self._reason(entry, action.reason, now)))
        wakeup, before = controller.next_wakeup(), self._wakeup
        self._wakeup = wakeup
        if wakeup is not None and (before is None or wakeup < before):
            self._alarm.set()
        if self._closing and controller.idle and not inbox:
            self._idle.set()
        return settled, bool(inbox)

    def _watch(self) -> None:
        while not self._stopped:
            wakeup = self._wakeup
            rung = self._alarm.wait(None if wakeup is None else wakeup - self._clock())
            if self._stopped:
                return
            if not rung:
                with self._engine:
                    self._inbox.append(Tick())
                    settled, _ = self._turn()
                for entry, error in settled:
                    settle(entry.future, error)
            self._run_engine()

    def _scale(self, cores: float, now: float) -> float:
        """Put an allocation in force; return what is in force then."""
        try:
            applied = self.scaler.scale(cores)
        except CpuControlError as error:
            if not self._cpu_control_errors:
                _log.warning("the allocation stays at %g cores: %s", self._cores, error)
            self._cpu_control_errors += 1
            return self._cores
        if applied != self._cores:
            self._allocated_core_s += self._cores * (now - self._cores_since)
            self._cores, self._cores_since = applied, now
            self._resizes += 1
        return applied

    def _reason(self, entry: Entry, reason: RejectReason, now: float) -> SpongeError:
        self._rejected[reason.value] += 1
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
            finished=lambda lane, service_s: self._post(BatchFinished(lane, service_s is not None, service_s)),
            clock=self._clock,
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
