"""Scheduler: the live shell around a controller, as clients see it.

What runs behind it is a `sponge.live.service.Service`; this is the handle that clients hold, and when nobody holds it
any more, the service ends (`sponge.live.life_cycle`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NoReturn

import attrs
import numpy as np

from sponge.core.controller import Controller
from sponge.core.events import Arrived, Cancelled, Tick
from sponge.core.protocol import ControllerProtocol
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.core.values import Request
from sponge.errors import SchedulerClosed
from sponge.live.deadlines import deadline_of, seconds
from sponge.live.engine import Recorder
from sponge.live.futures import Outputs, RequestFuture
from sponge.live.lane import Entry
from sponge.live.life_cycle import EXIT_TIMEOUT_S, look_after
from sponge.live.observed import Observed
from sponge.live.scalers import CpuScaler, ThreadScaler
from sponge.live.service import Service
from sponge.live.session import ElasticSession, SessionOrModel
from sponge.live.statistics import Statistics
from sponge.live.tensors import GroupKey, hold_inputs

_log = logging.getLogger("sponge")

MAX_GROUPS = 4096
"""Sets of input shapes that are remembered; a client that sends ever new ones must not fill the memory."""


class Scheduler(Observed):
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
    copy_inputs
        Copy each request's arrays when it is submitted, so that its client may use them again at once. Otherwise they
        are read when the batch starts, and a client that writes into them before its future is done gets wrong
        answers (its neighbours do not).
    clock
        Seconds, never decreasing; deadlines are instants on it.
    recorder
        Called with every event, its instant and the actions that followed, one at a time. It must be quick.
    name
        Prefix of the thread names, and what tells this scheduler apart in metrics and reports.

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
        copy_inputs: bool = False,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
        name: str = "sponge",
    ) -> None:
        super().__init__(name)
        if slo_s is not None and not (slo_s := seconds("slo_s", slo_s)) > 0:
            raise ValueError(f"slo_s must be positive, got {slo_s}")
        owned: list[Any] = []
        if not isinstance(session, ElasticSession):
            session = ElasticSession(session, max_threads=None if solver is None else math.ceil(solver.max_cores))
            owned.append(session)
        self.session = session
        try:
            self.controller = controller or _default_controller(self.session, solver, settings)
            self.session.reserve(self.controller.max_lanes)
        except BaseException:
            for part in owned:
                part.close()
            raise
        self.scaler: CpuScaler = scaler or ThreadScaler()
        self.slo_s = slo_s
        self._clock = clock
        self._ids = itertools.count()
        self._copy_inputs = copy_inputs
        self._groups: dict[GroupKey, int] = {}
        self._group_numbers = itertools.count()
        self._service = Service(
            self.controller,
            self.session,
            self.scaler,
            clock=clock,
            recorder=recorder,
            observers=self._observers,
            name=name,
            owned=owned,
        )
        self._engine = self._service.engine
        look_after(self, self._service)
        self._engine.wait_until_idle(Tick(), 0.0)  # until the first allocation is in force
        self._serve_status_if_asked()

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
            they must not be changed before the future is done, unless the scheduler was made with *copy_inputs*.
        budget_s
            Time left for this request [s]; ``inf`` for no deadline. By default the scheduler's *slo_s*.
        deadline
            The instant by which the answer is due instead [s on the scheduler's clock, see `now`].

        Returns
        -------
        concurrent.futures.Future
            Gives the outputs of ``session.run`` for this request's rows. Its exception is `DeadlineExceeded` if the
            request was turned away, `QueueFull`, `ModelError`, or `SchedulerClosed`. Cancelling it takes the request
            out of the queue unless it already runs. Its callbacks run on the scheduler's threads (those of a future
            that is already done, or is cancelled, on the thread that adds or cancels): they must be quick, and must
            not wait for another request.

        Raises
        ------
        ValueError, TypeError
            If the inputs do not fit the model, or the deadline is missing or not a number.
        SchedulerClosed
            If the scheduler is closed; its subclass `ControllerFailed` if it has ended since its controller raised.
        """
        arrived_at = self._clock()
        deadline = deadline_of(arrived_at, budget_s, deadline, self.slo_s)
        if isinstance(inputs, Mapping):
            inputs = hold_inputs(inputs, copy=self._copy_inputs)
        rows, shapes = self.session.check(inputs)
        if rows > self.controller.max_batch_size:
            raise ValueError(
                f"a request must have at most max_batch_size={self.controller.max_batch_size} rows, got {rows}"
            )
        service = self._service
        if service.refusal is not None:
            raise service.refusal(None)
        group = self._groups.get(shapes)
        if group is None:
            group = self._new_group(shapes)
        if service.engine.crowded and not service.owns_this_thread():
            service.engine.wait_at_the_door()
        request_id = next(self._ids)
        future = RequestFuture(lambda: service.engine.post(Cancelled(request_id)))
        request = Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline, rows=rows, group=group)
        if self._observers.watching:
            self._observers.submitted(request)
        if not service.engine.post(Arrived(request), Entry(request, inputs, future)):
            raise (service.refusal or SchedulerClosed)(None)  # closed in between
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
        return self._service.closing

    def statistics(self) -> Statistics:
        """Return a snapshot of what has been done so far."""
        return self._service.statistics()

    def _until(self) -> float:
        ended_at = self._service.ended_at
        return self._clock() if ended_at is None else ended_at

    # -- life cycle ----------------------------------------------------------------------------------------------

    def own(self, *parts: Any) -> None:
        """Close these with the scheduler, in this order, after everything that uses them."""
        self._service.own(*parts)

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
        return self._service.close(drain, timeout_s)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Scheduler cannot be pickled or copied: make one in each process, from the model's path")

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self.close(drain=False, timeout_s=EXIT_TIMEOUT_S):
            _log.warning("a batch was still running %g s after %s, and is left to itself", EXIT_TIMEOUT_S, kind)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _new_group(self, shapes: GroupKey) -> int:
        """Number a set of shapes; sets that share a number would share batches."""
        if len(self._groups) >= MAX_GROUPS:
            # The same shapes may get another number then: they miss a common batch, nothing worse.
            self._groups = {}
        return self._groups.setdefault(shapes, next(self._group_numbers))


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
