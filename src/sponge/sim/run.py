"""What came of a simulated run: every request, every batch, the cores over time, and the figures that sum them up."""

from __future__ import annotations

import enum
import math
import os
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.actions import Action
from sponge.core.events import Event
from sponge.measure import Allocation, Ending, Recording, write_report
from sponge.workload import Workload

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


class Outcome(enum.IntEnum):
    """How a request ended, as stored in `Run.outcome`."""

    MET = 0
    """Served by its deadline."""
    LATE = 1
    """Served after it."""
    REJECTED = 2
    """Turned away because of its deadline."""
    QUEUE_FULL = 3
    """Turned away because too many were waiting."""
    CLOSED = 4
    """Turned away at the end: the controller kept it waiting although nothing else happened any more."""
    UNSERVED = 5
    """Neither served nor turned away."""


@attrs.frozen(kw_only=True, eq=False)
class CoresOverTime:
    """Cores as a step function: ``cores[i]`` from ``times_s[i]`` to the next, the last to ``end_s``.

    The first time is 0. Arrays have the shape ``(n_steps,)``.
    """

    times_s: FloatArray
    cores: FloatArray
    end_s: float

    @property
    def core_seconds(self) -> float:
        """Cores × time from 0 to ``end_s`` [core·s]."""
        return float(self.cores @ np.diff(np.append(self.times_s, self.end_s)))

    @property
    def mean(self) -> float:
        """Averaged over time [cores]; 0 for an empty span."""
        return self.core_seconds / self.end_s if self.end_s > 0 else 0.0

    @property
    def changes(self) -> int:
        """How often the core count changed."""
        return int(np.count_nonzero(np.diff(self.cores)))

    def mean_per_bin(self, edges_s: npt.ArrayLike) -> FloatArray:
        """Return the cores averaged over each bin between *edges_s*, shape ``(n_edges - 1,)``."""
        edges = np.asarray(edges_s, dtype=np.float64)
        knots_s = np.append(self.times_s, self.end_s)
        used = np.concatenate([[0.0], np.cumsum(self.cores * np.diff(knots_s))])
        return np.asarray(np.diff(np.interp(edges, knots_s, used)) / np.diff(edges))


@attrs.frozen(kw_only=True, eq=False)
class Batches:
    """The batches in order of their start; arrays of shape ``(n_batches,)``."""

    rows: IntArray
    cores: FloatArray
    """Planned for the batch; while fewer are in force than all lanes want, it has its share of them."""
    lane: IntArray
    started_at_s: FloatArray
    finished_at_s: FloatArray
    """``nan`` if it never ended."""

    def __len__(self) -> int:
        return len(self.rows)


@attrs.frozen(kw_only=True, eq=False)
class Run:
    """One simulated run; instants count from the start of the workload [s].

    Arrays over requests have the shape ``(n_requests,)`` and the order of the workload, which is that of arrival.
    """

    sent_at_s: FloatArray
    arrived_at_s: FloatArray
    deadline_s: FloatArray
    finished_at_s: FloatArray
    """``nan`` where not served."""
    outcome: npt.NDArray[np.int8]
    """See `Outcome`."""
    batch: IntArray
    """Index into `batches`; -1 where not started."""
    batches: Batches
    asked: CoresOverTime
    """What the controller asked for."""
    in_force: CoresOverTime
    """What it had, and is charged for."""
    resizes: int
    """How often the controller asked for another allocation than before."""
    decisions: int
    """Events that it handled."""
    decision_s: float
    """Simulated time that this took [s]."""
    seed: int
    log: tuple[tuple[float, Event, list[Action]], ...] | None = None
    """(instant, event, actions) of every decision, if they were recorded."""

    def __len__(self) -> int:
        return len(self.arrived_at_s)

    @property
    def workload(self) -> Workload:
        """The requests as they came, for another policy to meet the same ones."""
        return Workload(sent_at_s=self.sent_at_s, arrived_at_s=self.arrived_at_s, deadline_s=self.deadline_s)

    @property
    def horizon_s(self) -> float:
        """End of the span over which the allocation counts; see `simulate`."""
        return self.in_force.end_s

    @property
    def mean_cores(self) -> float:
        """Cores in force, averaged over the horizon."""
        return self.in_force.mean

    @property
    def met(self) -> npt.NDArray[np.bool_]:
        """Which requests were answered by their deadline."""
        return np.asarray(self.outcome == Outcome.MET)

    @property
    def misses(self) -> int:
        """Requests that were not: late, turned away, or never served."""
        return len(self) - int(np.count_nonzero(self.met))

    @property
    def slo_attainment(self) -> float:
        """Share of the requests that were answered by their deadline, in [0, 1]; ``nan`` without requests."""
        return 1.0 - self.misses / len(self) if len(self) else math.nan

    @property
    def started_at_s(self) -> FloatArray:
        """Start of each request's batch; ``nan`` where not started."""
        started = np.append(self.batches.started_at_s, math.nan)
        return np.asarray(started[self.batch])  # -1 reads the nan

    @property
    def queue_delay_s(self) -> FloatArray:
        """From arrival to the start of the batch; ``nan`` where not started."""
        return self.started_at_s - self.arrived_at_s

    @property
    def response_s(self) -> FloatArray:
        """From arrival to the answer; ``nan`` where not served."""
        return self.finished_at_s - self.arrived_at_s

    def count(self, outcome: Outcome) -> int:
        """Return how many requests ended so."""
        return int(np.count_nonzero(self.outcome == outcome))

    def per_second(self) -> tuple[IntArray, IntArray, IntArray]:
        """Return the seconds in which requests arrived, how many did, and how many of these missed their deadline.

        Published results count seconds instead of requests: a second is violated if any request of it is. The three
        arrays have the shape ``(n_seconds_with_arrivals,)``.
        """
        seconds, index, arrived = np.unique(
            np.floor(self.arrived_at_s).astype(np.int64), return_inverse=True, return_counts=True
        )
        missed = np.bincount(index, weights=~self.met, minlength=len(seconds)).astype(np.int64)
        return seconds, arrived, missed

    def summary(self) -> dict[str, int | float]:
        """Return the figures of the run; percentiles are over the requests that were served (``nan`` if none was)."""
        response_s = self.response_s[np.isfinite(self.finished_at_s)]
        p50, p99 = np.percentile(response_s, [50, 99]).tolist() if len(response_s) else (math.nan, math.nan)
        _, _, missed = self.per_second()
        return {
            "requests": len(self),
            "misses": self.misses,
            "slo_attainment": self.slo_attainment,
            **{outcome.name.lower(): self.count(outcome) for outcome in Outcome},
            "seconds_with_a_miss": float(np.mean(missed > 0)) if len(missed) else math.nan,
            "cores_mean": self.mean_cores,
            "core_seconds": self.in_force.core_seconds,
            "resizes": self.resizes,
            "response_s_p50": p50,
            "response_s_p99": p99,
            "batches": len(self.batches),
            "batch_size_mean": float(self.batches.rows.mean()) if len(self.batches) else math.nan,
            "decisions": self.decisions,
            "decision_s": self.decision_s,
            "horizon_s": self.horizon_s,
            "seed": self.seed,
        }

    def recording(self, name: str = "simulated", *, fastest_s: float = math.nan) -> Recording:
        """Return the run as what a report is drawn from; see `sponge.measure.Recording` for the parameters."""
        # Never served is to its client as good as turned away at the end; the other codes are the same.
        ending = np.where(self.outcome == Outcome.UNSERVED, Ending.CLOSED, self.outcome)
        batches = self.batches
        return Recording(
            name=name,
            arrived_at_s=self.arrived_at_s,
            deadline_s=self.deadline_s,
            started_at_s=self.started_at_s,
            finished_at_s=self.finished_at_s,
            ending=ending,
            batch_rows=batches.rows,
            batch_s=batches.finished_at_s - batches.started_at_s,
            batch_expected_s=np.full(len(batches), math.nan),
            allocation=Allocation(times_s=self.in_force.times_s, cores=self.in_force.cores, end_s=self.in_force.end_s),
            fastest_s=fastest_s,
        )

    def report(self, path: str | os.PathLike[str], *, title: str = "A simulated run") -> None:
        """Write the run as one HTML page with interactive plots, which needs nothing else.

        Raises
        ------
        ImportError
            If plotly is not installed (``pip install "sponge-serving[report]"``).
        """
        write_report(path, [self.recording()], title=title, settings={"seed": str(self.seed)})

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the log as JSON types; what there is not (``nan``) becomes None."""
        requests = ("sent_at_s", "arrived_at_s", "deadline_s", "finished_at_s", "outcome", "batch")
        return {
            "summary": {name: _json(value) for name, value in self.summary().items()},
            "requests": {name: _list(getattr(self, name)) for name in requests},
            "batches": {name: _list(value) for name, value in attrs.asdict(self.batches).items()},
            **{
                name: {"times_s": steps.times_s.tolist(), "cores": steps.cores.tolist(), "end_s": steps.end_s}
                for name, steps in (("asked", self.asked), ("in_force", self.in_force))
            },
        }


def _json(value: float) -> float | None:
    """Infinite deadlines and missing figures have no JSON."""
    return value if math.isfinite(value) else None


def _list(values: npt.NDArray[Any]) -> list[float | None]:
    return [_json(value) for value in values.tolist()]
