"""From measured cells to a latency model: the fit, the monotone envelope, and a report of how good either is.

* Errors are relative. A plain least-squares fit serves the slowest cells only, and those are the allocations
  that a solver never chooses.
* The fit is robust (Huber), since one cell that met a disturbed host must not bend the whole surface.
* The four-term form is taken when it is good enough, because it smooths noise and extrapolates; the table
  otherwise, because it follows what was measured (cache effects, thread counts). `FitReport.explain` says
  which and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

MEAN_ERROR_LIMIT = 0.10
"""The four-term form is refused above this mean relative error. On published and own profiles it reaches 3 to
10 % where latency is close to linear in the batch size, and 11 % and more where caches or thread counts bend
it."""
WORST_ERROR_LIMIT = 0.30
"""... or above this error in any cell: a budget planned on that cell would be wrong by a third. Of both errors only
what is beyond the cells' `Estimate.scatter` counts."""
LINEAR_LANES_TOLERANCE = 0.05
"""Slowdowns by lane count are kept as one coefficient if it gives each this closely, else one by one."""
_HUBER = 1.345
_ITERATIONS = 50


@attrs.frozen(kw_only=True)
class Estimate:
    """A percentile of one cell's latency, with its 95 % confidence interval."""

    batch_size: int
    cores: float
    """Share of each busy lane [cores]."""
    lanes: int = 1
    """Lanes that were busy."""
    latency_s: float
    low_s: float
    high_s: float
    bounded: bool = True
    """False if there are too few samples for an upper end: ``high_s`` is then only the largest seen."""
    samples: int = 1
    scatter: float = 0.0
    """Half-width of the median's 95 % interval relative to the median: how much of an error may be chance."""
    pooled: bool = False
    """True if the tail was estimated together with similar cells, for want of samples."""


class Measured(Protocol):
    """What a fit needs of a profile."""

    def estimates(self, percentile: float = 99) -> Sequence[Estimate]:
        """Return a percentile of each cell, settled or not."""


@attrs.frozen(kw_only=True)
class CellFit:
    """One measured cell against its prediction."""

    batch_size: int
    cores: float
    lanes: int
    measured_s: float
    predicted_s: float
    weight: float
    """Weight of the cell in the four-term fit: 1 for a cell that fits, less for one taken for an outlier."""

    @property
    def relative_error(self) -> float:
        """``predicted / measured - 1``: above 0 where the prediction is cautious."""
        return self.predicted_s / self.measured_s - 1.0


@attrs.frozen(kw_only=True)
class FitReport:
    """How well a latency model agrees with the measurements that it was fitted to."""

    form: Literal["four-term", "table"]
    percentile: float
    cells: tuple[CellFit, ...]
    """Every cell against the chosen form."""
    four_term_mean_error: float
    """Mean absolute relative error of the four-term form, over the cells with one busy lane."""
    four_term_worst_error: float
    four_term_mean_excess: float
    """As the errors above, but only what is beyond the scatter of the runs: the form is judged by it."""
    four_term_worst_excess: float
    four_term_worst_cell: tuple[int, float]
    """(batch size, cores) of the worst cell."""
    pooled: int = 0
    """Cells whose tail was estimated together with similar cells."""

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error of the chosen form, over all cells."""
        return float(np.mean([abs(cell.relative_error) for cell in self.cells]))

    @property
    def worst_error(self) -> float:
        """Largest absolute relative error of the chosen form."""
        return max(abs(cell.relative_error) for cell in self.cells)

    def explain(self) -> str:
        """Say in a few lines which form was chosen, why, and how far off it is."""
        batch_size, cores = self.four_term_worst_cell
        four = (
            f"the four-term form is {self.four_term_mean_error:.1%} off the measured p{self.percentile:g} on "
            f"average, {self.four_term_worst_error:.1%} at worst (batch {batch_size} on {cores:g} cores)"
        )
        limits = (
            f"{self.four_term_mean_excess:.1%} and {self.four_term_worst_excess:.1%} of it beyond the scatter of the "
            f"runs, where {MEAN_ERROR_LIMIT:.0%} and {WORST_ERROR_LIMIT:.0%} are allowed"
        )
        if self.form == "four-term":
            lines = [f"Four-term latency model, as {four}; {limits}."]
        else:
            lines = [
                f"Latency table, as {four}; {limits}.",
                f"Interpolating the measured table is {self.mean_error:.1%} off on average, "
                f"{self.worst_error:.1%} at worst: what it took to make latency fall with the cores and rise "
                "with the batch size.",
            ]
        lanes = [cell for cell in self.cells if cell.lanes > 1]
        if lanes:
            off = np.mean([abs(cell.relative_error) for cell in lanes])
            lines.append(f"With several lanes busy ({len(lanes)} cells) it is {off:.1%} off on average.")
        outliers = sum(cell.weight < 0.5 for cell in self.cells)
        if outliers:
            lines.append(f"{outliers} of {len(self.cells)} cells were taken for outliers of the four-term form.")
        if self.pooled:
            lines.append(
                f"{self.pooled} cells have too few samples for a p{self.percentile:g} of their own; "
                "their tails were estimated together with cells of the same thread count."
            )
        return "\n".join(lines)


def fit_four_terms(
    batch_size: FloatArray, cores: FloatArray, latency_s: FloatArray
) -> tuple[tuple[float, float, float, float], FloatArray]:
    """Fit ``l = γ·b/c + ε/c + δ·b + η`` to measured latencies, robustly and by relative error.

    Written as ``(γ·(b − 1) + p)/c + δ·(b − 1) + q`` with p = γ + ε and q = δ + η, the parallel work of a
    batch of one must not be negative (p >= 0) while ε may be; the serial constant needs η >= 0.

    Parameters
    ----------
    batch_size, cores, latency_s
        Cells, each of shape ``(n_cells,)``; latencies [s] above 0.

    Returns
    -------
    (gamma_s, epsilon_s, delta_s, eta_s), weights
        Coefficients, and the Huber weight of each cell in (0, 1].

    Raises
    ------
    ValueError
        If there are no cells, or a latency is not above 0.

    References
    ----------
    P. J. Huber, Robust Statistics, 1981: iteratively reweighted least squares, k = 1.345, scale from the
    median absolute deviation.
    """
    if not latency_s.size or not np.all(latency_s > 0):
        raise ValueError(f"latency_s must hold at least one value and only values > 0, got {latency_s!r}")
    columns = np.stack([(batch_size - 1) / cores, 1 / cores, batch_size, np.ones_like(cores)], axis=1)
    relative = columns / latency_s[:, None]
    target = np.ones_like(latency_s)
    weights = np.ones_like(latency_s)
    solution = np.zeros(4)
    for _ in range(_ITERATIONS):
        root = np.sqrt(weights)
        before, solution = solution, nonnegative_least_squares(relative * root[:, None], target * root)
        residual = np.abs(relative @ solution - target)
        scale = max(1.4826 * float(np.median(residual)), 1e-9)
        weights = np.minimum(1.0, _HUBER * scale / np.maximum(residual, 1e-12))
        if np.allclose(before, solution, rtol=1e-9, atol=0):
            break
    gamma, parallel, delta, eta = (float(value) for value in solution)
    return (gamma, parallel - gamma, delta, eta), weights


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """Minimise ``|matrix @ x - target|`` over ``x >= 0``, exactly, for a handful of unknowns.

    The optimum is the plain least-squares solution on the unknowns that are not zero, so with four of them
    trying all 15 choices is both simple and exact.

    Parameters
    ----------
    matrix
        Shape ``(n_cells, n_unknowns)``.
    target
        Shape ``(n_cells,)``.
    """
    unknowns = matrix.shape[1]
    best, best_error = np.zeros(unknowns), float(target @ target)
    # more unknowns first: with fewer cells than unknowns several choices are equally good; take the fuller
    # one
    for size in range(unknowns, 0, -1):
        for chosen in itertools.combinations(range(unknowns), size):
            part = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            if np.any(part < 0):
                continue
            error = float(np.sum((matrix[:, chosen] @ part - target) ** 2))
            if error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(unknowns), error
                best[list(chosen)] = part
            if size == unknowns:
                return best  # nothing was held at zero: no smaller choice can be closer
    return best


def isotonic(values: FloatArray) -> FloatArray:
    """Return the closest non-decreasing sequence by relative error (pool adjacent violators on logarithms).

    Parameters
    ----------
    values
        Shape ``(n,)``, all > 0.
    """
    blocks: list[tuple[float, int]] = []
    for value in np.log(values):
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (right, n_right), (left, n_left) = blocks.pop(), blocks.pop()
            blocks.append(((left * n_left + right * n_right) / (n_left + n_right), n_left + n_right))
    return np.asarray(np.exp(np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])))


def monotone_envelope(latency_s: FloatArray) -> FloatArray:
    """Make a measured grid rise with the batch size and fall with the cores.

    Along the batch size violations are noise, and averaged. Along the cores they are real (just above a whole
    number of cores more can be slower) and harmless, since fewer cores may always be used: the lowest latency
    at or below an allocation is what it offers.

    Parameters
    ----------
    latency_s
        Shape ``(n_batch_sizes, n_cores)``, both ascending; all > 0 and finite.
    """
    rising = np.stack([isotonic(column) for column in latency_s.T], axis=1)
    return np.asarray(np.minimum.accumulate(rising, axis=1))


def complete_grid(
    batch_size: FloatArray, cores: FloatArray, latency_s: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Arrange cells on the grid of all their batch sizes and cores, and fill those that were not measured.

    A missing cell gets the latency of the next larger allocation, stretched as if all its work were spread
    over the cores: what it would take at worst. Without a larger one it gets the next smaller one's.

    Parameters
    ----------
    batch_size, cores, latency_s
        Cells, each of shape ``(n_cells,)``, each pair of batch size and cores once.

    Returns
    -------
    batch_sizes, cores, table_s
        Axes, ascending, and latencies of shape ``(n_batch_sizes, n_cores)`` [s].
    """
    rows, row = np.unique(batch_size, return_inverse=True)
    columns, column = np.unique(cores, return_inverse=True)
    table = np.full((rows.size, columns.size), np.nan)
    table[row, column] = latency_s
    for line in table:
        for k in range(columns.size - 2, -1, -1):
            if np.isnan(line[k]):
                line[k] = line[k + 1] * columns[k + 1] / columns[k]
        for k in range(1, columns.size):
            if np.isnan(line[k]):
                line[k] = line[k - 1]
    return rows, columns, table


def fit_lanes(estimates: Sequence[Estimate]) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return how several busy lanes slow each other: one coefficient if it is linear, else a factor per lane
    count.

    Each cell with several lanes busy is compared with the same cell measured alone; the median over the cells
    of a lane count counts, made to rise with the lanes.

    Returns
    -------
    interference, lane_factors
        As `LatencyModel` takes them; one of them is empty.
    """
    alone = {(cell.batch_size, cell.cores): cell.latency_s for cell in estimates if cell.lanes == 1}
    ratios: dict[int, list[float]] = {}
    for cell in estimates:
        if cell.lanes > 1 and (cell.batch_size, cell.cores) in alone:
            ratio = cell.latency_s / alone[cell.batch_size, cell.cores]
            ratios.setdefault(cell.lanes, []).append(ratio)
    if not ratios:
        return 0.0, ()
    lanes = np.array(sorted(ratios), dtype=np.float64)
    factors = np.maximum(isotonic(np.array([np.median(ratios[int(k)]) for k in lanes])), 1.0)
    extra = lanes - 1
    interference = float(extra @ (factors - 1) / (extra @ extra))
    if np.all(np.abs(1 + interference * extra - factors) <= LINEAR_LANES_TOLERANCE * factors):
        return interference, ()
    return 0.0, tuple((int(k), float(factor)) for k, factor in zip(lanes, factors, strict=True))
