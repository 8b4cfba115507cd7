"""The sweep's own parts: what counts as ahead, whom it compares, and what it reads from a published profile."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sponge.workload import lte_like

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def robustness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("robustness")


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("contenders")


@pytest.mark.parametrize(
    ("missed", "cores", "ahead", "bought"),
    [
        (0.2, 4.0, True, False),  # worse in both
        (0.2, 2.0, True, False),  # cheaper, and misses more
        (0.05, 4.0, True, True),  # misses less, and costs more
        (0.05, 3.0, False, False),
        (0.1, 3.0, False, False),  # as good in both: not ahead of it
        (0.1, 2.0, False, False),
        (0.0, 0.1, False, False),
    ],
)
def test_ahead_is_nobody_with_as_few_misses_on_as_few_cores(
    robustness: ModuleType, missed: float, cores: float, ahead: bool, bought: bool
) -> None:
    """sponge misses 0.1 % on 3 cores; a rival counts by its means, and sponge's own one lane is no rival."""

    def figures(missed: float, cores: float) -> dict[str, list[float]]:
        return {"missed_pct": [missed - 0.01, missed + 0.01], "mean_cores": [cores, cores]}

    rows = {"sponge": figures(0.1, 3.0), "sponge, one lane": figures(0.0, 1.0), "rival": figures(missed, cores)}
    found = robustness.verdict(rows)
    assert found["ahead"] is ahead
    assert found["beaten_by"] == ([] if ahead else ["rival"])
    assert found["fewer_misses_on_more_cores"] == (["rival"] if bought else [])


def test_everybody_meets_the_same_requests(robustness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rivals of the documentation, both horizontal ones and five numbers of static lanes, on a short scenario."""
    monkeypatch.setattr(robustness, "REQUESTS", 200)
    scenario = robustness.Scenario(name="short", service=robustness.ROUGH, interference=0.03, slos=robustness.MIX)
    trace = lte_like(60, np.random.default_rng(0))
    rows = robustness.run_seed(scenario, trace, robustness.MODELS, 0)
    assert rows == robustness.run_seed(scenario, trace, robustness.MODELS, 0)
    for words, count in (("horizontal", 2), ("lanes of 1 core", 5), ("published", 2), ("batcher", 2), ("vertical", 1)):
        assert sum(words in name for name in rows) == count
    for row in rows.values():
        assert 0 <= row["avoidable_pct"] <= row["missed_pct"] <= 100
        assert row["bound_mean_cores"] > 0
        assert 0 < row["mean_cores"] <= 16
    names = [scenario.name for scenario in robustness.scenarios()]
    assert len(names) == len(set(names))


def test_published_profile_is_fitted_where_the_caps_allow(contenders: ModuleType, tmp_path: Path) -> None:
    """A table made of four terms gives them back, whatever stands beyond batches of 8 and 16 cores."""
    path = tmp_path / "profile.csv"
    lines = ["model,batch_size,cores,latency_ms_p99"]
    for b in (1, 2, 4, 8, 16):
        for c in (1, 2, 4, 16, 32):
            ms = 60 * b / c - 7 / c + 12 * b + 15 if b <= 8 and c <= 16 else 1e6
            lines.append(f"net,{b},{c},{ms}")
    path.write_text("\n".join(lines), encoding="utf-8")
    found = contenders.fit_profiles(path)["net"]
    terms = (found.gamma_s, found.epsilon_s, found.delta_s, found.eta_s)
    assert terms == pytest.approx((0.060, -0.007, 0.012, 0.015))
