"""What came of a run: outcomes, summaries, tables and pictures."""

from sponge.measure.figure import Series, save_figure
from sponge.measure.report import Allocation, Outcome, OutcomeKind, Summary, summarise, to_json
from sponge.measure.table import plain_table, print_table

__all__ = [
    "Allocation",
    "Outcome",
    "OutcomeKind",
    "Series",
    "Summary",
    "plain_table",
    "print_table",
    "save_figure",
    "summarise",
    "to_json",
]
