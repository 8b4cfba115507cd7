"""The part of a scheduler that shows what it does: to observers, in a report, and to ``sponge top``."""

from __future__ import annotations

import abc
import logging
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sponge.errors import CpuControlError
from sponge.live.observing import Observer, Observers
from sponge.live.recorder import RunRecorder
from sponge.live.scalers import CpuScaler
from sponge.live.statistics import Statistics

if TYPE_CHECKING:
    from sponge.core.protocol import ControllerProtocol
    from sponge.measure import Recording

_log = logging.getLogger("sponge")


class Observed(abc.ABC):
    """What `sponge.Scheduler` inherits.

    Parameters
    ----------
    name
        Tells it apart in metrics and reports.
    """

    controller: ControllerProtocol
    scaler: CpuScaler

    def __init__(self, name: str) -> None:
        self.name = name
        self._observers = Observers()
        self._recorder: RunRecorder | None = None

    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """Return a snapshot of what has been done so far."""

    @abc.abstractmethod
    def now(self) -> float:
        """Return the scheduler's clock [s]."""

    @abc.abstractmethod
    def _until(self) -> float:
        """Return the instant until which things happen: now, or the end of a closed scheduler [s]."""

    @abc.abstractmethod
    def own(self, *parts: Any) -> None:
        """Close these with the scheduler."""

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell *observer* of every request, batch and allocation from now on; return what ends it."""
        observers = self._observers  # what is returned, and often kept by the observer, must not keep the scheduler
        observers.add(observer)
        cores, now = self.statistics().cores, self.now()
        observers.tell(lambda one: one.resized(cores, now) if one is observer else None)
        return partial(observers.remove, observer)

    # -- the report ----------------------------------------------------------------------------------------------

    def record(self, limit: int = 20_000) -> None:
        """Remember what happens from now on, for `report`; called again, it begins anew.

        Parameters
        ----------
        limit
            Requests, batches and changes of the allocation that are remembered, each: 80 bytes of memory for each
            request of the limit, at most.

        Raises
        ------
        ValueError
            If *limit* is not a positive integer.
        """
        recorder = RunRecorder(limit)
        if self._recorder is not None:
            self._observers.remove(self._recorder)
        self._recorder = recorder
        self.observe(recorder)

    def report(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write what `record` remembers as one HTML page with interactive plots, which needs nothing else.

        Parameters
        ----------
        path
            Of the file.
        title
            Headline; by default the scheduler's name.

        Raises
        ------
        ImportError
            If plotly is not installed (``pip install "sponge-serving[report]"``).
        RuntimeError
            If `record` has not been called.
        """
        from sponge.measure import write_report

        write_report(path, [self.recording()], title=title or f"What the scheduler {self.name!r} did")

    def recording(self, name: str | None = None) -> Recording:
        """Return what `record` remembers, as a `sponge.measure.Recording`; *name* is by default the scheduler's.

        Raises
        ------
        RuntimeError
            If `record` has not been called.
        """
        if self._recorder is None:
            raise RuntimeError("nothing has been recorded: call record() before the requests come")
        return self._recorder.recording(
            name or self.name, self._until(), fastest_s=self.fastest_s(), facts=self._recorded_facts()
        )

    def _recorded_facts(self) -> Mapping[str, str]:
        found, condition = self.statistics(), self.condition()
        facts = {
            "CPU time used since the start": f"{found.cpu_s:.2f} s",
            "enforced by": found.cpu_control,
            "lanes at most": str(self.controller.max_lanes),
            "rows of a batch at most": str(self.controller.max_batch_size),
        }
        if condition["max_cores"] is not None:
            facts["cores at most"] = f"{condition['max_cores']:g}"
        if condition["throttled_s"] is not None:
            facts["throttled since the start"] = f"{condition['throttled_s']:.2f} s"
        return facts

    # -- sponge top ----------------------------------------------------------------------------------------------

    def serve_status(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Let ``sponge top`` look at this scheduler until it is closed; return the path of the socket.

        The socket can be opened by the same user and root alone. Setting the environment variable
        ``SPONGE_STATUS=1`` does this for every scheduler of a process.

        Parameters
        ----------
        path
            Of the Unix socket; by default one where ``sponge top`` looks: in the folder ``sponge`` in
            ``$XDG_RUNTIME_DIR``, or ``sponge-UID`` in the temporary directory.

        Raises
        ------
        OSError
            If no socket can be made there.
        """
        from sponge.live.status import StatusServer

        server = StatusServer(self, path)
        self.own(server)
        return server.path

    def _serve_status_if_asked(self) -> None:
        """Follow the environment variable; what does not work is told, and no reason not to serve."""
        if os.environ.get("SPONGE_STATUS", "0") not in ("", "0"):
            try:
                self.serve_status()
            except OSError as error:
                _log.warning("sponge top cannot look at the scheduler %r: %s", self.name, error)

    # -- what the parts know -------------------------------------------------------------------------------------

    def fastest_s(self, rows: int = 1) -> float:
        """Return what a request takes alone on all cores, by the latency model [s]; ``nan`` without a model."""
        solver = getattr(self.controller, "solver", None)
        if solver is None:
            return math.nan
        return float(solver.latency.latency_s(rows, solver.max_cores))

    def condition(self) -> dict[str, float | None]:
        """Return what the parts know beyond the statistics; None for what they do not.

        ``arrival_rate_rps``, rows per second; ``drift_scale``, how much longer batches take than the profile says;
        ``max_cores``; ``throttled_s``, for how long the kernel stopped the model's threads, summed over CPUs.
        """
        rate, drift = (getattr(self.controller, name, None) for name in ("arrival_rate_rps", "drift_scale"))
        return {
            "arrival_rate_rps": rate(self.now()) if callable(rate) else None,
            "drift_scale": drift() if callable(drift) else None,
            "max_cores": getattr(getattr(self.controller, "solver", None), "max_cores", None),
            "throttled_s": self._throttled_s(),
        }

    def _throttled_s(self) -> float | None:
        throttled = getattr(self.scaler, "throttled_s", None)
        try:
            return throttled() if callable(throttled) else None
        except CpuControlError:  # closed, or its group is gone
            return None
