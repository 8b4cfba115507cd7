"""The picture of a comparison: budgets, cores and misses over time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from sponge.measure.report import Allocation, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@attrs.frozen(kw_only=True)
class Series:
    """One policy's run, for the picture."""

    policy: str
    outcomes: Sequence[Outcome]
    allocation: Allocation


def misses_per_bin(outcomes: Sequence[Outcome], edges_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Count the missed deadlines by the second in which the request arrived, shape ``(n_edges - 1,)``."""
    missed_at = [outcome.arrived_at for outcome in outcomes if not outcome.met]
    return np.histogram(missed_at, edges_s)[0].astype(np.int64)


def save_figure(path: str | os.PathLike[str], series: Sequence[Series], *, title: str = "") -> None:
    """Draw the runs one below the other: budget left at arrival, cores allocated, deadlines missed per
    second.

    Parameters
    ----------
    path
        Where to write; the suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
    series
        The policies' runs of one workload.
    title
        Headline; the settings of the run belong here.

    Raises
    ------
    ImportError
        If matplotlib is not installed; the message names the extra that brings it.
    ValueError
        If there is no run, or a run without requests, or the suffix is unknown to matplotlib.
    """
    if not series or not all(run.outcomes for run in series):
        raise ValueError("series must hold at least one run, each with outcomes")
    figure_class = _figure_class()
    figure = figure_class(figsize=(9, 8), layout="constrained")
    budget_axes, cores_axes, miss_axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.4, 1]})
    _draw_budgets(budget_axes, series[0].outcomes)
    end_s = max(run.allocation.end_s for run in series)
    edges_s = np.arange(np.ceil(end_s) + 1)
    width = 0.8 / len(series)
    for index, run in enumerate(series):
        colour = f"C{index}"
        steps = np.append(run.allocation.cores, run.allocation.cores[-1])
        times = np.append(run.allocation.times_s, run.allocation.end_s)
        label = f"{run.policy}: {run.allocation.mean_cores:.2f} on average"
        cores_axes.step(times, steps, where="post", color=colour, lw=1.2, alpha=0.85, label=label)
        misses = misses_per_bin(run.outcomes, edges_s)
        label = f"{run.policy}: {misses.sum()} of {len(run.outcomes)}"
        centres = edges_s[:-1] + 0.1 + width * (index + 0.5)
        miss_axes.bar(centres, misses, width=width, color=colour, label=label)
    cores_axes.set_ylabel("cores allocated")
    cores_axes.set_ylim(bottom=0)
    miss_axes.set_ylabel("deadlines missed\nper second")
    miss_axes.set_xlabel("time [s]")
    miss_axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in (cores_axes, miss_axes):
        # Above the axes: the misses of the last seconds must not hide behind a legend.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", frameon=False)
    for axes in (budget_axes, cores_axes, miss_axes):
        axes.grid(alpha=0.25)
    if title:
        figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)


def _draw_budgets(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    arrived_s = [outcome.arrived_at for outcome in outcomes]
    budget_ms = [1000 * (outcome.deadline - outcome.arrived_at) for outcome in outcomes]
    axes.plot(arrived_s, budget_ms, ".", ms=3, color="0.3")
    axes.set_ylabel("budget left\nat arrival [ms]")
    axes.set_ylim(bottom=min(0.0, *budget_ms))


def _figure_class() -> Any:
    # The class itself, and no pyplot: a picture must not choose a window system or leave global state behind.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'drawing needs matplotlib, which is not installed: pip install "sponge-serving[plot]"'
        ) from error
    return Figure
