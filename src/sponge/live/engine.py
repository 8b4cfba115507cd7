"""The engine: runs a controller on events, one at a time, on the scheduler's own threads and on no other.

Rules, and why they hold:

* A client only puts its event into the inbox and wakes somebody. It never runs the controller: its thread may be
  interrupted at any instant (Ctrl-C, a signal handler that raises, a stack that is nearly used up), and a decision that
  was broken off half-way cannot be taken up again. No client's thread ever holds the engine.
* Who is woken is a lane that has nothing to do, for it will most likely be given the request: so a lone request reaches
  its lane in one thread switch. If all lanes are busy it is the alarm's thread. A lane that has finished runs the
  engine itself, and takes its next batch without a switch.
* Who submits faster than the engine can decide waits a moment at the door, or the interpreter's lock would go to the
  clients and the inbox would grow without end. The wait is bounded and holds nothing.
* A lane leaves the engine when it has been given a batch; whoever leaves it looks into the inbox once more, and if
  something has come in, wakes somebody. So nothing that was put in is forgotten: who finds the engine running may rely
  on the one who runs it.
* Every event is handled at an instant of its own, so a recorded run replays exactly.
* Futures are settled after the engine has been left: a client's callback may do anything, submit included.
* The alarm's thread sends a `Tick` when the controller asked for one.
* A controller that raises is not asked again: what it held in its hands is lost with it. Everything that waits is told,
  and so is what comes; running batches finish.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Event, Tick
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Batch, RejectReason

_log = logging.getLogger("sponge")

_LONGEST_WAIT_S = 3600.0
_TURN_S = 1.0
"""How long to wait until an event is handled, where only that is waited for; a turn takes a thousandth of it."""
_CROWD = 256
"""Events in the inbox from which a client waits before it adds one, ..."""
_AT_THE_DOOR_S = (0.0002, 0.0004, 0.0008, 0.0016, 0.0032)
"""... these times one after the other, as long as it stays that full [s]."""
EVENTS_PER_TURN = 256
"""Events that a thread handles before it settles what came of them, and leaves the rest to the alarm's thread."""

Recorder: TypeAlias = Callable[[float, Event, list[Action]], None]
Settlement: TypeAlias = Callable[[], object]


class Signal:
    """Wakes one waiting thread; set before the wait, it is not lost. A bare lock: half the cost of a semaphore."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let the next `wait` return at once; setting it twice is setting it once."""
        try:
            self._lock.release()
        except RuntimeError:  # already set
            pass

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for `set`; return False if *timeout_s* passed first."""
        # Python refuses to wait for centuries; whoever is woken early asks again.
        return self._lock.acquire(True, -1 if timeout_s is None else min(max(0.0, timeout_s), _LONGEST_WAIT_S))


class _Posted:
    """An event in the inbox, and what comes with it. No equality: taking it back must find this one."""

    __slots__ = ("event", "more")

    def __init__(self, event: Event, more: Any) -> None:
        self.event = event
        self.more = more


class _End:
    """Tells who waits until all is over how far it is."""

    __slots__ = ("by_force", "handled", "over")

    def __init__(self, by_force: bool) -> None:
        self.by_force = by_force
        # Not a ``threading.Event``: one whose waiter is interrupted may stay locked, and then nobody can set it.
        self.handled = Signal()
        self.over = Signal()


class Engine:
    """Runs one controller.

    Parameters
    ----------
    controller
        Decides.
    admit
        Takes in what came with the `Arrived` of a request, before the controller hears of it.
    start
        Starts a batch on its lane; must return at once.
    scale
        Puts an allocation in force at an instant, and returns what is in force then [cores].
    leave
        Takes out a request that will not run (the reason why it was turned away, or None if it was cancelled) and
        returns how its client is told; None if there is nothing to tell. Called within the engine.
    give_up
        Takes out all requests that wait, since the controller failed, and returns how their clients are told.
    call
        Wakes a lane that has nothing to do, which then calls `run`; returns False if there is none.
    ended
        Called on the alarm's thread when it ends.
    clock
        Seconds, never decreasing.
    recorder
        Called with every event, its instant and the actions that followed.
    name
        Of the alarm's thread.
    """

    def __init__(
        self,
        controller: ControllerProtocol,
        *,
        admit: Callable[[Any], None],
        start: Callable[[Batch], None],
        scale: Callable[[float, float], float],
        leave: Callable[[int, RejectReason | None, float], Settlement | None],
        give_up: Callable[[], Iterable[Settlement]],
        call: Callable[[], bool],
        ended: Callable[[], None],
        clock: Callable[[], float],
        recorder: Recorder | None,
        name: str,
    ) -> None:
        self.arrived = 0
        """Requests that have come in."""
        self.failure: BaseException | None = None
        """What the controller raised, if it did."""
        self._controller = controller
        self._admit = admit
        self._start = start
        self._scale = scale
        self._leave = leave
        self._give_up = give_up
        self._call = call
        self._ended = ended
        self._clock = clock
        self._recorder = recorder
        self._last = 0.0
        self._inbox: deque[_Posted] = deque()
        self._busy = threading.Lock()
        self._running: set[int] = set()
        self._ends: list[_End] = []
        self._alarm = Signal()
        self._wakeup: float | None = None
        self._armed = -math.inf  # until when the alarm's thread sleeps [s]; -inf while it is awake
        self._stopped = False
        self._watcher = threading.Thread(target=self._watch, name=name, daemon=True)
        self._watcher.start()

    # -- for any thread ------------------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether more has come in than is handled in a turn."""
        return len(self._inbox) >= _CROWD

    def wait_at_the_door(self) -> None:
        """Let the engine catch up for a moment; not for its own threads, which others may be waiting for."""
        for pause_s in _AT_THE_DOOR_S:
            if not self.crowded:
                return
            time.sleep(pause_s)

    def post(self, event: Event, more: Any = None) -> bool:
        """Hand in an event, to be handled by one of the scheduler's threads; return False if the engine has stopped.

        An exception that arrives meanwhile (Ctrl-C) leaves the event either in the inbox or not there; if nobody has
        been woken for it, it is handled together with the next one.
        """
        posted = _Posted(event, more)
        self._inbox.append(posted)
        if self._stopped:
            try:
                self._inbox.remove(posted)
            except ValueError:  # the alarm's thread took it on its last round
                return True
            return False
        if not self._busy.locked():
            self._wake()
        return True

    def wait_until_idle(self, event: Event, timeout_s: float | None) -> bool:
        """Hand in an event, and wait until it is handled and nothing waits or runs; return whether that came to be.

        Whether that is so the controller says; after an `Abort` nothing may run, whatever it says.
        """
        end = _End(by_force=isinstance(event, Abort))
        if not self.post(event, end):
            return True
        if timeout_s is not None:
            end.handled.wait(max(timeout_s, _TURN_S))
        return end.over.wait(timeout_s)

    def stop(self, timeout_s: float | None) -> bool:
        """End the alarm's thread; return whether it has ended in time. Nothing is handled any more after that."""
        self._stopped = True
        self._alarm.set()
        self._watcher.join(timeout_s)
        return not self._watcher.is_alive()

    def owns_thread(self, thread: threading.Thread) -> bool:
        """Tell whether this is the alarm's thread."""
        return thread is self._watcher

    def take_inbox(self) -> list[Any]:
        """In a forked child, where nobody handles it: empty the inbox and return what came with its events."""
        posted = [*self._inbox]
        self._inbox.clear()
        return [one.more for one in posted]

    def _wake(self) -> None:
        if not self._call():
            self._alarm.set()

    # -- for the lanes' threads ----------------------------------------------------------------------------------

    def bring(self, event: Event, has_work: Callable[[], bool]) -> None:
        """Hand in an event and run the engine, until the inbox is empty or the lane *has_work*."""
        self._inbox.append(_Posted(event, None))
        self.run(has_work)

    def run(self, has_work: Callable[[], bool]) -> None:
        """Handle what is in the inbox, unless somebody is at it, until the lane *has_work*."""
        while self._inbox and self._busy.acquire(blocking=False):
            settlements: list[Settlement] = []
            try:
                left = self._turn(settlements, has_work)
            finally:
                self._busy.release()
            if self._inbox and (left or settlements):
                self._alarm.set()
            for settle in settlements:
                settle()
            if left:
                return

    # -- within the engine ---------------------------------------------------------------------------------------

    def _turn(self, settlements: list[Settlement], has_work: Callable[[], bool] | None) -> bool:
        """Handle some events; add how to tell the requests that leave by it, and return whether to leave the rest."""
        inbox = self._inbox
        left = True
        for _ in range(EVENTS_PER_TURN):
            if not inbox:
                left = False
                break
            try:
                resized = self._handle(inbox.popleft(), settlements)
            except BaseException as error:  # whatever a controller may raise: its clients are told, and no thread ends
                self._fail(error, settlements)
                resized = False
            # What is in force now is told before the lane goes to work, or another thread would be woken for that.
            if has_work is not None and not resized and has_work():
                break
        self._look_ahead(settlements)
        return left

    def _handle(self, posted: _Posted, settlements: list[Settlement]) -> bool:
        """Handle one event; return whether it changed the allocation, which is the next event."""
        event = posted.event
        if isinstance(event, Arrived):
            self.arrived += 1
            self._admit(posted.more)
            if self._inbox and isinstance(self._inbox[0].event, Arrived):
                event = Arrived(event.request, more=True)
        elif isinstance(event, BatchFinished):
            self._running.discard(event.lane)
        if isinstance(posted.more, _End):
            self._ends.append(posted.more)
        now = self.now()
        if isinstance(event, Cancelled):
            self._take_out(event.request_id, None, now, settlements)
        actions = self._decide(event, now)
        if self._recorder is not None:
            self._record(now, event, actions)
        resized = False
        for action in actions:
            if isinstance(action, StartBatch):
                self._start_batch(action.batch)
            elif isinstance(action, SetCpu):
                self._inbox.appendleft(_Posted(CpuApplied(self._scale(action.cores, now)), None))
                resized = True
            else:
                self._take_out(action.request_id, action.reason, now, settlements)
        return resized

    def now(self) -> float:
        """Return the clock's instant; a clock that raises counts as standing still."""
        try:
            self._last = self._clock()
        except BaseException:
            _log.exception("the clock failed, and counts as standing still")
        return self._last

    def _decide(self, event: Event, now: float) -> list[Action]:
        if self.failure is None:
            return self._controller.handle(event, now=now)
        return [Reject(event.request.request_id, RejectReason.CLOSED)] if isinstance(event, Arrived) else []

    def _start_batch(self, batch: Batch) -> None:
        if batch.lane in self._running:
            raise RuntimeError(f"the controller started batch {batch.batch_id} on lane {batch.lane}, which is busy")
        self._start(batch)
        self._running.add(batch.lane)

    def _look_ahead(self, settlements: list[Settlement]) -> None:
        """See when to come back, and whether all is over that somebody waits for the end of."""
        try:
            wakeup = None if self.failure else self._controller.next_wakeup()
            idle = not self._running if self.failure or not self._ends else self._controller.idle
        except BaseException as error:
            self._fail(error, settlements)
            wakeup, idle = None, not self._running
        self._wakeup = wakeup
        if wakeup is not None and wakeup < self._armed:
            self._armed = wakeup
            self._alarm.set()
        for end in tuple(self._ends):
            if not self._inbox and (idle or (end.by_force and not self._running)):
                self._ends.remove(end)
                settlements.append(end.over.set)  # after those of this turn
            settlements.append(end.handled.set)

    def _fail(self, error: BaseException, settlements: list[Settlement]) -> None:
        """Go on without the controller: what waits is told, what comes is turned away, what runs finishes."""
        if self.failure is None:
            self.failure = error
            _log.critical("the controller failed, nothing is served any more: %r", error, exc_info=error)
        settlements.extend(self._give_up())

    def _record(self, now: float, event: Event, actions: list[Action]) -> None:
        try:
            if self._recorder is not None:
                self._recorder(now, event, actions)
        except BaseException:
            _log.exception("the recorder failed and is not called any more")
            self._recorder = None

    def _take_out(
        self, request_id: int, reason: RejectReason | None, now: float, settlements: list[Settlement]
    ) -> None:
        settlement = self._leave(request_id, reason, now)
        if settlement is not None:
            settlements.append(settlement)

    # -- the alarm's thread --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._round()
        self._ended()

    def _round(self) -> bool:
        """Handle what there is, and sleep; return whether it was the last time."""
        stopping = self._stopped  # asked first: what came in before it was set is then seen below
        wakeup = self._catch_up()
        if not self._inbox:
            if stopping:
                return True
            self._alarm.wait(None if wakeup is None else wakeup - self.now())
        return False

    def _catch_up(self) -> float | None:
        """Handle what is in the inbox, and the tick if it is due; return when to come back [s]."""
        settlements: list[Settlement] = []
        with self._busy:  # waits, unlike others: when to come back is known only when the tick has been handled
            self._armed = -math.inf
            if not self._inbox and self._wakeup is not None and self._wakeup <= self.now():
                self._inbox.append(_Posted(Tick(), None))
            if self._inbox:
                self._turn(settlements, None)
            wakeup = self._wakeup
            self._armed = math.inf if wakeup is None else wakeup
        if self._inbox and settlements:
            self._wake()
        for settle in settlements:
            settle()
        return wakeup
