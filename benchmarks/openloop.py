"""What the load benchmarks share: an open loop of clients, memory over time, a neighbour that takes a part of a core.

Rules, and why they hold:

* Open loop: requests come when they are due, whatever the service does, and deadlines and response times count from the
  scheduled arrival. So a stall of the senders, or of the interpreter that they share with the service, shows as misses
  and does not hide.
* The senders are threads in the service's process, as the handlers of a web service are: what submitting costs is the
  service's cost, and it competes with serving for the interpreter.
* A sender that has fallen behind by more than `MOST_LAG_S` drops the request, as a listener whose backlog is full
  refuses the connection: it counts as missed and is told apart as *unsent*. Queueing it here would measure the sender.
* What is noted of a request goes into arrays that were made, and touched, before the first is sent; nothing that grows
  with the requests is kept besides, so that memory that grows is the service's.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import attrs
import numpy as np
from load_models import Inputs

from sponge.errors import DeadlineExceeded, QueueFull
from sponge.workload import poisson

MOST_LAG_S = 0.02
LEAD_S = 0.1
"""From the making of a loop to its time zero [s]."""
PENDING, MET, LATE, DEADLINE, QUEUE_FULL, FAILED, CANCELLED, UNSENT, UNREAD = range(9)
"""What came of a request: still open; answered in time, or late; turned away (`DeadlineExceeded`, `QueueFull`); ended
by an error of the model; cancelled; never sent; sent by a client that does not look at what comes."""

Submit = Callable[[Inputs, float], "Future[Any] | None"]
"""Hands in a request with its deadline [s on the monotonic clock]; None if its client does not look at what comes."""
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@attrs.frozen(kw_only=True)
class Schedule:
    """When requests are due to be sent, and answered [s from time zero]; arrays of shape ``(n_requests,)``."""

    arrives_s: FloatArray
    deadline_s: FloatArray

    @classmethod
    def of(cls, phases: Sequence[tuple[float, float]], budget_s: float, seed: int) -> Schedule:
        """Poisson arrivals at a rate [1/s] for a time [s], phase after phase; budgets uniform, mean ± half."""
        arrivals, budgets = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
        start_s = 0.0
        parts = []
        for rate_rps, length_s in phases:
            parts.append(start_s + poisson(rate_rps, length_s, arrivals))
            start_s += length_s
        arrives_s = np.concatenate(parts)
        return cls(
            arrives_s=arrives_s,
            deadline_s=arrives_s + budget_s * budgets.uniform(0.5, 1.5, len(arrives_s)),
        )


@attrs.frozen(kw_only=True)
class Sent:
    """What came of a schedule; arrays of shape ``(n_requests,)``, instants in [s from time zero], ``nan`` for never."""

    schedule: Schedule
    submitted_s: FloatArray
    """When the client called."""
    returned_s: FloatArray
    """When that call came back."""
    told_s: FloatArray
    """When the outcome was there."""
    fate: np.ndarray[Any, np.dtype[np.uint8]]
    times_told: np.ndarray[Any, np.dtype[np.uint8]]
    """How often the client was told."""

    def count(self, fate: int) -> int:
        """Requests that ended so."""
        return int(np.count_nonzero(self.fate == fate))

    @property
    def met(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which were answered in time, from the scheduled arrival."""
        return np.asarray(self.fate == MET)

    @property
    def response_s(self) -> FloatArray:
        """From the scheduled arrival to the answer [s]; ``nan`` where there was none."""
        answered = (self.fate == MET) | (self.fate == LATE)
        return np.where(answered, self.told_s - self.schedule.arrives_s, np.nan)


class OpenLoop:
    """Sends a schedule and notes what comes of it.

    Parameters
    ----------
    schedule
        At least one request.
    inputs
        Taken in turn; or a function of the request's number.
    submit
        Hands in one request.
    senders
        Threads that send, each its share of the requests.
    """

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Inputs] | Callable[[int], Inputs],
        submit: Submit,
        *,
        senders: int = 2,
    ) -> None:
        self._schedule = schedule
        self._inputs = inputs if callable(inputs) else lambda k: inputs[k % len(inputs)]
        self._submit = submit
        n = len(schedule.arrives_s)
        self._submitted, self._returned, self._told = (array("d", [np.nan]) * n for _ in range(3))
        self._fate, self._times_told = bytearray([PENDING]) * n, bytearray(n)
        self._arrives = array("d", schedule.arrives_s.tobytes())
        self._deadlines = array("d", schedule.deadline_s.tobytes())
        gc.collect()
        self.zero = time.monotonic() + LEAD_S
        """Time zero on the monotonic clock."""
        self._senders = [
            threading.Thread(target=self._send, args=(first, senders), name=f"sender-{first}", daemon=True)
            for first in range(senders)
        ]
        for sender in self._senders:
            sender.start()

    def wait(self, patience_s: float) -> Sent:
        """Wait until all have been sent, and for the last outcomes, at most so long after the last deadline [s]."""
        for sender in self._senders:
            sender.join()
        last = self.zero + max(self._deadlines) + patience_s
        while time.monotonic() < last and self._fate.count(PENDING):
            time.sleep(0.01)
        return self.so_far()

    @property
    def sending(self) -> bool:
        """Whether requests are still to be sent."""
        return any(sender.is_alive() for sender in self._senders)

    def so_far(self) -> Sent:
        """What has come of it up to now."""
        return Sent(
            schedule=self._schedule,
            submitted_s=np.array(self._submitted),
            returned_s=np.array(self._returned),
            told_s=np.array(self._told),
            fate=np.frombuffer(bytes(self._fate), np.uint8),
            times_told=np.frombuffer(bytes(self._times_told), np.uint8),
        )

    def _send(self, first: int, step: int) -> None:
        zero, clock, submit = self.zero, time.monotonic, self._submit
        for k in range(first, len(self._arrives), step):
            due = zero + self._arrives[k]
            now = clock()
            if now < due:
                time.sleep(due - now)
                now = clock()
            elif now > due + MOST_LAG_S:
                self._fate[k] = UNSENT
                continue
            future = submit(self._inputs(k), zero + self._deadlines[k])
            self._submitted[k] = now - zero
            self._returned[k] = clock() - zero
            if future is None:
                self._fate[k] = UNREAD
            else:
                future.add_done_callback(partial(self._note, k))

    def _note(self, k: int, future: Future[Any]) -> None:
        now = self._told[k] = time.monotonic() - self.zero
        self._times_told[k] += 1
        if future.cancelled():
            self._fate[k] = CANCELLED
            return
        error = future.exception()
        if error is None:
            self._fate[k] = MET if now <= self._deadlines[k] else LATE
        else:
            self._fate[k] = _FATES.get(type(error), FAILED)


_FATES: dict[type[BaseException], int] = {
    DeadlineExceeded: DEADLINE,
    QueueFull: QUEUE_FULL,
    CancelledError: CANCELLED,
}


class Memory:
    """Resident memory of this process over time, from a thread of its own; a context manager."""

    def __init__(self, every_s: float = 0.25) -> None:
        self._every_s = every_s
        self._end = threading.Event()
        self._samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def samples(self, zero: float) -> list[tuple[float, float]]:
        """Instants from *zero* on [s], and megabytes."""
        return [(at - zero, megabytes) for at, megabytes in self._samples]

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self._samples.append((time.monotonic(), resident_mb()))


def resident_mb() -> float:
    """Resident memory of this process [MB]."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


_SPIN = """
import sys, time
busy_s, start, end = float(sys.argv[1]) * 0.01, float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start - time.monotonic()))
while (now := time.monotonic()) < end:
    while time.monotonic() < now + busy_s:
        pass
    time.sleep(max(0.0, now + 0.01 - time.monotonic()))
"""


class Neighbour:
    """Another process that computes for a share of each 10 ms, between two instants or until it is ended.

    Parameters
    ----------
    cores
        Share of one core that it takes if it gets it, in (0, 1].
    first, last
        From when, and until when [s on the monotonic clock, which all processes of a machine share].
    """

    def __init__(self, cores: float, first: float, last: float) -> None:
        self._process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN, str(cores), str(first), str(last)])

    @property
    def ended(self) -> bool:
        """Whether its time is up."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End it, if it has not ended, and wait for that."""
        self._process.terminate()
        self._process.wait()


def say(text: str) -> None:
    """Tell how far it has come, on standard error."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
