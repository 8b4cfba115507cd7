"""The report: one self-contained HTML page with interactive plots of one run, or of several that are compared.

Rules, and why they hold:

* Nothing is loaded from anywhere, and nothing is sent: the plotting code is in the page (some 5 MB), which can be
  passed on and kept.
* The page stays as small however long the run was: what is drawn is counted into bins or thinned first.
* Live and simulated runs come as the same `Recording`, so they are drawn, and can be compared, on one page.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sponge.measure.recording import Ending, FloatArray, Recording

MOST_BINS = 240
"""Of the plots over time."""
HISTOGRAM_BINS = 60
MOST_POINTS = 4_000
"""Of a scatter plot, and of the steps of an allocation."""
_MOST_FILLED = 3
"""Outlines of so many distributions are told apart only if they are empty."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by the colour-blind too (Okabe and Ito)."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 1180px;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
p.note { color: #555; margin: .2rem 0; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .15rem .9rem .15rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; font-weight: normal; color: #444; }
tr { border-bottom: 1px solid #ddd; } thead th { font-weight: 600; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; } .wide { grid-column: 1 / 3; }
@media (max-width: 900px) { .plots { display: block; } }
"""


def write_report(
    path: str | os.PathLike[str],
    recordings: Sequence[Recording],
    *,
    title: str,
    notes: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Parameters
    ----------
    path
        Of the HTML file.
    recordings
        One, or several of the same requests.
    title
        Headline.
    notes
        Lines below it.
    settings
        Of all runs together, shown at the end; each recording's own facts stand in the table.

    Raises
    ------
    ImportError
        If plotly is not installed; the message names the extra that brings it.
    ValueError
        If there is no recording.
    """
    if not recordings:
        raise ValueError("recordings must hold at least one run, got none")
    Path(path).write_text(render(recordings, title=title, notes=notes, settings=settings or {}), encoding="utf-8")


def render(
    recordings: Sequence[Recording], *, title: str, notes: Sequence[str] = (), settings: Mapping[str, str]
) -> str:
    """Return the page's text; see `write_report`."""
    offline = _plotly("offline")
    plots = "\n".join(_plots(recordings))
    headlines = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in [*notes, *_forgotten(recordings)])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
<script>{offline.get_plotlyjs()}</script>
</head>
<body>
<h1>{html.escape(title)}</h1>
{headlines}
{_summary(recordings)}
<div class="plots">
{plots}
</div>
{_settings(settings)}
</body>
</html>
"""


def _forgotten(recordings: Sequence[Recording]) -> list[str]:
    return [
        f"{run.name}: the last {len(run):,} requests; {run.forgotten:,} earlier ones are no longer remembered."
        for run in recordings
        if run.forgotten
    ]


# -- tables ------------------------------------------------------------------------------------------------------


def _ms(values: FloatArray, percentile: float) -> str:
    known = values[np.isfinite(values)]
    return f"{1000 * np.percentile(known, percentile):.3g} ms" if len(known) else "–"


def _share(run: Recording) -> str:
    judged = len(run) - run.count(Ending.CANCELLED)
    return f"{100 * run.count(Ending.MET) / judged:.2f} %" if judged else "–"


ROWS: dict[str, Callable[[Recording], str]] = {
    "requests": lambda run: f"{len(run):,}",
    "deadlines met": lambda run: f"{run.count(Ending.MET):,}",
    "share met": _share,
    "late": lambda run: f"{run.count(Ending.LATE):,}",
    "turned away": lambda run: f"{run.count(Ending.REJECTED, Ending.QUEUE_FULL, Ending.CLOSED):,}",
    "failed": lambda run: f"{run.count(Ending.FAILED):,}",
    "cancelled": lambda run: f"{run.count(Ending.CANCELLED):,}",
    "response p50": lambda run: _ms(run.response_s, 50),
    "response p99": lambda run: _ms(run.response_s, 99),
    "queue delay p50": lambda run: _ms(run.queue_delay_s, 50),
    "queue delay p99": lambda run: _ms(run.queue_delay_s, 99),
    "batches": lambda run: f"{len(run.batch_rows):,}",
    "batch size on average": lambda run: f"{run.batch_rows.mean():.2f}" if len(run.batch_rows) else "–",
    "cores on average": lambda run: f"{run.allocation.mean_cores:.2f}",
    "core-seconds allocated": lambda run: f"{run.allocation.core_seconds:.1f}",
    "allocations changed": lambda run: f"{run.allocation.changes:,}",
}
"""Name of each figure, and how it is shown."""


def _summary(recordings: Sequence[Recording]) -> str:
    rows = [(name, [show(run) for run in recordings]) for name, show in ROWS.items()]
    facts = dict.fromkeys(name for run in recordings for name in run.facts)
    rows += [(name, [run.facts.get(name, "–") for run in recordings]) for name in facts]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in recordings)
    lines = "\n".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f'<table id="summary"><thead><tr><th></th>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>'


def _settings(settings: Mapping[str, str]) -> str:
    if not settings:
        return ""
    lines = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in settings.items()
    )
    return f'<h2>Settings</h2>\n<table id="settings"><tbody>\n{lines}\n</tbody></table>'


# -- plots -------------------------------------------------------------------------------------------------------


def _plots(recordings: Sequence[Recording]) -> list[str]:
    end_s = max(1e-3, *(run.allocation.end_s for run in recordings))
    edges_s = np.linspace(0.0, end_s, min(MOST_BINS, max(10, math.ceil(end_s))) + 1)
    over_time = {"title": {"text": "time [s]"}, "range": [0.0, end_s]}
    misses = f"Deadlines missed, by arrival, each {edges_s[1]:.3g} s"
    plots = [
        _plot("cores", "Cores allocated", over_time, "cores", [_cores(run) for run in recordings]),
        _plot("misses", misses, over_time, "requests", [_misses(run, edges_s) for run in recordings]),
        _plot("budgets", "Budget at arrival", over_time, "budget [ms]", _budgets(recordings)),
    ]
    for name, title, axis, values in (
        ("delays", "Queue delay", "queue delay [ms]", [1000 * run.queue_delay_s for run in recordings]),
        ("responses", "Response", "response [ms]", [1000 * run.response_s for run in recordings]),
        ("model", "Measured / predicted duration", "ratio", [run.batch_s / run.batch_expected_s for run in recordings]),
    ):
        if traces := _histograms(recordings, values):
            counted = "batches" if name == "model" else "requests"
            plots.append(_plot(name, title, {"title": {"text": axis}}, counted, traces, wide=False))
    sizes = {"title": {"text": "rows"}}
    plots.append(_plot("batches", "Batch sizes", sizes, "batches", [_sizes(run) for run in recordings], wide=False))
    return plots


def _cores(run: Recording) -> dict[str, Any]:
    steps = run.allocation
    if len(steps.times_s) > MOST_POINTS:
        edges_s = np.linspace(steps.times_s[0], steps.end_s, MOST_POINTS + 1)
        times_s, cores = edges_s[:-1], steps.mean_per_bin(edges_s)
    else:
        times_s, cores = steps.times_s, steps.cores
    x, y = np.append(times_s, steps.end_s), np.append(cores, cores[-1])
    return _trace(run, "scatter", x, y, mode="lines", line={"shape": "hv", "width": 1.5})


def _misses(run: Recording, edges_s: FloatArray) -> dict[str, Any]:
    missed = np.histogram(run.arrived_at_s[run.missed], edges_s)[0]
    return _trace(run, "bar", (edges_s[:-1] + edges_s[1:]) / 2, missed)


def _budgets(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    """Draw those of one run: compared runs have the same requests. And what one needs, by the first model there is."""
    run = recordings[0]
    some = np.flatnonzero(np.isfinite(run.deadline_s))[:: max(1, math.ceil(len(run) / MOST_POINTS))]
    x, y = run.arrived_at_s[some], 1000 * run.budget_s[some]
    traces = [{**_trace(run, "scatter", x, y, mode="markers", marker={"size": 4, "opacity": 0.6}), "name": "requests"}]
    known_s = [other.fastest_s for other in recordings if math.isfinite(other.fastest_s)]
    if known_s:
        ends, level = np.array([0.0, run.allocation.end_s]), np.full(2, 1000 * known_s[0])
        line = _trace(run, "scatter", ends, level, mode="lines", line={"dash": "dot", "width": 1})
        traces.append({**line, "name": "one alone on all cores"})
    return traces


def _histograms(recordings: Sequence[Recording], values: Sequence[FloatArray]) -> list[dict[str, Any]]:
    """Count into bins common to all runs; what lies beyond the 99.5th percentile is in the last one."""
    known = [some[np.isfinite(some)] for some in values]
    everything = np.concatenate(known)
    if not len(everything):
        return []
    low, high = float(everything.min()), float(np.percentile(everything, 99.5))
    edges = np.linspace(low, max(high, low + 1e-9), HISTOGRAM_BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    how: dict[str, Any] = {"line": {"shape": "hvh", "width": 1.5}}
    if len(recordings) < _MOST_FILLED:
        how["fill"] = "tozeroy"
    return [
        _trace(run, "scatter", centres, np.histogram(np.minimum(some, edges[-1]), edges)[0], mode="lines", **how)
        for run, some in zip(recordings, known, strict=True)
    ]


def _sizes(run: Recording) -> dict[str, Any]:
    sizes, counts = np.unique(run.batch_rows, return_counts=True)
    return _trace(run, "bar", sizes, counts)


def _trace(run: Recording, kind: str, x: npt.NDArray[Any], y: npt.NDArray[Any], **how: Any) -> dict[str, Any]:
    # As lists: arrays would be written in base 64, which nobody can read or check.
    return {"type": kind, "name": run.name, "legendgroup": run.name, "x": _short(x), "y": _short(y), **how}


def _short(values: npt.NDArray[Any]) -> list[float]:
    """Six digits are more than a screen shows, and half the size."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _plot(
    name: str,
    title: str,
    x_axis: Mapping[str, Any],
    y_title: str,
    traces: Sequence[dict[str, Any]],
    *,
    wide: bool = True,
) -> str:
    runs = list(dict.fromkeys(trace["legendgroup"] for trace in traces))
    for trace in traces:
        colour = _COLOURS[runs.index(trace["legendgroup"]) % len(_COLOURS)]
        for part in ("line", "marker"):
            if part in trace or (part == "marker" and trace["type"] == "bar"):
                trace[part] = {"color": colour, **trace.get(part, {})}
    layout = {
        "template": "plotly_white",
        "title": {"text": title, "font": {"size": 15}},
        "xaxis": x_axis,
        "yaxis": {"title": {"text": y_title}, "rangemode": "tozero"},
        "barmode": "group",
        "bargap": 0.05,
        "showlegend": len(traces) > 1,
        "legend": {"orientation": "h", "y": -0.25},
        "margin": {"l": 60, "r": 20, "t": 45, "b": 45},
        "height": 340,
    }
    # Made an object first, which checks every name; what it would write by itself also offers an upload.
    figure = _plotly("graph_objects").Figure(data=list(traces), layout=layout).to_plotly_json()
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
    arguments = ", ".join(_script(part) for part in (f"plot-{name}", figure["data"], figure["layout"], config))
    kind = "wide" if wide else "half"
    return f'<div class="{kind}" id="plot-{name}"></div>\n<script>Plotly.newPlot({arguments})</script>'


def _script(value: Any) -> str:
    """Return a value as JavaScript that cannot end the script it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _plotly(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"plotly.{module}")
    except ImportError as error:
        raise ImportError(
            'the report needs plotly, which is not installed: pip install "sponge-serving[report]"'
        ) from error
