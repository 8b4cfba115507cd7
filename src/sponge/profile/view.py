"""How people look at a profile: a table and a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sponge.core.fitting import Estimate
from sponge.core.latency import LatencyModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sponge.profile.record import Profile


def summary(profile: Profile, percentile: float) -> str:
    """Return the table of `Profile.summary`."""
    estimates = profile.estimates(percentile)
    head = f"{profile.model_name or 'model'} on {profile.machine.get('cpu', 'an unknown CPU')}"
    if profile.cpu_control:
        head += f", CPU limited by {profile.cpu_control}"
    tail = f"p{percentile:g}"
    lines = [
        head,
        "",
        f"{'batch':>5} {'cores':>6} {'threads':>7} {'lanes':>5} {'runs':>5} {'p50 ms':>9} {tail + ' ms':>9} "
        f"{'95 % interval':>19} {'rps':>8} {'rps/core':>8}",
    ]
    useful = _useful(estimates)
    digits = 2 if min(min(cell.samples_s) for cell in profile.cells) >= 1e-4 else 3  # samples are whole microseconds
    order = sorted(range(len(estimates)), key=lambda k: (profile.cells[k].lanes, *_key(estimates[k])))
    for k in order:
        cell, estimate = profile.cells[k], estimates[k]
        median = float(np.median(cell.samples_s))
        rps = cell.batch_size * cell.lanes / median
        mark = " *" if k in useful else ""
        lines.append(
            f"{cell.batch_size:>5} {cell.cores:>6g} {cell.threads:>7} {cell.lanes:>5} {cell.runs:>5} "
            f"{median * 1e3:>9.{digits}f} {estimate.latency_s * 1e3:>9.{digits}f} {_interval(estimate, digits):>19} "
            f"{_rate(rps):>8} {_rate(rps / (cell.cores * cell.lanes)):>8}{mark}"
        )
    lines += [
        "",
        f"* worth its cores: no smaller allocation of that batch size has as low a {tail} (one lane busy).",
        "rps: of all busy lanes together, at the median.",
    ]
    if any(not estimate.bounded for estimate in estimates):
        lines.append(f"?: too few runs to bound the {tail} from above; the number is the slowest run seen.")
    if any(estimate.pooled for estimate in estimates):
        lines.append(f"Cells with too few runs for a {tail} of their own borrow its distance from similar cells.")
    best = min(
        (k for k in order if profile.cells[k].lanes == 1),
        key=lambda k: (
            float(np.median(profile.cells[k].samples_s)) * profile.cells[k].cores / profile.cells[k].batch_size
        ),
        default=None,
    )
    if best is not None:
        cell = profile.cells[best]
        spent = float(np.median(cell.samples_s)) * cell.cores / cell.batch_size
        lines.append(
            f"Cheapest: batch {cell.batch_size} on {cell.cores:g} cores, {spent * 1e3:.3g} core-ms per request."
        )
    return "\n".join([*lines, *profile.notes])


def _key(estimate: Estimate) -> tuple[int, float]:
    return estimate.batch_size, estimate.cores


def _useful(estimates: tuple[Estimate, ...]) -> set[int]:
    """Indices of the cells on the front of cores against latency, per batch size, with one lane busy."""
    useful: set[int] = set()
    best: dict[int, float] = {}
    for k in sorted(range(len(estimates)), key=lambda k: _key(estimates[k])):
        estimate = estimates[k]
        if estimate.lanes == 1 and estimate.latency_s < best.get(estimate.batch_size, np.inf):
            best[estimate.batch_size] = estimate.latency_s
            useful.add(k)
    return useful


def _interval(estimate: Estimate, digits: int) -> str:
    end = "" if estimate.bounded else "?"
    return f"{estimate.low_s * 1e3:.{digits}f} to {estimate.high_s * 1e3:.{digits}f}{end}"


def _rate(rps: float) -> str:
    return f"{rps:.1f}" if rps < 1e5 else f"{rps:.0f}"


def plot(profile: Profile, path: str | os.PathLike[str] | None, percentile: float) -> Figure:
    """Draw the picture of `Profile.plot`."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator
    except ImportError as error:
        raise ImportError(
            "Profile.plot needs matplotlib: install it with pip install 'sponge-serving[plot]'"
        ) from error
    model = LatencyModel.fit(profile, percentile)
    report = model.report
    assert report is not None  # a fitted model has one
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes: Any = figure.add_subplot()
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(profile.batch_sizes)))
    alone = [estimate for estimate in profile.estimates(percentile) if estimate.lanes == 1]
    shares = np.geomspace(min(e.cores for e in alone), max(e.cores for e in alone), 200)
    for colour, batch_size in zip(colours, profile.batch_sizes, strict=True):
        cells = sorted((e for e in alone if e.batch_size == batch_size), key=_key)
        if not cells:
            continue
        latency = np.array([cell.latency_s for cell in cells]) * 1e3
        ends = np.array([[cell.low_s, cell.high_s] for cell in cells]).T * 1e3
        axes.errorbar(
            [cell.cores for cell in cells],
            latency,
            yerr=np.abs(ends - latency),
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            color=colour,
            label=f"batch {batch_size}",
        )
        axes.plot(shares, model.latency_s(float(batch_size), shares) * 1e3, color=colour, linewidth=1)
    axes.set(xlabel="cores of one lane", ylabel=f"p{percentile:g} latency [ms]", xscale="log", yscale="log")
    ticks = sorted({estimate.cores for estimate in alone})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    axes.set_title(
        f"{profile.model_name or 'model'}: points measured (95 % intervals), lines {report.form} model\n"
        f"({report.mean_error:.1%} off on average)",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
