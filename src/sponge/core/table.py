"""The latency table: predictions interpolated from measurements, and when it is used."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core import fitting
from sponge.core.fitting import CellFit, Estimate, FitReport
from sponge.core.four_terms import FloatArray, LatencyModel, check
from sponge.core.values import ONE_THREAD_BELOW_CORES

_READY_BATCH_SIZES = 64
_LAST_OF_ONE_THREAD = math.nextafter(ONE_THREAD_BELOW_CORES, 0.0)


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _float_rows(rows: Iterable[Iterable[Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(_floats, rows))


@attrs.frozen
class LatencyTable(LatencyModel):
    """Latency interpolated from measurements, for a model that the four-term form does not describe.

    The four terms of the base class are kept as the best fit of that form; predictions do not use them.

    * Between measured cores, linear in ``1/cores`` (exact for Amdahl's law); between batch sizes, linear.
    * From a whole core up to where a second thread is used (`ONE_THREAD_BELOW_CORES`) latency is flat: one
      thread cannot use more than one core.
    * Below the fewest cores measured, as ``1/cores``; above the most, no better than there.
    * Above the largest batch measured, linear with the last slope or the mean slope, whichever is steeper;
      below the smallest, as the smallest.

    Parameters
    ----------
    batch_sizes, cores
        The grid, ascending; shapes ``(n_batch_sizes,)`` and ``(n_cores,)``.
    table_s
        Latency with one busy lane [s], shape ``(n_batch_sizes, n_cores)``: must not fall along the batch
        sizes nor rise along the cores (`fitting.monotone_envelope` makes it so).

    Raises
    ------
    ValueError
        As `LatencyModel`; and if the grid is empty, not ascending or not monotone.
    """

    batch_sizes: tuple[float, ...] = attrs.field(kw_only=True, converter=_floats)
    cores: tuple[float, ...] = attrs.field(kw_only=True, converter=_floats)
    table_s: tuple[tuple[float, ...], ...] = attrs.field(kw_only=True, converter=_float_rows)
    _shares: list[float] = attrs.field(init=False, repr=False, eq=False)
    _knots: FloatArray = attrs.field(init=False, repr=False, eq=False)
    _axis: FloatArray = attrs.field(init=False, repr=False, eq=False)
    _table: FloatArray = attrs.field(init=False, repr=False, eq=False)
    _ready: FloatArray = attrs.field(init=False, repr=False, eq=False)
    _rows: list[list[float]] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        axis, knots, table = np.array(self.batch_sizes), np.array(self.cores), np.array(self.table_s)
        for name, grid, least in (("batch_sizes", axis, 1.0), ("cores", knots, 1e-6)):
            fine = grid.size and grid[0] >= least and np.all(np.diff(grid) > 0) and np.isfinite(grid[-1])
            check(bool(fine), name, f"ascending, from {least:g}", getattr(self, name))
        if table.shape != (axis.size, knots.size):
            raise ValueError(f"table_s must have shape {(axis.size, knots.size)}, got {table.shape}")
        monotone = np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) <= 0)
        fine = monotone and np.all(table > 0) and np.all(np.isfinite(table))
        check(fine, "table_s", "> 0, not falling with the batch nor rising with the cores", self.table_s)
        axis, table = _beyond_the_largest_batch(axis, table)
        knots, table = _flat_on_one_thread(knots, table)
        prepared: dict[str, Any] = {
            "_axis": axis,
            "_table": table,
            "_knots": knots,
            "_shares": knots.tolist(),
        }
        for name, value in prepared.items():
            object.__setattr__(self, name, value)
        ready = self._interpolate_rows(np.arange(1.0, _READY_BATCH_SIZES + 1))
        object.__setattr__(self, "_ready", ready)
        object.__setattr__(self, "_rows", ready.tolist())

    def _interpolate_rows(self, batch_size: FloatArray) -> FloatArray:
        """Latency at each knot, shape ``batch_size.shape + (n_knots,)``."""
        axis, table = self._axis, self._table
        low = np.clip(np.searchsorted(axis, batch_size, side="right") - 1, 0, axis.size - 2)
        part = np.maximum((batch_size - axis[low]) / (axis[low + 1] - axis[low]), 0.0)[..., None]
        return np.asarray(table[low] + part * (table[low + 1] - table[low]))

    def _rows_for(self, batch_size: FloatArray) -> FloatArray:
        """As `_interpolate_rows`; small whole batch sizes, the solver's usual question, are ready made."""
        index = batch_size.astype(np.int64)
        if index.size and index.min() >= 1 and index.max() <= _READY_BATCH_SIZES and np.all(index == batch_size):
            return np.asarray(self._ready[index - 1])
        return self._interpolate_rows(batch_size)

    def _row_for(self, batch_size: float) -> list[float]:
        if batch_size <= _READY_BATCH_SIZES and batch_size == int(batch_size):
            return self._rows[int(batch_size) - 1]
        row: list[float] = self._interpolate_rows(np.array(batch_size)).tolist()
        return row

    def _latency_scalar(self, batch_size: float, cores: float) -> float:
        row, shares = self._row_for(batch_size), self._shares
        if cores <= shares[0]:
            return row[0] * (shares[0] / cores)
        high = bisect_right(shares, cores)
        if high == len(shares):
            return row[-1]
        return float(_between(1 / cores, 1 / shares[high - 1], 1 / shares[high], row[high - 1], row[high]))

    def _latency_array(self, batch_size: FloatArray, cores: FloatArray) -> FloatArray:
        batch_size, cores = np.broadcast_arrays(batch_size, cores)
        rows, knots = self._rows_for(batch_size), self._knots
        high = np.clip(np.searchsorted(knots, cores, side="right"), 1, knots.size - 1)
        slow, fast = _pair(rows, high)
        inside = np.clip(cores, knots[0], knots[-1])
        latency = _between(1 / inside, 1 / knots[high - 1], 1 / knots[high], slow, fast)
        return np.asarray(latency * np.maximum(knots[0] / cores, 1.0))

    def _cores_scalar(self, batch_size: float, latency_s: float) -> float:
        row, shares = self._row_for(batch_size), self._shares
        if latency_s >= row[0]:
            return shares[0] * (row[0] / latency_s)
        if not latency_s >= row[-1]:
            return math.inf
        high = next(k for k, value in enumerate(row) if value <= latency_s)
        slow, fast = shares[high - 1], shares[high]
        if slow == _LAST_OF_ONE_THREAD or row[high] == latency_s:
            return fast
        return float(1 / _between(latency_s, row[high - 1], row[high], 1 / slow, 1 / fast))

    def _cores_array(self, batch_size: FloatArray, latency_s: FloatArray) -> FloatArray:
        batch_size, latency_s = np.broadcast_arrays(batch_size, latency_s)
        rows, knots = self._rows_for(batch_size), self._knots
        enough = (rows > latency_s[..., None]).sum(axis=-1)  # first knot that is fast enough
        high = np.clip(enough, 1, knots.size - 1)
        slow, fast = _pair(rows, high)
        target = np.clip(latency_s, fast, slow)
        slow = np.where(slow > fast, slow, fast + 1.0)  # unused, but not to be divided by
        cores = 1 / _between(target, slow, fast, 1 / knots[high - 1], 1 / knots[high])
        jump = (knots[high - 1] == _LAST_OF_ONE_THREAD) | (target == fast)
        cores = np.where(jump, knots[high], cores)
        below = knots[0] * (rows[..., 0] / np.where(enough == 0, latency_s, 1.0))
        return np.asarray(np.where(enough == 0, below, np.where(latency_s >= rows[..., -1], cores, np.inf)))


def _between(x: Any, x0: Any, x1: Any, y0: Any, y1: Any) -> Any:
    """Interpolate linearly, counting from the second point, which is met exactly."""
    return y1 + (x - x1) / (x0 - x1) * (y0 - y1)


def _pair(rows: FloatArray, high: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Latency at the knots below and at *high*."""
    at = high[..., None]
    return np.take_along_axis(rows, at - 1, -1)[..., 0], np.take_along_axis(rows, at, -1)[..., 0]


def _beyond_the_largest_batch(axis: FloatArray, table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Add a row at twice the largest batch size, which sets the slope of everything beyond."""
    if axis.size == 1:
        slope = table[0] / axis[0]
    else:
        last = (table[-1] - table[-2]) / (axis[-1] - axis[-2])
        mean = (table[-1] - table[0]) / (axis[-1] - axis[0])
        slope = np.maximum(last, mean)
    # a slope that rose with the cores would, far enough out, make more cores slower
    slope = np.maximum.accumulate(slope[::-1])[::-1]
    return np.append(axis, 2 * axis[-1]), np.vstack([table, table[-1] + slope * axis[-1]])


def _flat_on_one_thread(knots: FloatArray, table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Keep latency flat from the last allocation of one thread to the first of two; 2 knots at least."""
    if knots.size == 1:
        return np.append(knots, 2 * knots), np.hstack([table, table])
    two = int(np.searchsorted(knots, ONE_THREAD_BELOW_CORES))
    if two == knots.size or two == 0 or not 1 <= knots[two - 1] < _LAST_OF_ONE_THREAD:
        return knots, table
    fewer, more = knots[two - 1], knots[two]
    first = _between(1 / ONE_THREAD_BELOW_CORES, 1 / fewer, 1 / more, table[:, two - 1], table[:, two])
    added = np.stack([table[:, two - 1], first], axis=1)[:, : 1 if more == ONE_THREAD_BELOW_CORES else 2]
    shares = [_LAST_OF_ONE_THREAD, ONE_THREAD_BELOW_CORES][: added.shape[1]]
    return np.insert(knots, two, shares), np.hstack([table[:, :two], added, table[:, two:]])


def fit_latency(estimates: Sequence[Estimate], percentile: float) -> LatencyModel:
    """Fit both forms and keep the simpler one if it is good enough."""
    alone = [cell for cell in estimates if cell.lanes == 1]
    if not alone:
        raise ValueError("profile must hold at least one cell measured with one lane busy")
    batch_size = np.array([cell.batch_size for cell in alone], np.float64)
    cores = np.array([cell.cores for cell in alone], np.float64)
    measured = np.array([cell.latency_s for cell in alone], np.float64)
    terms, weights = fitting.fit_four_terms(batch_size, cores, measured)
    interference, lane_factors = fitting.fit_lanes(estimates)
    model = LatencyModel(*terms, interference=interference, lane_factors=lane_factors)
    errors = np.abs(model.latency_s(batch_size, cores) / measured - 1)
    mean, worst = float(errors.mean()), float(errors.max())
    # a table of few runs follows their scatter: only what is beyond it speaks against the smoother form
    excess = np.maximum(errors - np.array([cell.scatter for cell in alone]), 0.0)
    good = excess.mean() <= fitting.MEAN_ERROR_LIMIT and excess.max() <= fitting.WORST_ERROR_LIMIT
    if not good:
        batches, shares, table = fitting.complete_grid(batch_size, cores, measured)
        model = LatencyTable(
            *terms,
            interference=interference,
            lane_factors=lane_factors,
            batch_sizes=batches,
            cores=shares,
            table_s=fitting.monotone_envelope(table),
        )
    weight = {(cell.batch_size, cell.cores): float(w) for cell, w in zip(alone, weights, strict=True)}
    worst_cell = alone[int(errors.argmax())]
    report = FitReport(
        form="four-term" if good else "table",
        percentile=percentile,
        cells=tuple(
            CellFit(
                batch_size=cell.batch_size,
                cores=cell.cores,
                lanes=cell.lanes,
                measured_s=cell.latency_s,
                predicted_s=model.latency_s(cell.batch_size, cell.cores, cell.lanes),
                weight=weight[cell.batch_size, cell.cores] if cell.lanes == 1 else 1.0,
            )
            for cell in estimates
        ),
        four_term_mean_error=mean,
        four_term_worst_error=worst,
        four_term_mean_excess=float(excess.mean()),
        four_term_worst_excess=float(excess.max()),
        four_term_worst_cell=(worst_cell.batch_size, worst_cell.cores),
        pooled=sum(cell.pooled for cell in estimates),
    )
    return attrs.evolve(model, report=report)
