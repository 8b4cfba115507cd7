"""What came of a run: each request's outcome, the cores over time, and the figures that sum them up.

Response times run from the *scheduled* arrival, so that a load generator that falls behind makes the
service look slower, never faster. A deadline is the client's own (sent + SLO): whether the request was
served late, turned away or failed, it is missed all the same.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt


class OutcomeKind(enum.Enum):
    """How a request ended."""

    FINISHED = "finished"
    REJECTED = "rejected"
    """Turned away without being run."""
    FAILED = "failed"
    """The model raised, or the request was cancelled."""


@attrs.frozen(kw_only=True, slots=True)
class Outcome:
    """One request: when it was due to arrive, when it did, and what came of it [s, one clock for the run]."""

    sent_at: float
    """The client sends (part of the budget is used from here on)."""
    arrived_at: float
    """Scheduled arrival, after the network."""
    deadline: float
    finished_at: float | None = None
    """End of service; None unless *kind* is FINISHED."""
    kind: OutcomeKind = OutcomeKind.FINISHED
    submitted_at: float | None = None
    """When the load generator really handed it over, if known."""

    def __attrs_post_init__(self) -> None:
        if (self.finished_at is None) == (self.kind is OutcomeKind.FINISHED):
            raise ValueError(
                f"finished_at must be given if and only if kind is FINISHED, got {self.finished_at!r} and {self.kind}"
            )

    @property
    def met(self) -> bool:
        """Whether the answer was there by the deadline."""
        return self.finished_at is not None and self.finished_at <= self.deadline

    @property
    def response_s(self) -> float:
        """From scheduled arrival to the end of service [s]; ``nan`` if it was not served."""
        return math.nan if self.finished_at is None else self.finished_at - self.arrived_at

    @property
    def generator_lateness_s(self) -> float:
        """By how much the load generator was late in handing it over [s]; 0 if not known."""
        return 0.0 if self.submitted_at is None else max(0.0, self.submitted_at - self.arrived_at)


def _as_floats(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


@attrs.frozen(kw_only=True, eq=False)
class Allocation:
    """Cores allocated over time: ``cores[i]`` from ``times_s[i]`` to the next time, the last to ``end_s``.

    Before the first time nothing is allocated. The clock is that of the outcomes.

    Raises
    ------
    ValueError
        If lengths differ, the times decrease or end after *end_s*, or a core count is negative.
    """

    times_s: npt.NDArray[np.float64] = attrs.field(converter=_as_floats)
    cores: npt.NDArray[np.float64] = attrs.field(converter=_as_floats)
    end_s: float = attrs.field(converter=float)

    def __attrs_post_init__(self) -> None:
        if self.times_s.ndim != 1 or self.times_s.shape != self.cores.shape or self.times_s.size == 0:
            raise ValueError(
                "times_s and cores must be one-dimensional, of equal length and not empty, "
                f"got shapes {self.times_s.shape} and {self.cores.shape}"
            )
        if np.any(np.diff(np.append(self.times_s, self.end_s)) < 0):
            raise ValueError("times_s must not decrease and must not lie after end_s")
        if not np.all(self.cores >= 0):
            raise ValueError("cores must not be negative")

    @classmethod
    def from_changes(cls, changes: Sequence[tuple[float, float]], *, start_s: float, end_s: float) -> Allocation:
        """Make one from (instant, cores) pairs in order of time, cut to [*start_s*, *end_s*].

        What was in force at *start_s* is kept; if nothing was, the first change counts from *start_s* on,
        since a machine that serves before its first change holds at least that much.
        """
        if not changes:
            raise ValueError("changes must hold at least one (instant, cores) pair")
        before = [cores for instant, cores in changes if instant <= start_s]
        within = [(instant, cores) for instant, cores in changes if start_s < instant < end_s]
        steps = [(start_s, before[-1] if before else changes[0][1]), *within]
        return cls(times_s=[t for t, _ in steps], cores=[c for _, c in steps], end_s=end_s)

    @property
    def core_seconds(self) -> float:
        """Cores × time [core·s]."""
        return float(self.cores @ np.diff(np.append(self.times_s, self.end_s)))

    @property
    def mean_cores(self) -> float:
        """Cores averaged over time; 0 for an empty span."""
        span_s = self.end_s - float(self.times_s[0])
        return self.core_seconds / span_s if span_s > 0 else 0.0

    @property
    def changes(self) -> int:
        """How often the core count changed; repeated equal values are no change."""
        return int(np.count_nonzero(np.diff(self.cores)))

    def mean_per_bin(self, edges_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the cores averaged over each bin between *edges_s*, shape ``(n_edges - 1,)``."""
        edges = np.asarray(edges_s, dtype=np.float64)
        knots_s = np.append(self.times_s, self.end_s)
        used = np.concatenate([[0.0], np.cumsum(self.cores * np.diff(knots_s))])
        return np.asarray(np.diff(np.interp(edges, knots_s, used)) / np.diff(edges), dtype=np.float64)


@attrs.frozen(kw_only=True)
class Summary:
    """The figures of one run; percentiles are over the requests that were served (``nan`` if none was)."""

    policy: str
    requests: int
    deadlines_met: int
    slo_attainment: float
    """Share of all requests whose deadline was met, in [0, 1]; ``nan`` without requests."""
    late: int
    """Served, but after the deadline."""
    rejected: int
    failed: int
    seconds_with_a_miss: float
    """Share of the seconds (with arrivals) in which a deadline was missed: how published results count."""
    response_s_p50: float
    response_s_p99: float
    core_seconds_allocated: float
    cpu_seconds_used: float
    """CPU time of the threads that served; ``nan`` if it was not measured."""
    allocations_changed: int
    cores_mean: float
    generator_lateness_s_max: float
    """The largest delay of the load generator: small beside the response times, or the run is not valid."""


def summarise(
    policy: str,
    outcomes: Sequence[Outcome],
    allocation: Allocation,
    *,
    cpu_seconds_used: float = math.nan,
) -> Summary:
    """Sum up one run.

    Parameters
    ----------
    policy
        Its name, for the table.
    outcomes
        One for each request of the workload, in any order.
    allocation
        The cores over the whole run.
    cpu_seconds_used
        CPU time of the serving threads [s].

    Returns
    -------
    Summary
    """
    met = sum(outcome.met for outcome in outcomes)
    kinds = [outcome.kind for outcome in outcomes]
    response_s = np.array([o.response_s for o in outcomes if o.kind is OutcomeKind.FINISHED])
    p50, p99 = np.percentile(response_s, [50, 99]).tolist() if len(response_s) else (math.nan, math.nan)
    seconds = {math.floor(outcome.arrived_at) for outcome in outcomes}
    missed = {math.floor(outcome.arrived_at) for outcome in outcomes if not outcome.met}
    return Summary(
        policy=policy,
        requests=len(outcomes),
        deadlines_met=met,
        slo_attainment=met / len(outcomes) if outcomes else math.nan,
        late=kinds.count(OutcomeKind.FINISHED) - met,
        rejected=kinds.count(OutcomeKind.REJECTED),
        failed=kinds.count(OutcomeKind.FAILED),
        seconds_with_a_miss=len(missed) / len(seconds) if seconds else math.nan,
        response_s_p50=p50,
        response_s_p99=p99,
        core_seconds_allocated=allocation.core_seconds,
        cpu_seconds_used=cpu_seconds_used,
        allocations_changed=allocation.changes,
        cores_mean=allocation.mean_cores,
        generator_lateness_s_max=max((outcome.generator_lateness_s for outcome in outcomes), default=0.0),
    )


def to_json(summary: Summary) -> dict[str, str | int | float | None]:
    """Return the summary as JSON types; a figure that there is not (``nan``) becomes None."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in attrs.asdict(summary).items()
    }
