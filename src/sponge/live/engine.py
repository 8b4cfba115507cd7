"""The engine: runs a controller on events, one at a time, without a thread of its own.

Rules, and why they hold:

* Whoever brings an event (a client that submits, a lane that has finished, the alarm) puts it into the inbox and, if
  nobody is at it, runs the controller on what is there. A request thus reaches a free lane in one thread switch instead
  of two, and a lane that has finished takes its next batch in none. Nobody ever waits for the engine: who finds it
  busy leaves the event to the one who runs it.
* Every event is handled at an instant of its own, so a recorded run replays exactly.
* Futures are settled after the engine has been left: a client's callback may do anything, submit included.
* The alarm's thread sends a `Tick` when the controller asked for one, and takes over when the inbox does not empty, so
  that no client is kept working for the others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from sponge.core.actions import Action, SetCpu, StartBatch
from sponge.core.events import Arrived, Cancelled, CpuApplied, Event, Tick
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Batch, RejectReason

_log = logging.getLogger("sponge")

_LONGEST_WAIT_S = 3600.0
EVENTS_PER_TURN = 256
"""Events that one thread handles before it leaves the rest to the alarm's thread."""

Recorder: TypeAlias = Callable[[float, Event, list[Action]], None]
Settlement: TypeAlias = Callable[[], None]


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


class Engine:
    """Runs one controller.

    Parameters
    ----------
    controller
        Decides.
    start
        Starts a batch on its lane; must return at once.
    scale
        Puts an allocation in force at an instant, and returns what is in force then [cores].
    leave
        Takes out a request that will not run (the reason why it was turned away, or None if it was cancelled) and
        returns how its client is told; None if there is nothing to tell. Called within the engine.
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
        start: Callable[[Batch], None],
        scale: Callable[[float, float], float],
        leave: Callable[[int, RejectReason | None, float], Settlement | None],
        clock: Callable[[], float],
        recorder: Recorder | None,
        name: str,
    ) -> None:
        self.arrived = 0
        """Requests that have come in."""
        self._controller = controller
        self._start = start
        self._scale = scale
        self._leave = leave
        self._clock = clock
        self._recorder = recorder
        self._inbox: deque[Event] = deque()
        self._busy = threading.Lock()
        self._alarm = Signal()
        self._wakeup: float | None = None
        self._armed: float | None = None  # until when the alarm's thread sleeps; None: until it is rung
        self._stopped = False
        self._idle: threading.Event | None = None
        self._watcher = threading.Thread(target=self._watch, name=name, daemon=True)
        self._watcher.start()

    def post(self, event: Event) -> None:
        """Hand in an event; it is handled now, or by the thread that is running the engine."""
        self._inbox.append(event)
        self._run()

    def wait_until_idle(self, event: Event, timeout_s: float | None) -> bool:
        """Handle an event that ends things, and wait until nothing waits or runs; return whether that came to be."""
        idle = threading.Event()
        settlements: list[Settlement] = []
        with self._busy:  # no turn may end between the two, or it would speak for the time before the event
            self._idle = idle
            self._inbox.append(event)
            self._turn(settlements)
        for settle in settlements:
            settle()
        self._run()
        return idle.wait(timeout_s)

    def stop(self) -> None:
        """End the alarm's thread. Events are still handled, by those who bring them."""
        self._stopped = True
        self._alarm.set()
        self._watcher.join()

    def owns_thread(self, thread: threading.Thread) -> bool:
        """Tell whether this is the alarm's thread."""
        return thread is self._watcher

    def _run(self) -> None:
        """Handle what is in the inbox, unless somebody is at it."""
        while self._inbox and self._busy.acquire(blocking=False):
            settlements: list[Settlement] = []
            left = False
            try:
                left = self._turn(settlements) and not self._stopped
            finally:
                self._busy.release()
                if left:
                    self._alarm.set()
                for settle in settlements:
                    settle()
            if left:
                return

    def _turn(self, settlements: list[Settlement]) -> bool:
        """Handle some events; add how to tell the requests that leave by it, and return whether events are left."""
        inbox, controller, clock = self._inbox, self._controller, self._clock
        for _ in range(EVENTS_PER_TURN):
            if not inbox:
                break
            event = inbox.popleft()
            now = clock()
            if isinstance(event, Arrived):
                self.arrived += 1
            elif isinstance(event, Cancelled):
                self._take_out(event.request_id, None, now, settlements)
            actions = controller.handle(event, now=now)
            if self._recorder is not None:
                self._record(now, event, actions)
            for action in actions:
                if isinstance(action, StartBatch):
                    self._start(action.batch)
                elif isinstance(action, SetCpu):
                    inbox.appendleft(CpuApplied(self._scale(action.cores, now)))
                else:
                    self._take_out(action.request_id, action.reason, now, settlements)
        wakeup = self._wakeup = controller.next_wakeup()
        if wakeup is not None and (self._armed is None or wakeup < self._armed):
            self._armed = wakeup
            self._alarm.set()
        if self._idle is not None and controller.idle and not inbox:
            self._idle.set()
        return bool(inbox)

    def _record(self, now: float, event: Event, actions: list[Action]) -> None:
        try:
            if self._recorder is not None:
                self._recorder(now, event, actions)
        except Exception:
            _log.exception("the recorder failed and is not called any more")
            self._recorder = None

    def _take_out(
        self, request_id: int, reason: RejectReason | None, now: float, settlements: list[Settlement]
    ) -> None:
        settlement = self._leave(request_id, reason, now)
        if settlement is not None:
            settlements.append(settlement)

    def _watch(self) -> None:
        while not self._stopped:
            wakeup = self._armed = self._wakeup
            rung = self._alarm.wait(None if wakeup is None else wakeup - self._clock())
            if self._stopped:
                return
            if not rung and self._wakeup is not None and self._wakeup <= self._clock():
                # Waits for the engine, unlike others: the next alarm time is known only when the tick has been handled.
                settlements: list[Settlement] = []
                with self._busy:
                    self._inbox.append(Tick())
                    self._turn(settlements)
                for settle in settlements:
                    settle()
            self._run()
