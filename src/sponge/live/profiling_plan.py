"""Which cells a profile is made of, and when each of them has been measured enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sponge.core.percentiles import percentile_interval

BATCH_SIZES = (1, 2, 4, 8, 16)
SMALL_SHARES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SETTLED_TAIL_RUNS = 1_000
"""Runs of one thread count from which its cells may borrow a tail; fewer leave them unsettled."""
SETTLED_OWN_RUNS = 20


class OpenCell:
    """A cell while it is measured."""

    def __init__(self, batch_size: int, cores: float, lanes: int, threads: int, expected_s: float) -> None:
        self.batch_size = batch_size
        self.cores = cores
        self.lanes = lanes
        self.threads = threads
        self.expected_s = expected_s
        self.samples_s: list[float] = []
        self.settled = False

    def __str__(self) -> str:
        lanes = f", {self.lanes} lanes busy" if self.lanes > 1 else ""
        return f"batch {self.batch_size} on {self.cores:g} cores{lanes}"

    @property
    def essential(self) -> bool:
        """Whether a profile is of little use without it: a request on its own, on whole cores."""
        return self.batch_size == 1 and self.lanes == 1 and self.cores >= 1

    @property
    def latency_s(self) -> float:
        """Median so far, or what is expected [s]."""
        return float(np.median(self.samples_s)) if self.samples_s else self.expected_s

    @property
    def spent_s(self) -> float:
        """Time spent on it [s]."""
        return sum(self.samples_s) / self.lanes

    def runs_for(self, time_s: float) -> int:
        """Runs of each lane that a visit of *time_s* makes: at least one, and at most 20 lest rounds become long."""
        return min(max(round(time_s / self.latency_s), 1), 20)


def visit_time(budget_s: float, cells: int) -> float:
    """Time of one visit [s]: eight rounds if all cells were equally fast, so that drift spreads over all of them."""
    return min(max(budget_s / (8 * cells), 0.02), 0.5)


def default_shares(max_cores: float, *, whole: bool) -> list[float]:
    """Return the shares of a lane worth measuring, ascending: close together where few cores are, and the maximum."""
    shares = [share for share in SMALL_SHARES if share <= max_cores]
    share = 2 * SMALL_SHARES[-1]
    while share <= max_cores:
        shares.append(share)
        share *= 2
    return sorted({share for share in [*shares, float(max_cores)] if not whole or share == int(share)})


def default_lanes(max_cores: float) -> list[int]:
    """Return the lane counts worth measuring: powers of two of which each lane gets a core."""
    return [2**k for k in range(int(max_cores).bit_length()) if 2**k <= max(max_cores, 1)]


def grid(
    batch_sizes: Sequence[int], shares: Sequence[float], lanes: Sequence[int], max_cores: float
) -> list[tuple[int, float, int]]:
    """Return the cells as (batch size, cores of a lane, busy lanes).

    Alone, every batch size on every share. With several lanes busy, the smallest and a middle batch size on one core
    and on the largest share that fits: enough for how much they slow each other.
    """
    cells = [(size, share, 1) for size in batch_sizes for share in shares]
    some_sizes = sorted({batch_sizes[0], batch_sizes[len(batch_sizes) // 2]})
    for count in lanes:
        fitting = [share for share in shares if count * share <= max_cores + 1e-9]
        if count > 1 and fitting:
            some_shares = sorted({min(fitting, key=lambda share: abs(share - 1.0)), fitting[-1]})
            cells += [(size, share, count) for size in some_sizes for share in some_shares]
    return cells


def expected_latency(one_core_s: float, all_cores_s: float, all_cores: float) -> Callable[[int, float], float]:
    """Return a first guess of the latency of (batch size, cores) from that of a single request on one and all cores.

    Work grows with the batch size at most; over the cores, Amdahl's law through both points; below one core in
    proportion to the share.
    """

    def guess(batch_size: int, cores: float) -> float:
        if cores <= 1 or all_cores <= 1:
            return batch_size * one_core_s / min(cores, 1.0)
        part = (1 / min(cores, all_cores) - 1 / all_cores) / (1 - 1 / all_cores)
        return batch_size * (all_cores_s + part * max(one_core_s - all_cores_s, 0.0))

    return guess


def affordable(cells: Iterable[OpenCell], budget_s: float, min_samples: int) -> tuple[list[OpenCell], list[OpenCell]]:
    """Part the cells into those that fit into a time, each measured *min_samples* times, and those that do not.

    The slowest go first. Cells that are `OpenCell.essential` stay.
    """
    kept = sorted(cells, key=lambda cell: (not cell.essential, cell.expected_s))
    dropped: list[OpenCell] = []
    needed_s = sum(cell.expected_s for cell in kept) * min_samples
    while needed_s > budget_s and kept and not kept[-1].essential:
        dropped.append(kept.pop())
        needed_s -= dropped[-1].expected_s * min_samples
    return kept, dropped


def is_settled(cell: OpenCell, tail_runs: int, *, percentile: float, relative_error: float, max_samples: int) -> bool:
    """Tell whether a cell has been measured enough.

    Parameters
    ----------
    cell
        With its samples so far.
    tail_runs
        Runs of all cells with its thread count.
    percentile, relative_error, max_samples
        As `Profiler`'s.
    """
    if len(cell.samples_s) >= max_samples:
        return True
    values = np.sort(np.array(cell.samples_s))
    value, low, high, bounded = percentile_interval(values, percentile)
    if bounded and max(high - value, value - low) <= relative_error * value:
        return True
    if values.size < SETTLED_OWN_RUNS or tail_runs < SETTLED_TAIL_RUNS:
        return False
    value, low, high, bounded = percentile_interval(values, 50)
    return bounded and max(high - value, value - low) <= relative_error / 2 * value
