"""The memory of a scheduler: its last requests, batches and allocations, in bounded space.

Numbers are kept in flat arrays that are filled once and then overwritten from their beginning, 8 bytes a number: an
object for each request would take ten times the space and keep the garbage collector busy.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sponge.core.values import RejectReason, Request
from sponge.live.observing import Observer, ServedBatch
from sponge.measure import Allocation, Ending, Recording

_REQUEST_FIELDS = 5
_BATCH_FIELDS = 3
_STEP_FIELDS = 2
BYTES_PER_REQUEST = 8 * (_REQUEST_FIELDS + _BATCH_FIELDS + _STEP_FIELDS)
"""Of memory at most, for each request of the limit."""

# As floats: an enum's member takes longer to look up, and to convert, than all the rest of a row.
_MET, _LATE, _FAILED = float(Ending.MET), float(Ending.LATE), float(Ending.FAILED)
_ENDINGS = {
    None: float(Ending.CANCELLED),
    RejectReason.DEADLINE: float(Ending.REJECTED),
    RejectReason.QUEUE_FULL: float(Ending.QUEUE_FULL),
    RejectReason.CLOSED: float(Ending.CLOSED),
}


class _Ring:
    """The last *limit* rows of *width* numbers."""

    def __init__(self, width: int, limit: int) -> None:
        self.added = 0
        self._width = width
        self._limit = limit
        self._values = array("d")

    def add(self, *row: float) -> None:
        if self.added < self._limit:
            self._values.extend(row)
        else:
            at = self.added % self._limit * self._width
            self._values[at : at + self._width] = array("d", row)
        self.added += 1

    @property
    def full(self) -> bool:
        """Whether rows have been overwritten."""
        return self.added > self._limit

    def columns(self) -> npt.NDArray[np.float64]:
        """Return a copy, the oldest row first, one array for each number of a row."""
        rows = np.array(self._values).reshape(-1, self._width)
        oldest = self.added % self._limit if self.full else 0
        return np.roll(rows, -oldest, axis=0).T


class RunRecorder(Observer):
    """Keeps what happened to the last requests.

    Parameters
    ----------
    limit
        Requests, batches, and changes of the allocation that are kept, each; >= 1.

    Raises
    ------
    ValueError
        If *limit* is not a positive integer.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit must be an integer of at least 1, got {limit!r}")
        self.limit = limit
        self._requests = _Ring(_REQUEST_FIELDS, limit)
        self._batches = _Ring(_BATCH_FIELDS, limit)
        self._steps = _Ring(_STEP_FIELDS, limit)
        self._lock = threading.Lock()

    def left(self, request: Request, reason: RejectReason | None, now: float) -> None:
        """Note a request that was turned away or cancelled."""
        with self._lock:
            self._requests.add(request.arrived_at, request.deadline, math.nan, math.nan, _ENDINGS[reason])

    def served(self, served: ServedBatch) -> None:
        """Note a batch and its requests."""
        with self._lock:
            for run in served.runs:
                if not run.answered:
                    continue
                failed = run.error is not None
                for request in run.requests:
                    ending = _MET if run.finished_at <= request.deadline else _LATE
                    self._requests.add(
                        request.arrived_at,
                        request.deadline,
                        run.started_at,
                        math.nan if failed else run.finished_at,
                        _FAILED if failed else ending,
                    )
            if served.runs:
                batch_s = served.runs[-1].finished_at - served.started_at
                self._batches.add(
                    served.batch.rows, batch_s, served.batch.expected_s if served.as_planned else math.nan
                )

    def resized(self, cores: float, now: float) -> None:
        """Note an allocation."""
        with self._lock:
            self._steps.add(now, cores)

    def recording(self, name: str, now: float, *, fastest_s: float, facts: Mapping[str, str]) -> Recording:
        """Return what is remembered. Time zero is the first instant of which everything is.

        Parameters
        ----------
        name, fastest_s, facts
            See `Recording`.
        now
            Until when the last allocation counts [s].
        """
        with self._lock:
            requests, batches, steps = (ring.columns() for ring in (self._requests, self._batches, self._steps))
            ended = self._requests.added
            known_from = [c[0].min() for c, r in ((requests, self._requests), (steps, self._steps)) if r.full]
        zero = float(max(known_from) if known_from else min([now, *steps[0], *requests[0]]))
        kept = requests[:, requests[0] >= zero]
        arrived_at, deadline, started_at, finished_at, ending = kept[:, np.argsort(kept[0], kind="stable")]
        changes = list(zip((steps[0] - zero).tolist(), steps[1].tolist(), strict=True))
        return Recording(
            name=name,
            arrived_at_s=arrived_at - zero,
            deadline_s=deadline - zero,
            started_at_s=started_at - zero,
            finished_at_s=finished_at - zero,
            ending=ending,
            batch_rows=batches[0],
            batch_s=batches[1],
            batch_expected_s=batches[2],
            allocation=Allocation.from_changes(changes or [(0.0, 0.0)], start_s=0.0, end_s=max(now - zero, 0.0)),
            fastest_s=fastest_s,
            forgotten=ended - len(arrived_at),
            facts=facts,
        )
