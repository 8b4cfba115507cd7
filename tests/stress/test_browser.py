"""The report in a real browser, without a window: every plot is drawn, and the console stays empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sponge.measure import write_report
from tests.measure.test_page import PLOTS, recording

pytestmark = pytest.mark.stress

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=20000"
)


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Open a page; return its document once its scripts have run, and what the browser's console said."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_every_plot_is_drawn(tmp_path: Path) -> None:
    """What a parser calls right may still fail in a browser."""
    write_report(tmp_path / "report.html", [recording("one"), recording("other")], title="Two runs")
    document, console = browse(tmp_path / "report.html", tmp_path / "profile", "--dump-dom")
    assert console == ""
    for name in PLOTS:
        assert re.search(rf'<div class="[^"]*js-plotly-plot"[^>]* id="plot-{name}"', document), name
    assert document.count('class="main-svg"') >= len(PLOTS)
    assert document.count('class="point"') > 100  # bars and points, as elements
    buttons = set(re.findall(r'data-title="([^"]*)"', document))
    assert {"Zoom", "Pan", "Autoscale"} <= buttons
    assert not any("share" in button.lower() or "cloud" in button.lower() for button in buttons)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_an_error_on_the_page_would_be_seen(tmp_path: Path) -> None:
    """An empty console says something only if it would not stay empty otherwise."""
    (tmp_path / "broken.html").write_text("<script>Plotly.newPlot('plot')</script>")
    _, console = browse(tmp_path / "broken.html", tmp_path / "profile", "--dump-dom")
    assert "Plotly is not defined" in console
