"""The report page: self-contained, complete, and right about the run that it shows."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.measure import Allocation, Ending, Recording, write_report
from sponge.measure.page import MOST_BINS, MOST_POINTS

PLOTS = {"cores", "misses", "budgets", "delays", "responses", "model", "batches"}


def recording(name: str = "run", requests: int = 1000, **changes: Any) -> Recording:
    """Requests 10 ms apart with a budget of 100 ms; every tenth is 50 ms late, every 25th is turned away."""
    number = np.arange(requests)
    arrived = number * 0.01
    late, rejected = number % 10 == 3, number % 25 == 7
    finished = arrived + np.where(late, 0.15, 0.05)
    columns = {
        "arrived_at_s": arrived,
        "deadline_s": arrived + 0.1,
        "started_at_s": np.where(rejected, math.nan, arrived + 0.02),
        "finished_at_s": np.where(rejected, math.nan, finished),
        "ending": np.where(rejected, Ending.REJECTED, np.where(late, Ending.LATE, Ending.MET)),
        "batch_rows": np.full(requests // 2, 2),
        "batch_s": np.full(requests // 2, 0.03),
        "batch_expected_s": np.full(requests // 2, 0.02),
        "allocation": Allocation(times_s=[0.0, 5.0], cores=[1.0, 3.0], end_s=requests * 0.01),
        "fastest_s": 0.01,
    }
    return Recording(name=name, **{**columns, **changes})


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.plots: dict[str, dict[str, Any]] = {}
        self.cells: list[str] = []
        self._in: str = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self._in == "td":
            self.cells.append(data)
        call = re.search(r'Plotly\.newPlot\(\s*"plot-(\w+)",\s*', data)
        if self._in == "script" and call:
            decode = json.JSONDecoder().raw_decode
            parts, rest = [], data[call.end() :]
            for _ in range(3):
                value, end = decode(rest)
                parts.append(value)
                rest = rest[end:].lstrip().removeprefix(",").lstrip()
            self.plots[call.group(1)] = dict(zip(("data", "layout", "config"), parts, strict=True))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def row(self, name: str) -> str:
        return self.cells[self.cells.index(name) + 1]


def test_page_needs_nothing_and_sends_nothing(tmp_path: Path) -> None:
    """It can be mailed, kept for years, and opened where there is no network."""
    write_report(tmp_path / "a.html", [recording()], title="A run")
    page = Page(tmp_path / "a.html")
    assert page.loaded == ["data:,"]
    assert page.plots.keys() == PLOTS
    for plot in page.plots.values():
        assert plot["config"]["showSendToCloud"] is False
        assert plot["config"]["plotlyServerURL"] == ""
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "a.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_page_shows_what_happened(tmp_path: Path) -> None:
    """Every number on it can be counted by hand from the run."""
    write_report(tmp_path / "a.html", [recording()], title="A run", settings={"seed": "7"})
    page = Page(tmp_path / "a.html")
    assert page.row("requests") == "1,000"
    assert page.row("turned away") == "40"
    assert page.row("late") == "100"
    assert page.row("share met") == "86.00 %"
    assert page.row("response p50") == "50 ms"
    assert page.row("queue delay p99") == "20 ms"
    assert page.row("cores on average") == "2.00"
    assert page.row("seed") == "7"
    (misses,) = page.plots["misses"]["data"]
    assert sum(misses["y"]) == 140
    (cores,) = page.plots["cores"]["data"]
    assert (cores["x"], cores["y"]) == ([0.0, 5.0, 10.0], [1.0, 3.0, 3.0])
    assert sum(page.plots["responses"]["data"][0]["y"]) == 960
    assert (page.plots["batches"]["data"][0]["x"], page.plots["batches"]["data"][0]["y"]) == ([2.0], [500.0])
    requests, least = page.plots["budgets"]["data"]
    assert requests["y"] == pytest.approx([100.0] * 1000)
    assert least["y"] == [10.0, 10.0]
    model = page.plots["model"]["data"][0]
    assert sum(model["y"]) == 500
    assert model["x"][np.argmax(model["y"])] == pytest.approx(1.5)


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    """Each has a column, a trace and a colour of its own in every plot."""
    none_met = recording("other", ending=np.full(1000, Ending.FAILED))
    write_report(tmp_path / "a.html", [recording("one"), none_met], title="Two")
    page = Page(tmp_path / "a.html")
    start = page.cells.index("share met")
    assert page.cells[start : start + 3] == ["share met", "86.00 %", "0.00 %"]
    for name in PLOTS - {"budgets"}:
        first, second = page.plots[name]["data"]
        assert [first["name"], second["name"]] == ["one", "other"]
        colours = [trace.get("marker", trace.get("line"))["color"] for trace in (first, second)]
        assert len(set(colours)) == 2


def test_a_long_run_makes_no_larger_page(tmp_path: Path) -> None:
    """A day of traffic is opened as fast as a minute."""
    steps = 50_000
    allocation = Allocation(times_s=np.arange(steps) * 0.01, cores=np.arange(steps) % 3 + 1, end_s=steps * 0.01)
    write_report(tmp_path / "a.html", [recording(requests=steps, allocation=allocation)], title="Long")
    page = Page(tmp_path / "a.html")
    longest = max(len(trace["x"]) for plot in page.plots.values() for trace in plot["data"])
    assert longest <= MOST_POINTS + 1
    assert len(page.plots["misses"]["data"][0]["x"]) <= MOST_BINS
    assert sum(page.plots["misses"]["data"][0]["y"]) == 7000
    cores = page.plots["cores"]["data"][0]["y"]
    assert np.mean(cores) == pytest.approx(2.0, abs=0.01)


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    """Nobody came: that is a result too."""
    columns = ("arrived_at_s", "deadline_s", "started_at_s", "finished_at_s", "ending", "batch_rows", "batch_s")
    nothing: dict[str, list[float]] = {name: [] for name in columns}
    empty = recording(**nothing, batch_expected_s=[], allocation=Allocation(times_s=[0.0], cores=[1.0], end_s=0.0))
    write_report(tmp_path / "a.html", [empty], title="Nobody")
    page = Page(tmp_path / "a.html")
    assert page.row("requests") == "0"
    assert page.row("share met") == "–"
    assert page.plots.keys() == PLOTS - {"delays", "responses", "model"}


def test_names_are_text(tmp_path: Path) -> None:
    """A policy's or a file's name cannot write into the page."""
    evil = "<script>alert(1)</script>"
    write_report(tmp_path / "a.html", [recording(evil, facts={evil: evil})], title=evil, notes=[evil])
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    """No page rather than a wrong one."""
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "a.html", [], title="None")
    with pytest.raises(ValueError, match="columns over requests must be of equal length"):
        recording(deadline_s=[1.0])
    with pytest.raises(ValueError, match="columns over batches must be of equal length"):
        recording(batch_s=[1.0])
