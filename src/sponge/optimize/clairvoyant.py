"""The clairvoyant bound: what no scheduler can beat, even one that knows every arrival beforehand.

Rules, and why they hold:

* Everything here is a relaxation. Whatever a real schedule does, its core-seconds and its misses are at least these:
  batches are never partial, start before their requests are complete, are interrupted and resized for free, and
  lanes do not disturb each other unless asked. Where a simplification was needed, it goes the way that lowers the
  bound.
* A schedule that misses more can be cheaper. So a bound on core-seconds belongs to a number of misses, and a run is
  compared with the bound at its own (`Relaxation.core_seconds`).
* One lane is a machine whose speed is its throughput. With the piecewise linear cost ``P`` of `envelope.Envelope`,
  which has knots ``v_k`` and rises by ``σ_k`` more after each, the fluid optimum is::

      ∫ P(v(t)) dt  =  Σ_k σ_k · ∫ (v(t) − v_k)⁺ dt  >=  Σ_k σ_k · u(v_k)

  with ``u(v)`` the least work left undone at constant speed ``v``: each term is bounded by itself, and the flattest
  speed meets all of them at once. A request that is missed takes at most one unit off each ``u``.
* With many lanes the cost is linear until lanes or cores run out, and the budgets matter more than the speed: a
  request pays at least its share of the cheapest batch that fits into its own budget (`envelope.request_core_s`).
  Both bounds hold for any number of lanes, and the larger counts.
"""

from __future__ import annotations

import math
import operator

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency
from sponge.optimize import envelope, fluid, misses
from sponge.optimize.envelope import Envelope, FloatArray, Limits, Widths

_ROUNDING = 1e-9
"""Share of all work that is not trusted."""


@attrs.frozen(kw_only=True, eq=False)
class Relaxation:
    """The bounds for one number of lanes."""

    lanes: int
    lost_at_arrival: int
    """Requests that arrived too late for a batch of one on all cores."""
    crowded_out: int
    """Further requests for which there is no room, at the least; see `misses.at_least`."""
    envelope: Envelope
    """Least cores against throughput, beyond the idle allocation."""
    _idle_core_s: float
    _paid_idle_core_s: float
    _undone: FloatArray
    _request_core_s: FloatArray
    _request_extra_core_s: FloatArray

    @property
    def misses_at_least(self) -> int:
        """Every schedule misses as many deadlines or more."""
        return self.lost_at_arrival + self.crowded_out

    def fluid_core_seconds(self, misses: int | None = None) -> float:
        """Return the bound by speed [core·s]; arguments as for `core_seconds`."""
        extra = self._extra(misses)
        if not math.isfinite(extra):
            return math.inf
        prices = np.diff(self.envelope.slopes, prepend=0.0)
        # Sums of so many numbers are right to a part in a billion: what may be rounding is given away.
        undone = np.maximum(self._undone - extra - _ROUNDING * self._undone[0], 0.0)
        return float(self._paid_idle_core_s + prices @ undone)

    def request_core_seconds(self, misses: int | None = None) -> float:
        """Return the bound by the budget of each request [core·s]; arguments as for `core_seconds`."""
        extra = self._extra(misses)
        if not math.isfinite(extra):
            return math.inf
        served = max(len(self._request_core_s) - int(extra), 0)
        alone = float(np.sum(self._request_core_s[:served]))
        return max(alone, self._paid_idle_core_s + float(np.sum(self._request_extra_core_s[:served])))

    def core_seconds(self, misses: int | None = None) -> float:
        """Return the core-seconds that every schedule with so few misses allocates, at the least.

        Parameters
        ----------
        misses
            Deadlines missed, those lost at arrival included; ``None``: `misses_at_least`, which is as much as to say
            that all are met that can be.

        Returns
        -------
        float
            ``inf`` if no schedule misses so few.

        Raises
        ------
        ValueError
            If *misses* is negative.
        """
        return max(self._idle_core_s, self.fluid_core_seconds(misses), self.request_core_seconds(misses))

    def _extra(self, misses: int | None) -> float:
        """Misses of requests that were not lost at arrival; ``inf`` if there are no such schedules."""
        if misses is None:
            return self.crowded_out
        if misses < 0:
            raise ValueError(f"misses must be >= 0, got {misses!r}")
        return misses - self.lost_at_arrival if misses >= self.misses_at_least else math.inf


@attrs.frozen(kw_only=True, eq=False)
class CoreProfile:
    """Cores of the fluid optimum over time: ``cores[i]`` from ``times_s[i]`` to ``times_s[i + 1]``.

    What a clairvoyant would allocate if requests were divisible: a picture of the bound, which is the area below it.
    Where the deadlines ask for more than all cores can do, it shows all cores.
    """

    times_s: FloatArray
    """Shape ``(n + 1,)``."""
    cores: FloatArray
    """Shape ``(n,)``."""

    @property
    def core_seconds(self) -> float:
        """Area below the profile [core·s]."""
        return float(self.cores @ np.diff(self.times_s))

    def mean_per_bin(self, edges_s: npt.ArrayLike) -> FloatArray:
        """Return the cores averaged over each bin between *edges_s*, shape ``(n_edges - 1,)``; none outside."""
        edges = np.asarray(edges_s, dtype=np.float64)
        used = np.concatenate([[0.0], np.cumsum(self.cores * np.diff(self.times_s))])
        return np.asarray(np.diff(np.interp(edges, self.times_s, used)) / np.diff(edges))


@attrs.frozen(kw_only=True, eq=False)
class Bound:
    """What no scheduler can beat on a set of requests, on one lane and on many."""

    requests: int
    horizon_s: float
    """How long the idle allocation was charged [s]."""
    idle_cores: float
    max_cores: float
    one_lane: Relaxation
    many_lanes: Relaxation
    speed: fluid.Speed
    """Flattest throughput at which every request that has a deadline, and is not lost at arrival, could be met."""

    @property
    def lost_at_arrival(self) -> int:
        """Requests that arrived too late for a batch of one on all cores."""
        return self.many_lanes.lost_at_arrival

    @property
    def misses_at_least(self) -> int:
        """Deadlines that every schedule misses, on any lanes: misses beyond these are the avoidable ones."""
        return self.many_lanes.misses_at_least

    @property
    def core_seconds_one_lane(self) -> float:
        """Least core-seconds on one lane, with all met that can be [core·s]."""
        return self.one_lane.core_seconds()

    @property
    def core_seconds_lanes(self) -> float:
        """Least core-seconds on many lanes, with all met that can be [core·s]."""
        return self.many_lanes.core_seconds()

    def cores_over_time(self, relaxation: Relaxation) -> CoreProfile:
        """Return the cores of the fluid optimum over time, for `one_lane` or `many_lanes`.

        Its area is ``fluid_core_seconds`` if nothing is crowded out and all have deadlines (and the idle allocation is
        none: it is drawn for all the time up to the last deadline).
        """
        idle = self.idle_cores
        cores = np.minimum(idle + relaxation.envelope.cores_at(self.speed.rps), max(self.max_cores, idle))
        return CoreProfile(times_s=self.speed.times_s, cores=cores)


def bound(
    arrived_at_s: npt.ArrayLike,
    deadline_s: npt.ArrayLike,
    latency: Latency,
    *,
    max_cores: float,
    max_batch_size: int,
    max_lanes: int,
    idle_cores: float = 0.0,
    min_cores: float = 1.0,
    core_step: float | None = None,
    charge_interference: bool = False,
    horizon_s: float | None = None,
) -> Bound:
    """Bound what every schedule of these requests costs and misses, from below.

    Parameters
    ----------
    arrived_at_s, deadline_s
        When requests arrive and are due [s], shape ``(n,)``, in any order; deadlines may be ``inf``.
    latency
        What batches take; a service that is faster can beat the bound. Where times are random, the fastest give a
        bound and the mean a yardstick.
    max_cores
        Most cores of all lanes together [cores].
    max_batch_size
        Largest batch.
    max_lanes
        Most batches side by side, for the second of the two relaxations.
    idle_cores
        Least allocation, also while nothing runs [cores].
    min_cores, core_step
        What a running batch may have: any share from *min_cores* on, or, if a *core_step* is given, only whole steps
        above it. The default also holds for lanes that get less than they were planned with while a resize is
        under way, as long as that is not less than *min_cores*; whole steps give a slightly higher bound.
    charge_interference
        Slow each batch down by the batches that run when it starts. By default it is as fast as alone.
    horizon_s
        How long the idle allocation is charged [s]; by default from the first to the last arrival, which every run
        lasts.

    Returns
    -------
    Bound
        12,000 requests take a fraction of a second.

    Raises
    ------
    ValueError
        If an argument is out of range, the arrays differ in shape, or hold what is no time.

    References
    ----------
    Yao, Demers, Shenker, "A scheduling model for reduced CPU energy", FOCS 1995: the fluid optimum.
    """
    arrived, deadline = _windows(arrived_at_s, deadline_s)
    _require(0 < min_cores < math.inf, "min_cores", "> 0 and finite", min_cores)
    _require(min_cores <= max_cores < math.inf, "max_cores", f">= min_cores ({min_cores:g}) and finite", max_cores)
    _require(operator.index(max_batch_size) >= 1, "max_batch_size", ">= 1", max_batch_size)
    _require(operator.index(max_lanes) >= 1, "max_lanes", ">= 1", max_lanes)
    _require(0 <= idle_cores < math.inf, "idle_cores", ">= 0 and finite", idle_cores)
    _require(core_step is None or 0 < core_step < math.inf, "core_step", "> 0 and finite, or None", core_step)
    _require(horizon_s is None or 0 <= horizon_s < math.inf, "horizon_s", ">= 0 and finite, or None", horizon_s)
    if horizon_s is None:
        horizon_s = float(arrived[-1] - arrived[0]) if len(arrived) else 0.0
    widths = Widths.between(min_cores, max_cores, core_step)
    lost = misses.lost_at_arrival(deadline - arrived, latency, float(widths.speed_cores[-1]))
    arrived, deadline = arrived[~lost], deadline[~lost]
    due = np.isfinite(deadline)
    problem = _Problem(
        arrived_at_s=arrived,
        deadline_s=deadline,
        speed=fluid.flattest(arrived[due], deadline[due]),
        lost=int(np.count_nonzero(lost)),
        limits=Limits(latency=latency, widths=widths, max_cores=max_cores, max_batch_size=max_batch_size),
        idle_cores=idle_cores,
        unpaid_cores=min(idle_cores, min_cores),
        horizon_s=horizon_s,
        charge_interference=charge_interference,
    )
    one = problem.relax(1)
    return Bound(
        requests=len(lost),
        horizon_s=horizon_s,
        idle_cores=idle_cores,
        max_cores=max_cores,
        one_lane=one,
        many_lanes=one if max_lanes == 1 else problem.relax(max_lanes),
        speed=problem.speed,
    )


@attrs.frozen(kw_only=True, eq=False)
class _Problem:
    """Requests that are not lost at arrival, by arrival, and what may serve them."""

    arrived_at_s: FloatArray
    deadline_s: FloatArray
    speed: fluid.Speed
    lost: int
    limits: Limits
    idle_cores: float
    unpaid_cores: float
    """Allocated anyway: what a running batch is not charged for."""
    horizon_s: float
    charge_interference: bool

    def relax(self, lanes: int) -> Relaxation:
        common = self._envelope(lanes)
        undone = self.speed.above(common.rps[:-1])
        undone[0] = len(self.arrived_at_s)  # also those that are never due
        budgets_s = self.deadline_s - self.arrived_at_s
        alone, beyond_idle = (
            np.sort(envelope.request_core_s(self.limits, budgets_s, unpaid_cores=cores))
            for cores in (0.0, self.unpaid_cores)
        )
        return Relaxation(
            lanes=lanes,
            lost_at_arrival=self.lost,
            crowded_out=misses.at_least(self.arrived_at_s, self.deadline_s, self.limits, lanes, common.max_rps),
            envelope=common,
            idle_core_s=self.idle_cores * self.horizon_s,
            paid_idle_core_s=self.unpaid_cores * self.horizon_s,
            undone=undone,
            request_core_s=alone,
            request_extra_core_s=beyond_idle,
        )

    def _envelope(self, lanes: int) -> Envelope:
        first = envelope.lane_envelope(self.limits, unpaid_cores=self.unpaid_cores)
        if self.charge_interference:
            others = [envelope.lane_envelope(self.limits, neighbours=busy) for busy in range(1, lanes)]
        else:
            others = [envelope.lane_envelope(self.limits)] * (lanes - 1)
        return envelope.side_by_side([first, *others], self.limits.max_cores - self.unpaid_cores)


def _require(fine: bool, name: str, range_: str, value: object) -> None:
    if not fine:
        raise ValueError(f"{name} must be {range_}, got {value!r}")


def _windows(arrived_at_s: npt.ArrayLike, deadline_s: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    arrived, deadline = np.asarray(arrived_at_s, np.float64), np.asarray(deadline_s, np.float64)
    if arrived.ndim != 1 or arrived.shape != deadline.shape:
        raise ValueError(
            "arrived_at_s and deadline_s must be one-dimensional and of equal length, "
            f"got shapes {arrived.shape} and {deadline.shape}"
        )
    if not np.all(np.isfinite(arrived)):
        raise ValueError(f"arrived_at_s must be finite, got {arrived_at_s!r}")
    if np.any(np.isnan(deadline)):
        raise ValueError(f"deadline_s must be numbers, got {deadline_s!r}")
    # An instant is rounded, and so is the end of a batch that just meets its deadline: late on a clock, both are by
    # more than a small budget's own rounding.
    deadline = deadline + 4 * np.finfo(np.float64).eps * np.abs(deadline)
    order = np.argsort(arrived, kind="stable")
    return arrived[order], deadline[order]
