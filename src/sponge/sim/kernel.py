"""The simulator: drives a controller in virtual time, exactly as the live shell drives it in real time.

Rules, and why they hold:

* The controller is the one that serves; it cannot tell which of the two shells calls it. Its actions are answered by
  the events that the live shell would send.
* What happens at the same instant is handled in a fixed order: the end of batches (lowest lane first), a change of the
  allocation, arrivals in their order, and a `Tick` only if nothing else happened.
* There is no heap of events. Of the arrivals (`sponge.sim.source`) and of each lane only the next matters, and the rest
  is one number each; so the next event is the least of a handful of numbers.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.events import Abort, BatchFinished, CpuApplied, Drain, Event, Tick
from sponge.core.latency import Latency
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Batch, RejectReason
from sponge.profile import Profile
from sponge.sim.lanes import Lanes
from sponge.sim.run import Batches, CoresOverTime, Outcome, Run
from sponge.sim.service import Resizer, Service, Times
from sponge.sim.source import ClosedSource, OpenSource, Source
from sponge.workload import ClosedLoop, Workload

PATIENCE_S = 600.0
"""How long the controller may keep requests waiting while nothing runs and nobody arrives, before it is drained [s]."""
_MAX_TICKS_AT_ONCE = 1000
_TICK = Tick()
_BATCH_FIELDS = 5
"""Rows, lane, cores, start and end of a batch, kept as numbers so that a million batches are not as many objects."""
_STARTED, _WAITING = 254, 255
"""Fates of requests that have not ended; the others are of `Outcome`."""
_FATE = {
    RejectReason.DEADLINE: int(Outcome.REJECTED),
    RejectReason.QUEUE_FULL: int(Outcome.QUEUE_FULL),
    RejectReason.CLOSED: int(Outcome.CLOSED),
}

_Changes: TypeAlias = "tuple[array[float], array[float]]"
"""Instants, and the cores from each on."""


def simulate(
    workload: Workload | ClosedLoop,
    controller: ControllerProtocol,
    service: Service | Latency | Profile,
    *,
    seed: int = 0,
    initial_cores: float | None = None,
    horizon_s: float | None = None,
    record: bool = False,
) -> Run:
    """Run a workload through a controller in virtual time.

    Parameters
    ----------
    workload
        Who arrives when, and by when the answer is due; or clients that wait for their answers, whose requests are
        then found in `Run.workload`.
    controller
        Any controller, fresh: `sponge.Controller`, or one of `sponge.sim.baselines`.
    service
        How long things take; a latency model or a profile alone stands for a `Service` without delays.
    seed
        Of everything random. The same seed gives the same run.
    initial_cores
        In force at the start, ≥ 0. None: what the controller asks for first, at once and counted from time 0, for a
        service that is up when the workload begins.
    horizon_s
        The allocation counts from 0 to here [s, > 0], and the controller is kept running until then even without
        requests. None: to the last answer or the last arrival, whichever is later. Requests are always followed to
        their end.
    record
        Keep every event with its instant and the actions that followed, as `Run.log`.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If an argument is out of range, or a request arrives before time 0.
    RuntimeError
        If the controller breaks the rules: starts a batch on a busy lane or with requests that are not waiting, or
        asks to be woken without end.

    Notes
    -----
    Memory does not grow but for the result: 18 bytes for each request beside the workload's own 24, 48 for each batch
    and 32 for each change of the allocation, and as much again while the result is put together. *record* keeps
    objects, several hundred bytes for each event.
    """
    if isinstance(workload, Workload) and len(workload) and workload.arrived_at_s[0] < 0:
        raise ValueError(f"workload must not begin before 0, got {float(workload.arrived_at_s[0])!r}")
    if initial_cores is not None and not 0 <= initial_cores < math.inf:
        raise ValueError(f"initial_cores must be finite and not negative, got {initial_cores!r}")
    if horizon_s is not None and not 0 < horizon_s < math.inf:
        raise ValueError(f"horizon_s must be positive and finite, got {horizon_s!r}")
    if not isinstance(service, Service):
        service = Service(service)
    kernel = _Kernel(workload, controller, service, seed, initial_cores, record)
    kernel.run(horizon_s)
    return kernel.result(horizon_s)


class _Kernel:
    """One run."""

    def __init__(
        self,
        workload: Workload | ClosedLoop,
        controller: ControllerProtocol,
        service: Service,
        seed: int,
        initial_cores: float | None,
        record: bool,
    ) -> None:
        self._source: Source
        self._clients: ClosedSource | None = None
        if isinstance(workload, ClosedLoop):
            self._source = self._clients = ClosedSource(workload)
        else:
            self._source = OpenSource(workload)
        self._controller = controller
        self._seed = seed
        self._times = Times(service, seed)
        self._lanes = Lanes(controller.max_lanes, self._times)
        self._resizer = Resizer(service, initial_cores)
        self._inbox: deque[Event] = deque()
        self._log: list[tuple[float, Event, list[Action]]] | None = [] if record else None
        self._fate = bytearray()
        self._batch_of = array("q")
        self._outstanding = 0
        self._batches = array("d")  # of each batch _BATCH_FIELDS numbers
        self._asked: _Changes = (array("d"), array("d"))
        self._in_force: _Changes = (array("d"), array("d"))
        if initial_cores is not None:
            _step(self._asked, initial_cores, 0.0)
            _step(self._in_force, initial_cores, 0.0)
        self._ticks_at_once = 0
        self._progress_at = 0.0
        self._closing: deque[Event] = deque((Drain(), Abort()))
        self._decisions_take_time = service.decision_s > 0
        self._deciding: list[Action] | None = None
        self._effect_at = math.inf
        self._resizes = 0
        self._decisions = 0
        self._decision_s = 0.0

    def run(self, horizon_s: float | None) -> None:
        handle, next_wakeup = self._controller.handle, self._controller.next_wakeup
        inbox, lanes, resizer, log = self._inbox, self._lanes, self._resizer, self._log
        source, note_fate, note_batch = self._source, self._fate.append, self._batch_of.append
        now = 0.0
        wakeup = next_wakeup()
        event: Event | None = None
        while True:
            if event is None and inbox and self._deciding is None:
                event = inbox.popleft()
            if event is not None:
                actions = handle(event, now=now)
                wakeup = next_wakeup()
                self._decisions += 1
                if log is not None:
                    log.append((now, event, list(actions)))
                event = None
                if self._decisions_take_time:
                    self._take_time(actions, now)
                elif actions:
                    self._carry_out(actions, now)
                continue
            arrives_at = source.next_at
            happens_at = lanes.next_at if lanes.next_at <= arrives_at else arrives_at
            if resizer.next_at < happens_at or self._effect_at < happens_at:
                happens_at = min(resizer.next_at, self._effect_at)
            # A tick is due only when nothing else happens before, nor at that instant.
            due_at = math.inf if wakeup is None or self._deciding is not None else max(wakeup, now)
            nobody_comes = arrives_at == math.inf and self._deciding is None
            if nobody_comes and self._is_closing(min(happens_at, due_at), now, horizon_s):
                if not inbox:
                    return
            elif due_at < happens_at:
                self._tick(due_at, now)
                now = due_at
            else:
                now = happens_at
                if now == self._effect_at:
                    self._take_effect(now)
                elif now == lanes.next_at:
                    finished = self._finish(now)
                    if self._deciding is None:
                        event = finished
                    else:
                        inbox.append(finished)
                elif now == resizer.next_at:
                    self._resize(now)
                else:
                    self._progress_at = now
                    self._outstanding += 1
                    note_fate(_WAITING)
                    note_batch(-1)
                    arrival = source.take()
                    if self._deciding is None:
                        event = arrival  # the inbox is empty
                    else:
                        inbox.append(arrival)

    def _is_closing(self, next_at: float, now: float, horizon_s: float | None) -> bool:
        """When nobody is on the way: see whether the run is over, or the controller must be told (as by the inbox)."""
        if not self._outstanding:
            return horizon_s is None or next_at > horizon_s
        if self._lanes.next_at < math.inf or next_at <= self._progress_at + PATIENCE_S:
            return False
        self._progress_at = now
        if self._closing:
            self._inbox.append(self._closing.popleft())
        return True

    def _tick(self, due_at: float, now: float) -> None:
        self._ticks_at_once = 0 if due_at > now else self._ticks_at_once + 1
        if self._ticks_at_once > _MAX_TICKS_AT_ONCE:
            raise RuntimeError(f"the controller asks to be woken at {now!r} or before, again and again")
        self._inbox.append(_TICK)

    def _take_time(self, actions: list[Action], now: float) -> None:
        decision_s = self._times.decision_s()
        self._decision_s += decision_s
        self._effect_at = now + decision_s
        self._deciding = actions

    def _take_effect(self, now: float) -> None:
        actions, self._deciding, self._effect_at = self._deciding, None, math.inf
        if actions:
            self._carry_out(actions, now)

    def _carry_out(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, StartBatch):
                self._start(action.batch, now)
            elif isinstance(action, SetCpu):
                self._ask(action.cores, now)
            else:
                self._reject(action, now)
        self._lanes.share_cores(self._resizer.cores, now)

    def _start(self, batch: Batch, now: float) -> None:
        index = len(self._batches) // _BATCH_FIELDS
        self._lanes.start(batch, index, now)
        fate, batch_of = self._fate, self._batch_of
        for request_id in batch.request_ids:
            if not 0 <= request_id < len(fate) or fate[request_id] != _WAITING:
                raise RuntimeError(f"the controller started request {request_id}, which is not waiting")
            fate[request_id] = _STARTED
            batch_of[request_id] = index
        self._batches.extend((batch.rows, batch.lane, batch.cores, now, math.nan))

    def _finish(self, now: float) -> BatchFinished:
        self._progress_at = now
        batch, index, started_at, _, _, _, _, _ = self._lanes.finish(self._resizer.cores, now)
        self._batches[index * _BATCH_FIELDS + _BATCH_FIELDS - 1] = now
        self._outstanding -= len(batch.request_ids)
        if self._clients is not None:
            for request_id in batch.request_ids:
                self._clients.answered(request_id, now)
        return BatchFinished(batch.lane, True, now - started_at)

    def _reject(self, action: Reject, now: float) -> None:
        request_id, fate = action.request_id, self._fate
        if not 0 <= request_id < len(fate) or fate[request_id] != _WAITING:
            raise RuntimeError(f"the controller turned away request {request_id}, which is not waiting")
        fate[request_id] = _FATE[action.reason]
        self._outstanding -= 1
        if self._clients is not None:
            self._clients.answered(request_id, now)

    def _ask(self, cores: float, now: float) -> None:
        _, values = self._asked
        if not values or cores != values[-1]:
            self._resizes += 1
            _step(self._asked, cores, now)
        before = self._resizer.cores
        settled = self._resizer.ask(cores, now)
        if self._resizer.cores != before:
            self._in_force_changed(now)
            settled = True
        if settled:
            # As in the live shell, the answer to a change that takes no time comes before anything else.
            self._inbox.appendleft(CpuApplied(self._resizer.cores))

    def _resize(self, now: float) -> None:
        if self._resizer.advance(now):
            self._in_force_changed(now)
            self._inbox.append(CpuApplied(self._resizer.cores))

    def _in_force_changed(self, now: float) -> None:
        _step(self._in_force, self._resizer.cores, now)
        self._lanes.share_cores(self._resizer.cores, now)

    def result(self, horizon_s: float | None) -> Run:
        workload = self._source.workload()
        rows, lane, cores, started_at_s, batch_finished_at_s = np.array(self._batches).reshape(-1, _BATCH_FIELDS).T
        batches = Batches(
            rows=_frozen(rows, np.int64),
            cores=_frozen(cores, np.float64),
            lane=_frozen(lane, np.int64),
            started_at_s=_frozen(started_at_s, np.float64),
            finished_at_s=_frozen(batch_finished_at_s, np.float64),
        )
        batch = _frozen(self._batch_of, np.int64)
        finished_at_s = np.append(batches.finished_at_s, math.nan)[batch]  # -1 reads the nan
        fate = np.frombuffer(self._fate, np.uint8)
        served = np.where(finished_at_s <= workload.deadline_s, Outcome.MET, Outcome.LATE)
        turned_away = np.where(fate < _STARTED, fate, Outcome.UNSERVED)
        outcome = np.where(np.isfinite(finished_at_s), served, turned_away).astype(np.int8)
        if horizon_s is None:
            last_arrival_s = workload.arrived_at_s[-1] if len(workload) else 0.0
            horizon_s = float(np.nanmax(np.append(batches.finished_at_s, last_arrival_s)))
        return Run(
            sent_at_s=workload.sent_at_s,
            arrived_at_s=workload.arrived_at_s,
            deadline_s=workload.deadline_s,
            finished_at_s=finished_at_s,
            outcome=outcome,
            batch=batch,
            batches=batches,
            asked=_steps(self._asked, horizon_s),
            in_force=_steps(self._in_force, horizon_s),
            resizes=self._resizes,
            decisions=self._decisions,
            decision_s=self._decision_s,
            seed=self._seed,
            log=None if self._log is None else tuple(self._log),
        )


def _step(steps: _Changes, cores: float, now: float) -> None:
    """Note a change; the first counts from time 0, and of several at one instant only the last."""
    times, values = steps
    if times and times[-1] == now:
        values[-1] = cores
    else:
        times.append(now if times else 0.0)
        values.append(cores)


def _steps(steps: _Changes, end_s: float) -> CoresOverTime:
    times = np.array(steps[0] or [0.0])
    cores = np.array(steps[1] or [0.0])
    kept = times <= end_s
    return CoresOverTime(times_s=times[kept], cores=cores[kept], end_s=end_s)


def _frozen(values: array[Any] | npt.NDArray[Any], dtype: type[Any]) -> npt.NDArray[Any]:
    result = np.array(values, dtype=dtype)
    result.setflags(write=False)
    return result
