"""Summaries as a table: by rich where it is installed, else as plain text of the same content.

Policies are the columns: their figures then stand side by side, and the names of the figures have room, on a terminal
of 80 characters too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from sponge.measure.report import Summary


def _number(value: float, digits: int, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}{unit}"


ROWS: dict[str, Callable[[Summary], str]] = {
    "deadlines met": lambda s: f"{s.deadlines_met}/{s.requests}",
    "share met": lambda s: _number(100 * s.slo_attainment, 1, " %"),
    "late": lambda s: str(s.late),
    "turned away or failed": lambda s: str(s.rejected + s.failed),
    "response p50": lambda s: _number(1000 * s.response_s_p50, 0, " ms"),
    "response p99": lambda s: _number(1000 * s.response_s_p99, 0, " ms"),
    "core-seconds allocated": lambda s: _number(s.core_seconds_allocated, 1),
    "cores on average": lambda s: _number(s.cores_mean, 2),
    "CPU-seconds used": lambda s: _number(s.cpu_seconds_used, 1),
    "allocations changed": lambda s: str(s.allocations_changed),
}
"""Name of each figure, and how it is shown."""


def plain_table(summaries: Sequence[Summary]) -> str:
    """Return the table as aligned text, one column for each policy."""
    lines = [["", *(summary.policy for summary in summaries)]]
    lines += [[name, *(show(summary) for summary in summaries)] for name, show in ROWS.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def print_table(summaries: Sequence[Summary], *, file: TextIO | None = None) -> None:
    """Print the summaries of several policies side by side."""
    out = sys.stdout if file is None else file
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(summaries), file=out)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for summary in summaries:
        table.add_column(summary.policy, justify="right")
    for name, show in ROWS.items():
        table.add_row(name, *(show(summary) for summary in summaries))
    Console(file=out, markup=False, highlight=False).print(table)
