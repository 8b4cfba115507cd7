"""The front door of the core: events in, actions out.

Rules, and why they hold:

* `Controller.handle` is the only method that changes state, and it returns at once. Whatever takes time is an action
  that the shell answers later with an event. So the object that is simulated is the object that serves, and a
  recorded run replays to the same actions.
* Time is an argument. `Controller.next_wakeup` says when a `Tick` is due if nothing happens before.
* A request leaves exactly once: in a `StartBatch`, in a `Reject`, or by its own `Cancelled`.
* The cores of all running lanes together never exceed the solver's ``max_cores``.
"""

from __future__ import annotations

from sponge.core.actions import Action, Reject, SetCpu, StartBatch
from sponge.core.arrivals import ArrivalRate
from sponge.core.drift import DriftScale
from sponge.core.edf import EdfQueue, PlannedQueue
from sponge.core.events import Abort, Arrived, BatchFinished, Cancelled, CpuApplied, Drain, Event, Tick
from sponge.core.lanes import Lanes, Running
from sponge.core.policy import Dispatch, Policy, State, Wait, typical
from sponge.core.reserve import Reserve
from sponge.core.settings import Late, Settings
from sponge.core.solver import Solver
from sponge.core.values import Batch, RejectReason, Request, intra_op_threads

_TOLERANCE_CORES = 1e-9
_CEILING_MEMORY_S = 1.0
"""How long an allocation that fell short is taken for all there is [s]."""
_OVERLOAD = 0.9
"""Share of the cheapest capacity from which requests are given up rather than saved on wider lanes."""
_SOONER = 0.75
"""Share of the predicted time after which running batches may be over, if all goes well for those who wait for it."""
_TYPICAL_WINDOW = 16
"""Batches over which the median is followed: it needs fewer than a tail to be known."""
_MAX_GROUPS_FOLLOWED = 64
"""Groups (input shapes) whose drift is followed separately; beyond that the oldest is forgotten."""


class Controller:
    """Decides which requests run when, in what batches, on how many cores.

    Parameters
    ----------
    solver
        Holds the latency model, the core range, the largest batch and the number of lanes.
    settings
        See `Settings`.
    """

    def __init__(self, solver: Solver, settings: Settings | None = None) -> None:
        self.solver = solver
        self.settings = settings or Settings()
        self._policy = Policy(solver, guard_s=self.settings.guard_s, hold=self.settings.hold)
        self._queue = PlannedQueue()
        self._late = PlannedQueue()
        self._lanes = Lanes(solver.max_lanes)
        self._rate = ArrivalRate(self.settings.rate_time_constant_s)
        self._typical = typical(solver.latency)
        self._drift: dict[int, tuple[DriftScale, DriftScale]] = {}
        self._cores_asked = -1.0
        self._shrink_at: float | None = None
        delay_s = self.settings.resize_delay_s
        self._reserve = Reserve(solver, delay_s, self.settings.guard_s) if delay_s > 0 else None
        self._in_force = float("inf") if self._reserve is None else 0.0
        self._ceiling_cores = float("inf")
        self._ceiling_until = float("-inf")
        self._hold_until: float | None = None
        self._more = False
        self._hold_ends = float("inf")
        self._draining = False
        self._aborted = False
        self._batches = 0
        self._predictions: dict[tuple[int, float, int], tuple[float, float]] = {}
        self._now = float("-inf")

    # -- the door ------------------------------------------------------------------------------------------------

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Take in what happened and return what to do, in order.

        Parameters
        ----------
        event
            One of `sponge.core.events`.
        now
            The instant at which it is handled [s on the shell's clock]; an earlier instant than the last one counts
            as the last one.

        Raises
        ------
        ValueError
            If a lane finishes that was not running, or a request has more rows than fit in a batch.
        """
        now = self._now = max(now, self._now)
        actions: list[Action] = []
        if isinstance(event, Arrived):
            if self._more and self.queue_length >= self.settings.max_queue:
                self._dispatch(now, actions)  # whoever of the burst can start now makes room
            self._arrive(event.request, now, actions)
            self._more = event.more
            if event.more:
                return actions
        elif isinstance(event, BatchFinished):
            self._finish(event, now)
        elif isinstance(event, CpuApplied):
            if not self._apply(event):
                return actions
        elif isinstance(event, Cancelled):
            if self._queue.remove(event.request_id) is None:
                self._late.remove(event.request_id)
        elif isinstance(event, Drain):
            self._draining = True
        elif isinstance(event, Abort):
            self._aborted = True
            waiting = (*self._queue.take_all(), *self._late.take_all())
            actions.extend(Reject(request.request_id, RejectReason.CLOSED) for request in waiting)
        elif not isinstance(event, Tick):
            raise TypeError(f"event must be one of sponge.core.events, got {event!r}")
        self._dispatch(now, actions)
        return actions

    def next_wakeup(self) -> float | None:
        """Return when a `Tick` is due if nothing happens before [s], or None."""
        wakeup = float("inf") if self._shrink_at is None else self._shrink_at
        if self._reserve is not None:
            wakeup = min(wakeup, self._reserve.wakeup(self._now, idle=self.idle))
        if self._queue:
            wakeup = min(wakeup, self._given_up_at(self._queue.head()))
            if self._hold_until is not None:
                wakeup = min(wakeup, self._hold_until)
        return None if wakeup == float("inf") else wakeup

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing runs."""
        return not self._queue and not self._late and not self._lanes.busy

    @property
    def max_lanes(self) -> int:
        """Batches that may run side by side."""
        return self.solver.max_lanes

    @property
    def max_batch_size(self) -> int:
        """Rows of a batch at most."""
        return self.solver.max_batch_size

    @property
    def max_queue(self) -> int:
        """Requests that may wait."""
        return self.settings.max_queue

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._queue) + len(self._late)

    def arrival_rate_rps(self, now: float | None = None) -> float:
        """Return the estimated arrival rate at *now*, by default the instant of the last event [1/s]."""
        return self._rate.rate_rps(self._now if now is None else max(now, self._now))

    def drift_scale(self, group: int = 0) -> float:
        """Return the factor by which recent batches of *group* took longer than the model says."""
        return self._scales(group)[0]

    # -- events --------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request, now: float, actions: list[Action]) -> None:
        if request.rows > self.solver.max_batch_size:
            raise ValueError(f"rows must be at most max_batch_size={self.solver.max_batch_size}, got {request.rows}")
        self._rate.observe(now, request.rows)
        if self._aborted:
            actions.append(Reject(request.request_id, RejectReason.CLOSED))
        elif self.queue_length >= self.settings.max_queue:
            actions.append(Reject(request.request_id, RejectReason.QUEUE_FULL))
        else:
            self._queue.push(request)

    def _finish(self, event: BatchFinished, now: float) -> None:
        running = self._lanes.finish(event.lane)
        if not (event.ok and self.settings.follow_drift):
            return
        service_s = now - running.started_at if event.service_s is None else event.service_s
        if service_s > 0:
            group = running.batch.group
            if group not in self._drift:
                if len(self._drift) >= _MAX_GROUPS_FOLLOWED:
                    del self._drift[next(iter(self._drift))]
                self._drift[group] = DriftScale(), DriftScale(window=_TYPICAL_WINDOW, quantile=0.5)
            tail, median = self._drift[group]
            tail.observe(service_s, running.tail_s)
            median.observe(service_s, running.typical_s)

    def _apply(self, event: CpuApplied) -> bool:
        """Note what is in force; return whether there is anything to decide: it has changed, or something is due."""
        if self._reserve is not None:
            self._in_force = event.cores
            return True
        ceiling_cores = self._ceiling_cores
        if event.cores < self._cores_asked - _TOLERANCE_CORES:
            self._ceiling_cores = event.cores
            self._ceiling_until = self._now + _CEILING_MEMORY_S
        else:
            self._ceiling_cores = float("inf")
        wakeup = self.next_wakeup()
        return self._ceiling_cores != ceiling_cores or (wakeup is not None and wakeup <= self._now)

    # -- decisions -----------------------------------------------------------------------------------------------

    def _dispatch(self, now: float, actions: list[Action]) -> None:
        self._hold_until = None
        if self._reserve is not None and self._reserve.is_due(now):
            scale = self.drift_scale(self._queue.head().group) if self._queue else 1.0
            self._reserve.look(now, self._queue.deadlines(), scale, self._rate.rate_rps(now))
        started: list[StartBatch] = []
        while self._queue:
            self._shed(now, actions)
            if not self._queue:
                break
            state = self._state(now, self._queue)
            if state is None:
                break
            decision = self._policy.decide(state, self._queue.deadlines())
            if isinstance(decision, Wait):
                if decision.until is None and not self._may_still_fit(state):
                    # It would only hold back those behind it until its deadline is past.
                    self._give_up(self._queue.head(), actions)
                    continue
                self._hold_until = decision.until
                if decision.for_company and decision.until is not None:
                    # Who waits for company waits once: what arrives in between does not prolong it.
                    self._hold_ends = self._hold_until = min(decision.until, self._hold_ends)
                break
            started.append(self._start(self._queue, decision, now))
        while self._late and not self._queue:
            state = self._state(now, self._late)
            if state is None:
                break
            started.append(self._start(self._late, self._policy.cheapest(state), now))
        if not self._queue:
            self._hold_ends = float("inf")
        # A lane takes longer to wake up than a quota to be written, so it is woken first.
        actions.extend(started)
        self._set_cores(now, actions)

    def _shed(self, now: float, actions: list[Action]) -> None:
        """Take out the requests that no allocation could save any more."""
        while self._queue:
            head = self._queue.head()
            if now < self._given_up_at(head):
                return
            if head.group in self._drift and now < self._lost_at(head, drift=False):
                # Lost only because the model is believed to be slow. Were it never run again, nothing could show
                # otherwise: each such request counts as evidence for the profile.
                for drift in self._drift[head.group]:
                    drift.observe(1.0, 1.0)
            self._give_up(head, actions)

    def _give_up(self, request: Request, actions: list[Action]) -> None:
        self._queue.remove(request.request_id)
        if self.settings.late is Late.SERVE:
            self._late.push(request)
        else:
            actions.append(Reject(request.request_id, RejectReason.DEADLINE))

    def _may_still_fit(self, state: State) -> bool:
        """Tell whether the head could be in time on cores that running batches give back, if all goes well."""
        if self._reserve is not None:
            return True  # other cores may come
        head = self._queue.head()
        free_cores = state.free_cores
        for cores, ends_at in ((0.0, state.now), *self._lanes.freed()):
            free_cores += cores
            free_at = state.now + max(0.0, _SOONER * (ends_at - state.now))
            typical_s = self._policy.typical_within_s(head.rows, free_cores) * state.typical_scale
            if free_at + typical_s <= head.deadline - self.settings.guard_s:
                return True
        return False

    def _given_up_at(self, request: Request) -> float:
        """Instant from which the request is not served any more."""
        lost_at = self._lost_at(request)
        if self._lanes.busy:
            return lost_at
        # Nothing runs: who is in time by the typical latency is served, whatever the tail says. Lanes that stand idle
        # save nobody, and where the tail is longer than every budget, nothing would ever show that it has shrunk.
        typical_s = self._policy.fastest_typical_s(request.rows) * self._scales(request.group)[1]
        return max(lost_at, request.deadline - typical_s - self.settings.guard_s)

    def _lost_at(self, request: Request, *, drift: bool = True) -> float:
        """Instant from which the request cannot be served in time, even alone on all cores at once."""
        fastest_s = self._policy.fastest_s(request.rows)
        scale = self.drift_scale(request.group) if drift else 1.0
        if self._rate.rate_rps(self._now) * self._policy.cheapest_core_s * scale > _OVERLOAD * self.solver.max_cores:
            # Widening a lane to save one costs the deadlines of several: only who fits the cheapest width is kept.
            fastest_s = max(fastest_s, self._policy.cheapest_tail_s(request.rows))
        fastest_s *= scale
        return request.deadline - fastest_s - self.settings.guard_s

    def _state(self, now: float, queue: PlannedQueue) -> State | None:
        """Return what the policy may use for the head of a queue; None if no lane or too few cores are free."""
        lanes = self._lanes
        if lanes.free is None:
            return None
        ceiling = self._ceiling_cores if now < self._ceiling_until else float("inf")
        free_cores = min(self.solver.max_cores, ceiling)
        if self._reserve is not None:
            # No more than what was needed lately, or whatever is allocated would be used, and so be needed for ever.
            free_cores = min(free_cores, self._in_force, self._reserve.cores(now))
        free_cores = max(free_cores, self._policy.smallest_cores) - lanes.cores
        if free_cores < self._policy.smallest_cores - _TOLERANCE_CORES:
            return None
        head = queue.head()
        scale, typical_scale = self._scales(head.group)
        return State(
            now,
            free_cores + _TOLERANCE_CORES,
            lanes.busy,
            lanes.backlog_core_s(now),
            self._rate.rate_rps(now),
            scale,
            typical_scale,
            not self._draining and now < self._hold_ends,
            head.rows,
            queue.head_group_rows,
            lanes.free_at,
        )

    def _start(self, queue: EdfQueue, decision: Dispatch, now: float) -> StartBatch:
        self._hold_ends = float("inf")
        lane = self._lanes.free
        assert lane is not None  # there was one when it was decided
        requests = queue.take(decision.batch_size)
        rows = sum([request.rows for request in requests])
        group = requests[0].group
        tail_s, typical_s = self._predicted_s(rows, decision.cores, self._lanes.busy + 1)
        batch = Batch(
            batch_id=self._batches,
            request_ids=tuple([request.request_id for request in requests]),
            rows=rows,
            group=group,
            lane=lane,
            cores=decision.cores,
            threads=intra_op_threads(decision.cores),
            expected_s=typical_s * self._scales(group)[1],
        )
        self._batches += 1
        self._lanes.start(Running(batch, now, tail_s, typical_s))
        return StartBatch(batch)

    def _predicted_s(self, rows: int, cores: float, lanes: int) -> tuple[float, float]:
        """Tail and typical latency by the models [s]."""
        key = (rows, cores, lanes)
        if key not in self._predictions:
            tail_s = self.solver.latency.latency_s(rows, cores, lanes)
            self._predictions[key] = tail_s, min(self._typical.latency_s(rows, cores, lanes), tail_s)
        return self._predictions[key]

    def _scales(self, group: int) -> tuple[float, float]:
        """Drift of the tail and of the typical latency."""
        drift = self._drift.get(group)
        return (1.0, 1.0) if drift is None else (drift[0].scale, drift[1].scale)

    def _set_cores(self, now: float, actions: list[Action]) -> None:
        """Ask for what the running lanes need together: more at once, less when it has not been needed for a while."""
        cores = self._lanes.cores or self.settings.idle_cores
        if self._reserve is not None:
            cores = max(cores, self._reserve.cores(now))
        if cores < self._cores_asked - _TOLERANCE_CORES:
            if self._shrink_at is None:
                self._shrink_at = now + self.settings.linger_s
            if now < self._shrink_at:
                return
        elif cores <= self._cores_asked + _TOLERANCE_CORES:
            self._shrink_at = None
            return
        self._shrink_at = None
        self._cores_asked = cores
        actions.append(SetCpu(cores))

    # -- for tests -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants."""
        self._queue.check()
        self._late.check()
        self._lanes.check()
        running = [entry.batch for entry in self._lanes]
        cores = sum(batch.cores for batch in running)
        assert cores <= self.solver.max_cores + _TOLERANCE_CORES
        needed = cores or self.settings.idle_cores
        if self._reserve is not None:
            needed = max(needed, self._reserve.cores(self._now))
        assert self._cores_asked >= needed - _TOLERANCE_CORES or self._cores_asked == -1.0
        assert (self._shrink_at is not None) == (self._cores_asked > needed + _TOLERANCE_CORES)
        assert self.queue_length <= self.settings.max_queue
        ids = [i for batch in running for i in batch.request_ids]
        assert len(ids) == len(set(ids))
        assert not any(i in self._queue or i in self._late for i in ids)
        assert all(batch.rows <= self.solver.max_batch_size for batch in running)
        assert not self._late or self.settings.late is Late.SERVE
        if self._aborted:
            assert not self.queue_length
        if self._queue and not running and not self._more:
            assert self._hold_until is not None, "waiting requests, free lanes, and no reason to wait"
        wakeup = self.next_wakeup()
        assert self._more or wakeup is None or wakeup > self._now, "a tick that would change nothing"
