"""What throughput costs at the least: cores against requests per second, the lower convex envelope of all that lanes
can do.

A lane that runs a batch of ``b`` on ``n`` cores serves ``b / l(b, n)`` requests per second, if the batch is full, and
occupies ``n`` cores. Whatever mixture of batches, widths and pauses lanes run over time, their average lies on or
above the envelope, so that a cost read off it is never too high. Lanes side by side add up: their common envelope is
the infimal convolution of theirs, which sorts the pieces of all by slope.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency

FloatArray: TypeAlias = npt.NDArray[np.float64]

_FINENESS = 1e-3
"""Ratio by which neighbouring widths differ where any share of a core is allowed; the envelope is lower than the true
one by at most as much."""
_SAME_RPS = 1e-9
"""Throughputs that differ by less, as a share of the highest, are the same."""


@attrs.frozen(kw_only=True, eq=False)
class Widths:
    """Cores that a running batch may have, as pairs: no batch is faster than on ``speed_cores``, nor cheaper than
    ``cost_cores``; shapes ``(n_widths,)``.

    The two are equal where cores come in steps. Otherwise each pair stands for all widths between the two.
    """

    cost_cores: FloatArray
    speed_cores: FloatArray

    @classmethod
    def between(cls, min_cores: float, max_cores: float, core_step: float | None) -> Widths:
        """Return the widths from *min_cores* to *max_cores* in steps [cores]; ``None``: any share."""
        if core_step is not None:
            count = math.floor((max_cores - min_cores) / core_step + 1e-9) + 1
            steps = np.minimum(min_cores + core_step * np.arange(count), max_cores)
            return cls(cost_cores=steps, speed_cores=steps)
        count = math.ceil(math.log(max_cores / min_cores) / _FINENESS) + 1
        grid = np.geomspace(min_cores, max_cores, count) if count > 1 else np.array([min_cores])
        return cls(cost_cores=np.concatenate([grid[:1], grid[:-1]]), speed_cores=grid)


@attrs.frozen(kw_only=True, eq=False)
class Limits:
    """What batches take, and what they may have."""

    latency: Latency
    widths: Widths
    max_cores: float
    """All lanes together."""
    max_batch_size: int

    @property
    def full_speed_s(self) -> FloatArray:
        """Latency of each batch size, from 1 on, alone on the widest lane [s], shape ``(max_batch_size,)``."""
        sizes = np.arange(1, self.max_batch_size + 1, dtype=np.float64)
        return self.latency.latency_s(sizes, float(self.widths.speed_cores[-1]))


@attrs.frozen(kw_only=True, eq=False)
class Envelope:
    """Least cores against throughput: piecewise linear, convex, from (0, 0); shapes ``(n_knots,)``."""

    rps: FloatArray
    """Knots, ascending [1/s]."""
    cores: FloatArray
    """Least cores there, ascending [cores]."""

    @property
    def max_rps(self) -> float:
        """No lanes within the limits serve more [1/s]."""
        return float(self.rps[-1])

    @property
    def slopes(self) -> FloatArray:
        """Price of one request more on each piece [core·s], ascending, shape ``(n_knots - 1,)``."""
        return np.asarray(np.diff(self.cores) / np.diff(self.rps))

    def cores_at(self, rps: FloatArray) -> FloatArray:
        """Return the least cores for throughputs; beyond what is possible the last piece goes on."""
        beyond = np.maximum(rps - self.max_rps, 0.0)
        return np.asarray(np.interp(rps, self.rps, self.cores) + (self.slopes[-1] * beyond if len(self.rps) > 1 else 0))


def lower_envelope(rps: FloatArray, cores: FloatArray) -> Envelope:
    """Return the lower convex envelope of points and of doing nothing, (0, 0), for throughputs up to the highest.

    Serving less than one could is allowed, so that points with less throughput at more cores do not count. Throughputs
    are rounded up by a billionth of the highest: points that differ by rounding alone would make pieces of any slope.
    """
    unit_rps = _SAME_RPS * float(np.max(rps))
    rps = np.ceil(rps / unit_rps - 0.01) * unit_rps
    order = np.lexsort((cores, rps))
    hull: list[tuple[float, float]] = [(0.0, 0.0)]
    for x, y in zip(rps[order].tolist(), cores[order].tolist(), strict=True):
        if x == hull[-1][0]:
            continue  # the first of equal throughputs is the cheapest
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    knots = np.array(hull)
    return Envelope(rps=knots[:, 0], cores=knots[:, 1])


def lane_envelope(limits: Limits, *, neighbours: int = 0, unpaid_cores: float = 0.0) -> Envelope:
    """Return the envelope of one lane.

    Parameters
    ----------
    limits
        What a batch may be.
    neighbours
        Lanes that were busy already when a batch of this one starts, and slow it down.
    unpaid_cores
        Cores that are allocated anyway, and are not charged to a running batch.
    """
    sizes = np.arange(1, limits.max_batch_size + 1, dtype=np.float64)
    rps = limits.latency.throughput_rps(sizes[:, None], limits.widths.speed_cores[None, :], neighbours + 1)
    cores = np.broadcast_to(np.maximum(limits.widths.cost_cores - unpaid_cores, 0.0), rps.shape)
    return lower_envelope(rps.ravel(), cores.ravel())


def side_by_side(lanes: list[Envelope], max_cores: float) -> Envelope:
    """Return the common envelope of lanes that share *max_cores*: the cheapest pieces of all come first."""
    rps = np.concatenate([np.diff(lane.rps) for lane in lanes])
    cores = np.concatenate([np.diff(lane.cores) for lane in lanes])
    order = np.argsort(cores / rps, kind="stable")
    total_rps = np.concatenate([[0.0], np.cumsum(rps[order])])
    total_cores = np.concatenate([[0.0], np.cumsum(cores[order])])
    within = int(np.searchsorted(total_cores, max_cores * (1 + 1e-12), side="right"))
    if within == len(total_cores):
        return Envelope(rps=total_rps, cores=total_cores)
    piece_rps, piece_cores = rps[order][within - 1], cores[order][within - 1]
    left_cores = max_cores - total_cores[within - 1]
    kept_rps, kept_cores = total_rps[:within], total_cores[:within]
    if left_cores <= 1e-12 * max_cores:
        return Envelope(rps=kept_rps, cores=kept_cores)
    last_rps = kept_rps[-1] + piece_rps * left_cores / piece_cores
    return Envelope(rps=np.append(kept_rps, last_rps), cores=np.append(kept_cores, max_cores))


def request_core_s(limits: Limits, budgets_s: FloatArray, *, unpaid_cores: float = 0.0) -> FloatArray:
    """Return the fewest core-seconds that a request can cost, as its share of a batch that fits into its budget.

    A batch of ``b`` that takes a time ``T`` makes a progress of ``1 / T`` on average, and so needs
    ``T·p(1 / T) / b`` core-seconds for each request, where ``p`` is the envelope of progress ``1 / l(b, n)``
    against ``n``: this also allows batches that are resized while they run. It falls with ``T``, so that ``T`` is
    the whole budget.

    Parameters
    ----------
    limits
        What a batch may be.
    budgets_s
        Time from arrival to deadline [s], > 0, ``inf`` allowed; any shape.
    unpaid_cores
        As for `lane_envelope`.

    Returns
    -------
    ndarray
        Core-seconds, shape of *budgets_s*; ``inf`` where no batch is fast enough.
    """
    least = np.full(np.shape(budgets_s), np.inf)
    charged = np.maximum(limits.widths.cost_cores - unpaid_cores, 0.0)
    for batch_size in range(1, limits.max_batch_size + 1):
        progress = 1.0 / limits.latency.latency_s(float(batch_size), limits.widths.speed_cores)
        envelope = lower_envelope(progress, charged)
        taken_s = np.minimum(budgets_s, 1.0 / envelope.rps[1])
        # A budget that is met by no more than rounding is met.
        needed = np.where(taken_s * envelope.max_rps >= 1.0 - 1e-9, 1.0 / taken_s, np.inf)
        cost = taken_s * np.interp(needed, envelope.rps, envelope.cores) / batch_size
        least = np.minimum(least, np.where(np.isfinite(needed), cost, np.inf))
    return least


def _turns_down(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Say whether *middle* lies on or above the line from *first* to *last*."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])
