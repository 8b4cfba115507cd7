"""What came of a run: outcomes, summaries, tables and pictures."""

from sponge.measure.figure import Series, save_figure
from sponge.measure.page import write_report
from sponge.measure.recording import Ending, Recording
from sponge.measure.report import Allocation, Outcome, OutcomeKind, Summary, summarise, to_json
from sponge.measure.table import plain_table, print_table

__all__ = [
    "Allocation",
    "Ending",
    "Outcome",
    "OutcomeKind",
    "Recording",
    "Series",
    "Summary",
    "plain_table",
    "print_table",
    "save_figure",
    "summarise",
    "to_json",
    "write_report",
]
