"""Service: what runs behind a `sponge.live.scheduler.Scheduler`.

It holds the requests, one runner thread per lane (`sponge.live.lane`) and the engine (`sponge.live.engine`), which runs
the controller. Rules, and why they hold:

* A request's entry is taken out of the table exactly once, by the lane that runs it or by the engine that turns it away
  or sees it cancelled, and whoever takes it settles its future.
* The threads hold the service and never the scheduler. So a scheduler that nobody refers to any more is garbage
  although its threads live, and `sponge.live.life_cycle` can end them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from sponge.core.events import Abort, BatchFinished, CpuApplied, Drain
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Batch, RejectReason
from sponge.errors import ControllerFailed, DeadlineExceeded, QueueFull, SchedulerClosed, SchedulerForked, SpongeError
from sponge.live.cpu_control import CpuControl
from sponge.live.engine import Engine, Recorder, Settlement
from sponge.live.futures import settle
from sponge.live.lane import Entry, Lane
from sponge.live.observing import Observers
from sponge.live.scalers import CpuScaler
from sponge.live.session import ElasticSession
from sponge.live.statistics import Statistics


class Service:
    """The running part of a scheduler; see there for the parameters."""

    def __init__(
        self,
        controller: ControllerProtocol,
        session: ElasticSession,
        scaler: CpuScaler,
        *,
        clock: Callable[[], float],
        recorder: Recorder | None,
        observers: Observers,
        name: str,
        owned: list[Any],
    ) -> None:
        self.entries: dict[int, Entry] = {}
        """Requests that wait, by id."""
        self.refusal: Callable[[int | None], SpongeError] | None = None
        """Why nothing is accepted any more; None while it is."""
        self.ended_at: float | None = None
        """When the last batch had been run and the service was closed [s]; None before."""
        self._controller = controller
        self._session = session
        self._scaler = scaler
        self._clock = clock
        self._observers = observers
        self._owned = owned
        self.name = name
        self._pid = os.getpid()
        self._stopped = False
        self._close_errors: list[BaseException] = []
        self._rejected: Counter[str] = Counter()
        self._cancelled = 0
        self._cpu = CpuControl(scaler, self._thread_ids, resized=self._resized, now=clock())
        self._cpu_s_before = session.cpu_s()
        self.engine = Engine(
            controller,
            admit=self._admit,
            start=self._start,
            scale=self._cpu.scale,
            leave=self._leave,
            give_up=self._give_up,
            call=self._call,
            ended=self._ended,
            clock=clock,
            recorder=recorder,
            name=f"{name}-alarm",
        )
        self._clock = self.engine.now  # it does not raise, whatever a clock of the user's own does
        self._lanes = [self._make_lane(index, name) for index in range(controller.max_lanes)]
        try:
            self._cpu.adopt()
        except BaseException:
            self.close(drain=False, timeout_s=None)
            raise

    @property
    def closing(self) -> bool:
        """Whether nothing is accepted any more."""
        return self.refusal is not None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to end, in this process."""
        return self._stopped or self._foreign

    @property
    def _foreign(self) -> bool:
        return self._pid != os.getpid()

    def statistics(self) -> Statistics:
        """Return a snapshot of what has been done so far."""
        if self._foreign:
            raise SchedulerForked(self._pid, os.getpid())
        lanes = self._lanes
        batches = sum(lane.batches for lane in lanes)
        rows = sum(lane.rows for lane in lanes)
        now = self._clock() if self.ended_at is None else self.ended_at
        return Statistics(
            submitted=self.engine.arrived,
            met=sum(lane.met for lane in lanes),
            late=sum(lane.late for lane in lanes),
            failed=sum(lane.failed for lane in lanes),
            rejected=dict(self._rejected),
            cancelled=self._cancelled + sum(lane.cancelled for lane in lanes),
            waiting=len(self.entries),
            running=sum(lane.running for lane in lanes),
            batches=batches,
            mean_batch_size=rows / batches if batches else 0.0,
            cores=self._cpu.cores,
            allocated_core_s=self._cpu.allocated_core_s(now),
            resizes=self._cpu.resizes,
            cpu_s=sum(lane.cpu_s() for lane in lanes) + self._session.cpu_s() - self._cpu_s_before,
            cpu_control=self._scaler.how,
            cpu_control_errors=self._cpu.errors,
            cpu_control_fault=self._cpu.fault,
            failure=None if self.engine.failure is None else repr(self.engine.failure),
        )

    def close(self, drain: bool, timeout_s: float | None) -> bool:
        """End the service, see `sponge.Scheduler.close`."""
        if self._foreign:
            return True
        if self.owns_this_thread():
            raise RuntimeError("close must not be called from a future's callback: it would wait for itself")
        # No lock is held while waiting: a second call, from anywhere, goes the same way beside the first, and one that
        # is broken off (Ctrl-C) can be made again.
        self.refusal = self.refusal or SchedulerClosed
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        drained = self.engine.wait_until_idle(Drain() if drain else Abort(), timeout_s)
        # What still waits when the time is up, or was submitted in between, is told.
        if not self.engine.wait_until_idle(Abort(), _left_s(ends_at) if drained else 0.0):
            return False
        threads = [*(lane.stop for lane in self._lanes), self.engine.stop]
        if not all(stop(_left_s(ends_at)) for stop in threads):
            return False
        if self._close_errors:
            raise self._close_errors.pop()
        return True

    def owns_this_thread(self) -> bool:
        """Tell whether this is called on one of the scheduler's own threads."""
        here = threading.current_thread()
        return self.engine.owns_thread(here) or any(lane.owns_thread(here) for lane in self._lanes)

    def _ended(self) -> None:
        """Do what is left to do when nothing runs any more; on the alarm's thread, which nothing interrupts."""
        for tell in self._give_up():  # none, unless a controller of the user's own has forgotten a request
            tell()
        self._stopped, self.ended_at = True, self._clock()
        for owned in self._owned:
            try:
                owned.close()
            except BaseException as error:
                self._close_errors.append(error)

    def turn_away(self) -> None:
        """Accept nothing more and tell all who wait, at once, even while somebody else is waiting for the end."""
        self.refusal = self.refusal or SchedulerClosed
        self.engine.post(Abort())

    def break_off(self) -> None:
        """Make the batches fail that run."""
        self._session.break_off()

    def own(self, *parts: Any) -> None:
        """Close these with the service, in this order, after everything that uses them."""
        self._owned.extend(parts)

    def leave_to_parent(self) -> None:
        """In a forked child: accept nothing, and fail what waits or runs in the copy without calling anybody back."""
        forked = partial(SchedulerForked, self._pid, os.getpid())
        self.refusal = forked
        came = [entry for entry in self.engine.take_inbox() if isinstance(entry, Entry)]
        entries = [*came, *self.entries.values(), *(entry for lane in self._lanes for entry in lane.serving)]
        self.entries.clear()
        for entry in entries:
            entry.future.fail_after_fork(forked(entry.request_id))

    # -- what the engine asks for --------------------------------------------------------------------------------

    def _admit(self, entry: Entry) -> None:
        self.entries[entry.request_id] = entry

    def _call(self) -> bool:
        return any(lane.call() for lane in self._lanes)

    def _start(self, batch: Batch) -> None:
        if not 0 <= batch.lane < len(self._lanes):
            raise RuntimeError(f"the controller has {len(self._lanes)} lanes and started a batch on lane {batch.lane}")
        self._lanes[batch.lane].start(batch)
        in_force = self._cpu.check(self._clock())
        if in_force is not None:
            self.engine.post(CpuApplied(in_force))  # handled next: this is called within the engine

    def _leave(self, request_id: int, reason: RejectReason | None, now: float) -> Settlement | None:
        """Take out a request that will not run. Whoever takes the entry, a lane or the engine, settles it."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return None
        if self._observers.watching:
            self._observers.left(entry.request, None if entry.future.gave_up else reason, now)
        if reason is None or entry.future.gave_up:
            self._cancelled += 1
            return partial(settle, entry.future, None)
        self._rejected[reason.value] += 1
        return partial(settle, entry.future, self._error(entry, reason, now))

    def _give_up(self) -> list[Settlement]:
        """Take out whatever waits: the controller has failed, or nothing runs any more."""
        if self.engine.failure is not None:
            self.refusal = partial(_controller_failed, self.engine.failure)
        now = self._clock()
        left = [self._leave(request_id, RejectReason.CLOSED, now) for request_id in list(self.entries)]
        return [settlement for settlement in left if settlement is not None]

    def _resized(self, cores: float, now: float) -> None:
        if self._observers.watching:
            self._observers.resized(cores, now)

    def _error(self, entry: Entry, reason: RejectReason, now: float) -> SpongeError:
        if reason is RejectReason.DEADLINE:
            return DeadlineExceeded(entry.request_id, entry.deadline, now)
        if reason is RejectReason.QUEUE_FULL:
            return QueueFull(entry.request_id, self._controller.max_queue)
        return (self.refusal or SchedulerClosed)(entry.request_id)

    def _thread_ids(self) -> list[int]:
        """Native ids of the threads that run the model."""
        return [*(lane.thread_id for lane in self._lanes), *self._session.thread_ids()]

    def _make_lane(self, index: int, name: str) -> Lane:
        return Lane(
            index,
            self._session,
            max_rows=self._controller.max_batch_size,
            take=lambda request_id: self.entries.pop(request_id, None),
            finished=lambda lane, service_s: self.engine.bring(
                BatchFinished(lane.index, service_s is not None, service_s), lane.has_work
            ),
            called=lambda lane: self.engine.run(lane.has_work),
            clock=self._clock,
            observers=self._observers,
            name=f"{name}-lane-{index}",
        )


def _controller_failed(failure: BaseException, request_id: int | None) -> ControllerFailed:
    error = ControllerFailed(request_id, repr(failure))
    error.__cause__ = failure
    return error


def _left_s(ends_at: float | None) -> float | None:
    return None if ends_at is None else max(0.0, ends_at - time.monotonic())
