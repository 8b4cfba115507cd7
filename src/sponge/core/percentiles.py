"""Percentiles of measured latencies with honest uncertainty, also from few samples.

Two facts shape this module. The largest of n samples lies above the 99th percentile only with probability
``1 - 0.99**n``: below 368 samples a p99 has no distribution-free upper bound at 95 %, and the estimate says so. And a
p99 taken from 20 samples is their maximum, so that which cells look slow would be a matter of which met a straggler;
such a cell borrows the shape of its tail from cells that are alike, and keeps its own median.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sponge.core.fitting import Estimate

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
OWN_TAIL_SAMPLES = 3.0
"""A cell with fewer samples than this expected beyond the percentile borrows from others (p99: 300 samples)."""
_ALIKE = math.log(2.0)


class Samples(Protocol):
    """A measured cell."""

    @property
    def batch_size(self) -> int:
        """Rows of a run."""

    @property
    def cores(self) -> float:
        """Share of each busy lane [cores]."""

    @property
    def lanes(self) -> int:
        """Lanes that were busy."""

    @property
    def threads(self) -> int:
        """Intra-op threads of a run."""

    @property
    def samples_s(self) -> Sequence[float]:
        """Latencies [s]."""


@functools.lru_cache(maxsize=4096)
def order_statistic_ranks(samples: int, percentile: float) -> tuple[int, int, bool]:
    """Return the ranks between which a percentile lies with 95 % confidence, whatever the distribution.

    Parameters
    ----------
    samples
        Number of independent samples, >= 1.
    percentile
        Above 0 and below 100.

    Returns
    -------
    low, high, bounded
        Indices into the sorted samples, and whether *high* really is an upper bound: with too few samples it is
        the largest, and the percentile may be beyond.

    References
    ----------
    H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed., section 7.1: the number of samples below a quantile
    is binomial.
    """
    quantile = percentile / 100
    below = np.arange(samples + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    mass = np.exp(log_choose + below * math.log(quantile) + (samples - below) * math.log1p(-quantile))
    cumulative = np.cumsum(mass)
    tail = (1 - CONFIDENCE) / 2
    low = max(int(np.searchsorted(cumulative, tail, side="right")) - 1, 0)
    high = int(np.searchsorted(cumulative, 1 - tail))
    return low, min(high, samples - 1), high < samples


def percentile_interval(sorted_s: FloatArray, percentile: float) -> tuple[float, float, float, bool]:
    """Return a percentile of sorted samples, its 95 % interval, and whether the upper end is a bound.

    Parameters
    ----------
    sorted_s
        Latencies, ascending, shape ``(n_samples,)`` [s].
    percentile
        Above 0 and below 100.

    Returns
    -------
    latency_s, low_s, high_s, bounded
        The interval always contains the estimate.
    """
    low, high, bounded = order_statistic_ranks(sorted_s.size, percentile)
    value = float(np.percentile(sorted_s, percentile, method="median_unbiased"))
    return value, min(float(sorted_s[low]), value), max(float(sorted_s[high]), value), bounded


def estimate_cells(cells: Sequence[Samples], percentile: float) -> tuple[Estimate, ...]:
    """Return a percentile of every cell, with borrowed tails where a cell has too few samples for its own.

    The borrowed tail is the ratio of the percentile to the median over all samples, each divided by its cell's
    median, of cells with the same thread count and the same sharing (alone or not), weighted by how close their
    medians are: a cell twice as slow counts 0.6, one four times as slow 0.14. Distance matters because stalls last
    as long as they last, whatever the batch they hit.

    Parameters
    ----------
    cells
        Measured cells, each with at least one sample.
    percentile
        Above 0 and below 100; at 50 and below nothing is borrowed.

    Raises
    ------
    ValueError
        If *percentile* is out of range.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"percentile must be above 0 and below 100, got {percentile!r}")
    sorted_s = [np.sort(np.asarray(cell.samples_s, np.float64)) for cell in cells]
    medians = [float(np.median(values)) for values in sorted_s]
    kinds = [(cell.threads, cell.lanes > 1) for cell in cells]
    result = []
    for at, cell in enumerate(cells):
        latency, low, high, bounded = percentile_interval(sorted_s[at], percentile)
        trust = sorted_s[at].size * (1 - percentile / 100) / OWN_TAIL_SAMPLES
        alike = [k for k, kind in enumerate(kinds) if kind == kinds[at]]
        pooled = trust < 1 and percentile > 50 and len(alike) > 1
        if pooled:
            weights = [math.exp(-0.5 * (math.log(medians[k] / medians[at]) / _ALIKE) ** 2) for k in alike]
            ratio = _weighted_quantile(
                np.concatenate([sorted_s[k] / medians[k] for k in alike]),
                np.repeat(weights, [sorted_s[k].size for k in alike]),
                percentile / 100,
            )
            latency = latency**trust * (medians[at] * ratio) ** (1 - trust)
        _, median_low, median_high, _ = percentile_interval(sorted_s[at], 50)
        result.append(
            Estimate(
                batch_size=cell.batch_size,
                cores=cell.cores,
                lanes=cell.lanes,
                latency_s=latency,
                low_s=min(low, latency),
                high_s=max(high, latency),
                bounded=bounded,
                samples=int(sorted_s[at].size),
                scatter=max(median_high - medians[at], medians[at] - median_low) / medians[at],
                pooled=pooled,
            )
        )
    return tuple(result)


def _weighted_quantile(values: FloatArray, weights: FloatArray, quantile: float) -> float:
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    centre = (np.cumsum(weights) - 0.5 * weights) / weights.sum()
    return float(np.interp(quantile, centre, values))
