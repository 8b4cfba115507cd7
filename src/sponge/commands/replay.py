"""Replay a workload against a scheduler, open loop: requests come when they are due, whatever the service does.

The calling thread sleeps until each scheduled arrival and submits; it never waits for an answer before the last
request is sent. If it falls behind, response times still run from the schedule, and by how much is reported.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import attrs
import numpy as np

from sponge.core.actions import Action
from sponge.core.events import CpuApplied, Event
from sponge.errors import DeadlineExceeded, QueueFull, SchedulerClosed
from sponge.live.scheduler import Scheduler
from sponge.measure import Allocation, Outcome, OutcomeKind
from sponge.workload import Workload

Inputs: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the requests sent and answered so far."""

PROGRESS_GAP_S = 0.02
"""Progress is shown only while the next request is at least this far off: drawing must not delay it."""
PROGRESS_EVERY_S = 0.2
LEAD_S = 0.05
"""From the start of the replay to its time zero, so that the first request is not late [s]."""


class AllocationRecorder:
    """A scheduler's recorder that keeps the allocations in force, as (instant, cores)."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, float]] = []

    def __call__(self, now: float, event: Event, actions: list[Action]) -> None:
        """Note an allocation that has been put in force."""
        if isinstance(event, CpuApplied):
            self.changes.append((now, event.cores))


@attrs.frozen(kw_only=True)
class Replayed:
    """What came of a replay; instants count from its time zero [s]."""

    outcomes: Sequence[Outcome]
    allocation: Allocation
    cpu_seconds_used: float
    """CPU time of the lanes and the sessions' workers."""
    cores_used_by_others: float
    """CPU time that other processes (and other guests of the host) took of this machine, per second [cores]; ``nan``
    where there is no /proc. Well above zero, the run says little."""


def replay(
    workload: Workload,
    scheduler: Scheduler,
    recorder: AllocationRecorder,
    inputs: Sequence[Inputs],
    *,
    progress: Progress | None = None,
) -> Replayed:
    """Submit each request when it is due, with its own deadline, and wait for the last answer.

    Parameters
    ----------
    workload
        At least one request.
    scheduler
        Open, and with *recorder* as its recorder.
    recorder
        Keeps the allocations.
    inputs
        Taken in turn.
    progress
        Called now and then from the calling thread.

    Returns
    -------
    Replayed
        The allocation counts from time zero to the last answer or the last scheduled arrival.

    Raises
    ------
    ValueError
        If there is no request, or no input.
    """
    if not len(workload) or not inputs:
        raise ValueError(f"workload and inputs must not be empty, got {len(workload)} and {len(inputs)}")
    cpu_s_before = scheduler.statistics().cpu_s
    others = OtherProcesses()
    zero = scheduler.now() + LEAD_S
    client = _Client(scheduler, workload, zero, progress)
    client.send(inputs)
    client.wait()
    end_s = max(scheduler.now() - zero, float(workload.arrived_at_s[-1]))
    changes = [(instant - zero, cores) for instant, cores in recorder.changes]
    return Replayed(
        outcomes=client.outcomes(),
        allocation=Allocation.from_changes(changes, start_s=0.0, end_s=end_s),
        cpu_seconds_used=scheduler.statistics().cpu_s - cpu_s_before,
        cores_used_by_others=others.cores(),
    )


class OtherProcesses:
    """How busy the machine is with anything but this process, from its making on."""

    def __init__(self) -> None:
        self._since = self._read()

    def cores(self) -> float:
        """Return what others have used on average [cores]; ``nan`` where there is no /proc."""
        started_at, busy_s, own_s = self._since
        now, busy_now_s, own_now_s = self._read()
        others_s = busy_now_s - busy_s - (own_now_s - own_s)
        # Ticks are coarse: a little less than nothing is nothing. (A nan stays one.)
        return others_s / (now - started_at) if not others_s < 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return the clock, the CPU time of all, and that of this process [s]."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                ticks = [int(field) for field in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return time.monotonic(), math.nan, time.process_time()
        # In order: user, nice, system, idle, iowait, irq, softirq, and steal, which other guests of the host took.
        busy = sum(ticks) - ticks[3] - ticks[4]
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


class _Client:
    """All clients together: sends on schedule, notes when each answer came."""

    def __init__(self, scheduler: Scheduler, workload: Workload, zero: float, progress: Progress | None) -> None:
        self._scheduler = scheduler
        self._workload = workload
        self._zero = zero
        self._progress = progress
        self._progress_due = zero
        self._futures: list[Future[Any]] = []
        self._submitted_at: list[float] = []
        self._finished_at = [0.0] * len(workload)
        self._answered = 0
        self._lock = threading.Lock()
        self._all_answered = threading.Event()

    def send(self, inputs: Sequence[Inputs]) -> None:
        for index, (arrives_s, deadline_s) in enumerate(
            zip(self._workload.arrived_at_s.tolist(), self._workload.deadline_s.tolist(), strict=True)
        ):
            self._sleep_until(self._zero + arrives_s)
            self._submitted_at.append(self._scheduler.now() - self._zero)
            future = self._scheduler.submit(inputs[index % len(inputs)], deadline=self._zero + deadline_s)
            future.add_done_callback(self._note(index))
            self._futures.append(future)

    def wait(self) -> None:
        while not self._all_answered.wait(PROGRESS_EVERY_S):
            self._show()
        self._show()

    def outcomes(self) -> list[Outcome]:
        return [self._outcome(index, future) for index, future in enumerate(self._futures)]

    def _note(self, index: int) -> Callable[[Future[Any]], None]:
        def note(_: Future[Any]) -> None:
            self._finished_at[index] = self._scheduler.now() - self._zero
            with self._lock:  # several lanes answer at the same time
                self._answered += 1
                last = self._answered == len(self._finished_at)
            if last:
                self._all_answered.set()

        return note

    def _outcome(self, index: int, future: Future[Any]) -> Outcome:
        error = future.exception()
        if error is None:
            kind = OutcomeKind.FINISHED
        elif isinstance(error, DeadlineExceeded | QueueFull | SchedulerClosed):
            kind = OutcomeKind.REJECTED
        else:
            kind = OutcomeKind.FAILED
        workload = self._workload
        return Outcome(
            sent_at=float(workload.sent_at_s[index]),
            arrived_at=float(workload.arrived_at_s[index]),
            deadline=float(workload.deadline_s[index]),
            finished_at=self._finished_at[index] if error is None else None,
            kind=kind,
            submitted_at=self._submitted_at[index],
        )

    def _sleep_until(self, instant: float) -> None:
        while True:
            left_s = instant - self._scheduler.now()
            if left_s <= 0:
                return
            if left_s > PROGRESS_GAP_S and self._show():
                continue
            time.sleep(min(left_s, PROGRESS_EVERY_S))

    def _show(self) -> bool:
        now = self._scheduler.now()
        if self._progress is None or now < self._progress_due:
            return False
        self._progress_due = now + PROGRESS_EVERY_S
        self._progress(len(self._futures), self._answered)
        return True
