"""What a profile says in a few plain sentences: what more cores, larger batches and more lanes are worth.

Rules, and why they hold:

* Throughput and cost are judged by medians, deadlines by the tail, as the scheduler does.
* Whole cores are compared where there are any: nobody thinks in half cores first.
* A difference below a tenth is called none. Profiles are no more exact.
"""

from __future__ import annotations

import numpy as np

from sponge.profile.record import Cell, Profile

_SAME = 0.1


def findings(profile: Profile, percentile: float = 99) -> list[str]:
    """Return the sentences, the most useful first.

    Parameters
    ----------
    profile
        Any; what it does not hold is not spoken of.
    percentile
        Of the latency that deadlines are judged by, in (0, 100].
    """
    alone = [cell for cell in profile.cells if cell.lanes == 1]
    whole = [cell for cell in alone if cell.cores == int(cell.cores)] or alone
    if not whole:
        return []
    fewest = min(cell.cores for cell in whole)
    single = [cell for cell in whole if cell.batch_size == min(each.batch_size for each in whole)]
    lines = [_cores_are_worth(sorted(single, key=lambda cell: cell.cores))]
    lines += _batches_are_worth([cell for cell in whole if cell.cores == fewest])
    lines += _lanes_are_worth(profile, fewest)
    smallest = single[0].batch_size
    tails = [e for e in profile.estimates(percentile) if e.lanes == 1 and e.batch_size == smallest]
    best = min(tails, key=lambda estimate: (estimate.latency_s, estimate.cores))
    lines.append(
        f"Budgets below {_ms(best.latency_s)} cannot be kept for {percentile:g} % of the requests; the "
        f"p{percentile:g} is lowest on {_cores(best.cores)}."
    )
    return lines


def _cores_are_worth(single: list[Cell]) -> str:
    first, last = single[0], min(single, key=_median_s)
    line = (
        f"{_requests(first.batch_size).capitalize()} by itself takes {_ms(_median_s(first))} on {_cores(first.cores)}"
    )
    gain = _median_s(first) / _median_s(last)
    if last is first or gain < 1 + _SAME:
        more = [cell for cell in single if cell.cores > first.cores]
        return f"{line}, and no less on more." if more else f"{line}."
    return (
        f"{line}, {_ms(_median_s(last))} on {_cores(last.cores)}: {gain:.1f} times as fast on "
        f"{last.cores / first.cores:g} times the cores."
    )


def _batches_are_worth(cells: list[Cell]) -> list[str]:
    if len({cell.batch_size for cell in cells}) < 2:
        return []
    one = min(cells, key=lambda cell: cell.batch_size)
    best = min(cells, key=_cost_core_s)
    saved = 1 - _cost_core_s(best) / _cost_core_s(one)
    if saved < _SAME:
        largest = max(cells, key=lambda cell: cell.batch_size)
        return [
            f"Batches are not worth waiting for: {_core_ms(one)} a request one by one, "
            f"{_core_ms(largest)} in batches of {largest.batch_size}."
        ]
    return [
        f"Batches of {best.batch_size} cost {saved:.0%} less a request: {_core_ms(best)} instead of {_core_ms(one)}."
    ]


def _lanes_are_worth(profile: Profile, fewest: float) -> list[str]:
    """Compare several narrow lanes with one wide one on as many cores, at the best batch of each."""
    best: dict[tuple[int, float], float] = {}
    for cell in profile.cells:
        key = cell.lanes, cell.cores
        best[key] = max(best.get(key, 0.0), cell.lanes * cell.batch_size / _median_s(cell))
    lines = []
    for (lanes, cores), narrow_rps in sorted(best.items()):
        wide_rps = best.get((1, lanes * cores))
        if lanes == 1 or cores != fewest or wide_rps is None:
            continue
        side_by_side = f"{lanes} lanes of {_cores(cores)} serve {narrow_rps:,.0f} requests/s"
        one_wide = f"one lane of {_cores(lanes * cores)} {wide_rps:,.0f}"
        ratio = narrow_rps / wide_rps
        if ratio > 1 + _SAME:
            lines.append(f"Lanes pay: {side_by_side}, {one_wide}.")
        elif ratio < 1 - _SAME:
            lines.append(f"Lanes disturb each other here: {side_by_side}, {one_wide}.")
        else:
            lines.append(f"Lanes make no difference: {side_by_side}, {one_wide}.")
    return lines


def _median_s(cell: Cell) -> float:
    return float(np.median(cell.samples_s))


def _cost_core_s(cell: Cell) -> float:
    return _median_s(cell) * cell.cores / cell.batch_size


def _requests(count: int) -> str:
    return "a request" if count == 1 else f"a batch of {count}"


def _cores(count: float) -> str:
    return f"{count:g} core" if count == 1 else f"{count:g} cores"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _core_ms(cell: Cell) -> str:
    return f"{1e3 * _cost_core_s(cell):.3g} core-ms"
