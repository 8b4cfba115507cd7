"""Figures that sum up a run, against cases small enough to reckon by hand."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.measure import (
    Allocation,
    Outcome,
    OutcomeKind,
    Series,
    plain_table,
    print_table,
    save_figure,
    summarise,
    to_json,
)
from sponge.measure.figure import misses_per_bin

REJECTED, FAILED = OutcomeKind.REJECTED, OutcomeKind.FAILED

OUTCOMES = [
    Outcome(sent_at=0.0, arrived_at=0.1, deadline=1.0, finished_at=0.3, submitted_at=0.102),
    Outcome(sent_at=0.0, arrived_at=0.2, deadline=1.0, finished_at=1.0),
    Outcome(sent_at=0.5, arrived_at=1.0, deadline=1.5, finished_at=1.6),
    Outcome(sent_at=1.9, arrived_at=2.5, deadline=2.9, kind=REJECTED),
    Outcome(sent_at=2.0, arrived_at=2.6, deadline=3.0, kind=FAILED, submitted_at=2.55),
]
ALLOCATION = Allocation(times_s=[0.0, 1.0, 1.5, 2.0], cores=[2.0, 1.0, 1.0, 3.0], end_s=4.0)


def test_summary_of_a_case_reckoned_by_hand() -> None:
    """Late, rejected and failed are all missed; "on time" includes the deadline itself."""
    summary = summarise("hand", OUTCOMES, ALLOCATION, cpu_seconds_used=1.25)
    assert (summary.requests, summary.deadlines_met) == (5, 2)
    assert (summary.late, summary.rejected, summary.failed) == (1, 1, 1)
    assert summary.slo_attainment == pytest.approx(0.4)
    assert summary.seconds_with_a_miss == pytest.approx(2 / 3)
    assert summary.response_s_p50 == pytest.approx(0.6)
    assert summary.response_s_p99 == pytest.approx(0.6 + 0.98 * 0.2)
    assert summary.core_seconds_allocated == pytest.approx(2 + 0.5 + 0.5 + 6)
    assert summary.cores_mean == pytest.approx(9 / 4)
    assert summary.allocations_changed == 2
    assert summary.cpu_seconds_used == 1.25
    assert summary.generator_lateness_s_max == pytest.approx(0.002)


def test_response_runs_from_the_scheduled_arrival() -> None:
    """A generator that submits late must not shorten the response it measures."""
    late = Outcome(sent_at=0.0, arrived_at=0.1, deadline=1.0, finished_at=0.5, submitted_at=0.4)
    assert late.response_s == pytest.approx(0.4)
    assert late.generator_lateness_s == pytest.approx(0.3)


def test_outcome_without_an_end_is_not_finished() -> None:
    """A contradiction would otherwise count as served or not, depending on who looks."""
    with pytest.raises(ValueError, match="finished_at"):
        Outcome(sent_at=0.0, arrived_at=0.1, deadline=1.0)
    with pytest.raises(ValueError, match="finished_at"):
        Outcome(sent_at=0.0, arrived_at=0.1, deadline=1.0, finished_at=0.5, kind=REJECTED)


def test_summary_of_nothing_has_no_figures_and_is_still_json() -> None:
    """``nan`` is no JSON; a figure that does not exist is null."""
    summary = summarise("idle", [], Allocation(times_s=[0.0], cores=[1.0], end_s=0.0))
    assert math.isnan(summary.slo_attainment)
    assert math.isnan(summary.response_s_p99)
    assert summary.cores_mean == 0.0
    text = json.dumps(to_json(summary), allow_nan=False)
    assert json.loads(text)["response_s_p50"] is None


def test_changes_are_cut_to_the_run() -> None:
    """What was allocated before the run began is still in force at its beginning."""
    changes = [(0.0, 2.0), (0.9, 1.0), (1.5, 3.0), (9.0, 5.0)]
    cut = Allocation.from_changes(changes, start_s=1.0, end_s=2.0)
    assert cut.times_s.tolist() == [1.0, 1.5]
    assert cut.cores.tolist() == [1.0, 3.0]
    assert cut.core_seconds == pytest.approx(0.5 + 1.5)
    assert Allocation.from_changes([(1.5, 3.0)], start_s=1.0, end_s=2.0).core_seconds == pytest.approx(3.0)
    with pytest.raises(ValueError, match="changes"):
        Allocation.from_changes([], start_s=0.0, end_s=1.0)


@pytest.mark.parametrize(
    ("times_s", "cores", "word"),
    [([], [], "empty"), ([0.0], [1.0, 2.0], "length"), ([1.0, 0.0], [1.0, 1.0], "decrease"),
     ([5.0], [1.0], "after end_s"), ([0.0], [-1.0], "negative"), ([0.0], [math.nan], "negative")],
)  # fmt: skip
def test_impossible_allocations_are_refused(times_s: list[float], cores: list[float], word: str) -> None:
    """A negative span would lower the bill."""
    with pytest.raises(ValueError, match=word):
        Allocation(times_s=times_s, cores=cores, end_s=4.0)


@given(
    st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 64.0)), min_size=1, max_size=20),
    st.floats(0.1, 3.0),
)
def test_bins_hold_all_core_seconds(steps: list[tuple[float, float]], bin_s: float) -> None:
    """The picture and the table tell of the same cores."""
    times = sorted(time for time, _ in steps)
    allocation = Allocation(times_s=times, cores=[cores for _, cores in steps], end_s=10.0)
    edges = np.append(np.arange(times[0], 10.0, bin_s), 10.0 + bin_s)
    total = float(allocation.mean_per_bin(edges) @ np.diff(edges))
    assert total == pytest.approx(allocation.core_seconds, abs=1e-6)


def test_misses_are_counted_in_the_second_of_arrival() -> None:
    """Each missed request is one miss, in one bin."""
    assert misses_per_bin(OUTCOMES, np.arange(5.0)).tolist() == [0, 1, 2, 0]


def test_plain_table_is_aligned_and_complete() -> None:
    """It is what a machine without rich shows, and what a log file keeps."""
    summaries = [summarise("static, FIFO", OUTCOMES, ALLOCATION), summarise("sponge", [], ALLOCATION)]
    lines = plain_table(summaries).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = {line[:22].strip(): line[22:].split() for line in lines[1:]}
    assert cells["deadlines met"] == ["2/5", "0/0"]
    assert cells["share met"] == ["40.0", "%", "–"]
    assert cells["turned away or failed"] == ["2", "0"]
    assert cells["response p50"] == ["600", "ms", "–"]
    assert cells["core-seconds allocated"] == ["9.0", "9.0"]
    assert cells["CPU-seconds used"] == ["–", "–"]
    assert cells["allocations changed"] == ["2", "2"]


@pytest.mark.parametrize("rich_installed", [True, False])
def test_table_prints_with_and_without_rich(rich_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich is an extra; its absence must not cost the figures."""
    if not rich_installed:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    print_table([summarise("sponge", OUTCOMES, ALLOCATION)], file=out)
    assert "2/5" in out.getvalue()
    assert ("─" in out.getvalue()) is rich_installed


def test_table_of_four_policies_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighty characters, and no figure cut short."""
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    names = ["static, FIFO, one by one", "static, EDF, batches to 8", "static, EDF, 16 lanes, batches to 8", "sponge"]
    print_table([summarise(name, OUTCOMES, ALLOCATION) for name in names], file=out)
    assert "…" not in out.getvalue()
    assert out.getvalue().count("600 ms") == 4


def test_figure_is_written(tmp_path: Path) -> None:
    """In the format that its suffix names."""
    run = Series(policy="static", outcomes=OUTCOMES, allocation=ALLOCATION)
    other = Series(policy="sponge", outcomes=OUTCOMES[:2], allocation=ALLOCATION)
    save_figure(tmp_path / "runs.png", [run, other], title="two runs")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    save_figure(tmp_path / "runs.svg", [run])
    assert "<svg" in (tmp_path / "runs.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="series"):
        save_figure(tmp_path / "none.png", [])


def test_figure_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a picture should learn what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = Series(policy="static", outcomes=OUTCOMES, allocation=ALLOCATION)
    with pytest.raises(ImportError, match=r"sponge-serving\[plot\]"):
        save_figure(tmp_path / "runs.png", [run])
