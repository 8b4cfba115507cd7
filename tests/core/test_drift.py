"""Following a model that has become slower or faster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.core.drift import DriftScale


def test_trusts_the_profile_until_there_is_evidence() -> None:
    """One straggler, or a few fast runs, move nothing."""
    drift = DriftScale(window=64, quantile=0.95)
    assert drift.scale == 1.0
    drift.observe(30.0, 1.0)
    for _ in range(10):
        drift.observe(0.5, 1.0)
    assert drift.scale == 1.0


def test_follows_a_slowdown_within_a_few_batches() -> None:
    """Lateness comes at once, so belief must follow soon: four slow batches of 64 are enough."""
    drift = DriftScale(window=64, quantile=0.95)
    for _ in range(4):
        drift.observe(2.0, 1.0)
    assert drift.scale == 2.0


def test_forgets_it_after_a_window() -> None:
    """A neighbour that has left must not be paid for for ever."""
    drift = DriftScale(window=64, quantile=0.95)
    for _ in range(20):
        drift.observe(3.0, 1.0)
    for _ in range(64):
        drift.observe(0.8, 1.0)
    assert drift.scale == 0.8


@given(st.lists(st.floats(0.01, 100.0), max_size=200), st.integers(1, 70), st.floats(0.01, 1.0))
def test_scale_is_the_quantile_of_the_window(ratios: list[float], window: int, quantile: float) -> None:
    """Kept up to date by insertion, it equals sorting the window afresh."""
    drift = DriftScale(window, quantile)
    for ratio in ratios:
        drift.observe(ratio, 1.0)
    recent = sorted(([1.0] * window + ratios)[-window:])
    if ratios:
        assert drift.scale == recent[min(window - 1, int(window * quantile))]


def test_scaled_prediction_is_kept_by_that_share() -> None:
    """95 % of noisy batches end within the scaled prediction, whatever the model believed."""
    rng = np.random.default_rng(0)
    drift = DriftScale(window=256, quantile=0.95)
    kept = []
    for ratio in rng.lognormal(0.3, 0.2, 6000):
        kept.append(ratio <= drift.scale)
        drift.observe(ratio, 1.0)
    assert np.mean(kept[500:]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("kwargs", "name"), [({"window": 0}, "window"), ({"quantile": 0.0}, "quantile")])
def test_bad_arguments_are_refused(kwargs: dict[str, float], name: str) -> None:
    """The message names the argument."""
    with pytest.raises(ValueError, match=name):
        DriftScale(**kwargs)  # type: ignore[arg-type]
