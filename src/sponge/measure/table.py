"""Summaries as a table: by rich where it is installed, else as plain text of the same content."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TextIO

from sponge.measure.report import Summary

COLUMNS = (
    "policy",
    "deadlines met",
    "late",
    "turned away",
    "response p50",
    "p99",
    "core-seconds allocated",
    "mean cores",
    "CPU-seconds used",
    "changes",
)


def table_cells(summary: Summary) -> list[str]:
    """Return one row, in the order of `COLUMNS`."""
    return [
        summary.policy,
        f"{summary.deadlines_met}/{summary.requests} ({_number(100 * summary.slo_attainment, 1)} %)",
        str(summary.late),
        str(summary.rejected + summary.failed),
        f"{_number(1000 * summary.response_s_p50, 0)} ms",
        f"{_number(1000 * summary.response_s_p99, 0)} ms",
        _number(summary.core_seconds_allocated, 1),
        _number(summary.cores_mean, 2),
        _number(summary.cpu_seconds_used, 1),
        str(summary.allocations_changed),
    ]


def plain_table(summaries: Sequence[Summary]) -> str:
    """Return the table as aligned text."""
    rows = [list(COLUMNS), *(table_cells(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def print_table(summaries: Sequence[Summary], *, file: TextIO | None = None) -> None:
    """Print the summaries of several policies, one line each."""
    out = sys.stdout if file is None else file
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(summaries), file=out)
        return
    table = Table(pad_edge=False)
    for column, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if column == 0 else "right")
    for summary in summaries:
        table.add_row(*table_cells(summary))
    Console(file=out, markup=False).print(table)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
