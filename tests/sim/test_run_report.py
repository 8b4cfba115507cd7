"""A simulated run as what a report is drawn from: the same figures as the run's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sponge
from sponge.measure import Ending
from sponge.workload import Traffic, lte_like

LATENCY = sponge.LatencyModel(0.14, -0.05, 0.025, 0.022)


def run(max_cores: int) -> sponge.Run:
    workload = Traffic(rate_rps=15.0, duration_s=60.0).workload(lte_like(60.0, np.random.default_rng(1)), 1)
    solver = sponge.Solver(LATENCY, max_cores=max_cores, max_batch_size=8, max_lanes=max_cores)
    return sponge.simulate(workload, sponge.Controller(solver), sponge.Service(LATENCY, noise_cv=0.1), seed=1)


@pytest.mark.parametrize("max_cores", [1, 4])
def test_recording_agrees_with_the_run(max_cores: int) -> None:
    """On too few cores and on enough."""
    done = run(max_cores)
    shown = done.recording("four cores")
    assert len(shown) == len(done)
    assert shown.count(Ending.MET) == done.count(0)
    assert shown.missed.sum() == done.misses
    assert (done.misses > 100) == (max_cores == 1)
    assert np.array_equal(shown.response_s, done.response_s, equal_nan=True)
    assert np.array_equal(shown.queue_delay_s, done.queue_delay_s, equal_nan=True)
    assert shown.allocation.core_seconds == pytest.approx(done.in_force.core_seconds)
    assert shown.batch_rows.sum() == np.count_nonzero(done.batch >= 0)


def test_report_is_a_page(tmp_path: Path) -> None:
    """One line from a simulation to what can be shown around."""
    run(4).report(tmp_path / "run.html", title="Four cores")
    assert "<h1>Four cores</h1>" in (tmp_path / "run.html").read_text(encoding="utf-8")
