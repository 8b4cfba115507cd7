"""One allocation from the first event to the last: a service without an autoscaler."""

from __future__ import annotations

from typing import Literal

from sponge.core.latency import Latency
from sponge.core.values import Request
from sponge.sim.baselines.base import Baseline, Order, require

_CLOSE_ENOUGH_S = 1e-9


class StaticController(Baseline):
    """A fixed allocation, split evenly over a fixed number of lanes.

    With ``order="fifo"`` and single-request batches it is a service without a scheduler; with ``order="edf"`` and
    batches it is a good one, whose only fault is that it pays for its cores all the time.

    Parameters
    ----------
    cores
        Total allocation [cores], > 0; asked for once, at the first event.
    order
        ``"fifo"``: by arrival; ``"edf"``: by deadline; ``"lifo"``: the last to come first. Ties leave by sequence
        number.
    max_batch_size
        Rows of a batch at most, ≥ 1.
    window_s
        How long the longest-waiting request lets a batch that is not full wait for company [s], ≥ 0.
    lanes
        Batches that run at the same time, ≥ 1, each on ``cores / lanes``.
    batching
        ``"fixed"``: a free lane takes whatever is waiting, up to *max_batch_size*. ``"adaptive"``: no more than can be
        done by the deadline of the first in the queue, by the prediction of *latency*, but at least one request.
    drop_late
        Turn away, when a lane is free for it, what can no longer finish in time: by the prediction of
        *latency* if that is given, else what is past its deadline. Without it every request is served,
        however late.
    latency
        Predicts the service time; without one, batches say that they expect 0 s.
    max_queue
        Waiting requests at most, ≥ 1; a further one is turned away.

    Raises
    ------
    ValueError
        If an argument is out of range, or adaptive batching is asked for without *latency*.
    """

    def __init__(
        self,
        cores: float,
        *,
        order: Order,
        max_batch_size: int,
        window_s: float = 0.0,
        lanes: int = 1,
        batching: Literal["fixed", "adaptive"] = "fixed",
        drop_late: bool = False,
        latency: Latency | None = None,
        max_queue: int = 1024,
    ) -> None:
        super().__init__(
            initial_cores=cores,
            order=order,
            max_batch_size=max_batch_size,
            max_lanes=lanes,
            max_queue=max_queue,
            latency=latency,
        )
        require(0 <= window_s < float("inf"), "window_s", "finite and not negative", window_s)
        require(batching in ("fixed", "adaptive"), "batching", "'fixed' or 'adaptive'", batching)
        require(batching == "fixed" or latency is not None, "latency", "given for adaptive batching", latency)
        self.cores = float(cores)
        self.window_s = window_s
        self.batching = batching
        self.drop_late = drop_late

    def _rows_to_start(self, now: float) -> int | None:
        rows = self.max_batch_size if self.batching == "fixed" else self._rows_in_time(now)
        if not self.window_s or self._draining or now >= self._window_ends() or self._has_rows(rows):
            return rows
        return None

    def _waits_until(self) -> float | None:
        return self._window_ends() if self._lane_is_free() else None

    def _window_ends(self) -> float:
        return self._oldest().arrived_at + self.window_s

    def _rows_in_time(self, now: float) -> int:
        head = self._head()
        rows = self.max_batch_size
        while rows > head.rows and now + self._expected_s(rows) > head.deadline + _CLOSE_ENOUGH_S:
            rows -= 1
        return rows

    def _turn_away(self, now: float) -> Request | None:
        if not (self.drop_late and self._lane_is_free()):
            return None
        head = self._head()
        # An answer in time must be possible; with no prediction only the past is certain.
        return head if now + self._expected_s(head.rows) > head.deadline else None
