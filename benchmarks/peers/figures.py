"""From what the client saw to the race's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contenders import CONTENDERS, HTTP, IN_PROCESS
from replay import OK

LABELS = {contender.name: contender.label for contender in CONTENDERS}
Figures = Mapping[str, float]


def judge(reply: Mapping[str, Any], budget_s: Sequence[float]) -> dict[str, float]:
    """Return the figures of one run.

    Parameters
    ----------
    reply
        Of `Running.replay`.
    budget_s
        Of each request, from its scheduled instant.
    """
    lag_s, endings, response_s = zip(*reply["requests"], strict=True)
    answered = np.array([ending == OK for ending in endings])
    response, budget = np.array(response_s), np.array(budget_s)
    in_time = response <= budget
    met = int((answered & in_time).sum())
    p50, p99 = np.percentile(response[answered], [50, 99]) if answered.any() else (np.nan, np.nan)
    return {
        "requests": len(budget),
        "met_pct": 100 * met / len(budget),
        "told_in_time_pct": 100 * float((~answered & in_time).mean()),
        "too_late_pct": 100 * float((~in_time).mean()),
        "met_per_core_s": met / reply["cpu_s"] if reply["cpu_s"] else np.nan,
        "cpu_cores": reply["cpu_s"] / reply["took_s"],
        "cpu_ms_per_request": 1000 * reply["cpu_s"] / len(budget),
        "response_ms_p50": 1000 * p50,
        "response_ms_p99": 1000 * p99,
        "client_lag_ms_p99": 1000 * float(np.percentile(lag_s, 99)),
        "client_cores": reply["client_cpu_s"] / reply["took_s"],
    }


def spread(runs: Sequence[Figures], name: str, digits: int = 1) -> str:
    """Median and range over the repeats."""
    values = np.array([run[name] for run in runs])
    if not len(values) or np.isnan(values).all():
        return "–"
    middle, low, high = (
        f"{value:.{digits}f}" for value in (np.nanmedian(values), np.nanmin(values), np.nanmax(values))
    )
    return middle if low == high else f"{middle} ({low}–{high})"


COLUMNS: Mapping[str, tuple[str, int]] = {
    "met in time, %": ("met_pct", 1),
    "turned away in time, %": ("told_in_time_pct", 1),
    "too late, %": ("too_late_pct", 1),
    "met per core-second": ("met_per_core_s", 1),
    "CPU per request, ms": ("cpu_ms_per_request", 1),
    "p50, ms": ("response_ms_p50", 0),
    "p99, ms": ("response_ms_p99", 0),
}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _lane(runs: Mapping[str, Any], lane: str) -> list[str]:
    return [contender.name for contender in CONTENDERS if contender.lane == lane and contender.name in runs]


def markdown(result: Mapping[str, Any]) -> str:
    """Return all tables of a race, as Markdown."""
    parts = [_headline(result)]
    for lane in (HTTP, IN_PROCESS):
        parts += _by_load(result, lane)
    parts += _one_table(result, "limited", "With as many cores as sponge behind uvicorn used", COLUMNS)
    parts += _one_table(
        result,
        "plain",
        "Plain throughput, no deadlines, 16 in flight",
        {
            "detector, answers/s": ("detector", 1),
            "per core-second": ("detector_per_core_s", 1),
            "small model, answers/s": ("small", 0),
            "answers per core-second": ("small_per_core_s", 0),
        },
    )
    parts += _one_table(
        result,
        "faults",
        "Alone, and beside a poisonous input, batching on",
        {
            "a lone request, ms": ("lone_ms", 1),
            "of seven sent with a poisonous one, failed": ("hurt", 1),
        },
    )
    parts += _one_table(
        result,
        "poison",
        "One poisonous input in a thousand (small model)",
        COLUMNS | {"innocent failed, in a thousand": ("innocent_failed_permille", 2)},
    )
    parts += [f"`{name}` did not race: {why}." for name, why in result["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _headline(result: Mapping[str, Any]) -> str:
    budgets = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in result["budgets_s"].items())
    return (
        f"{result['machine']}; {result['duration_s']:g} s a run, {result['repeats']} repeats, medians with the range. "
        f"Capacity, by closed loop on `session.run`: {result['capacity_rps']:.1f}/s. Budgets: {budgets}. "
        f"The client took up to {result['client_cores_most']:.2f} cores beside the servers."
    )


def _by_load(result: Mapping[str, Any], lane: str) -> list[str]:
    names = _lane(result["runs"], lane)
    if not names:
        return []
    loads = sorted({load for name in names for load in result["runs"][name]}, key=float)
    parts = []
    for title, figure, digits in (
        ("answered within the deadline, %", "met_pct", 1),
        ("met per core-second of all server processes", "met_per_core_s", 1),
    ):
        heads = [f"{lane}: {title}", *(f"load {load}" for load in loads)]
        rows = [
            [LABELS[name], *(spread(result["runs"][name].get(load, []), figure, digits) for load in loads)]
            for name in names
        ]
        parts.append(_table(heads, rows))
    for load in loads:
        rows = [
            [LABELS[name], *(spread(result["runs"][name].get(load, []), *column) for column in COLUMNS.values())]
            for name in names
        ]
        parts.append(_table([f"{lane}, load {load}", *COLUMNS], rows))
    return parts


def _one_table(
    result: Mapping[str, Any], section: str, title: str, columns: Mapping[str, tuple[str, int]]
) -> list[str]:
    runs = result[section]
    names = [*_lane(runs, HTTP), *_lane(runs, IN_PROCESS)]
    if not names:
        return []
    rows = [
        [LABELS[name], *(spread(_having(runs[name], figure), figure, digits) for figure, digits in columns.values())]
        for name in names
    ]
    return [_table([title, *columns], rows)]


def _having(runs: Sequence[Figures], figure: str) -> Sequence[Figures]:
    return [run for run in runs if figure in run] or [{figure: np.nan}]
