"""The arrival-rate estimate."""

from __future__ import annotations

import numpy as np
import pytest

from sponge.core.arrivals import ArrivalRate


@pytest.mark.parametrize("rate_rps", [0.5, 20.0, 3000.0])
def test_poisson_arrivals_are_estimated_without_bias(rate_rps: float) -> None:
    """Mean over seeds within four standard errors; var of one estimate is about rate / (2 T)."""
    estimates = []
    for seed in range(40):
        estimate = ArrivalRate(time_constant_s=2.0)
        now = 0.0
        for gap in np.random.default_rng(seed).exponential(1 / rate_rps, int(20 * rate_rps) + 5):
            now += gap
            estimate.observe(now)
        # asked a moment after the last arrival, which is itself not a random instant
        estimates.append(estimate.rate_rps(now + 1 / rate_rps))
    standard_error = np.sqrt(rate_rps / (2 * 2.0) / 40)
    assert abs(np.mean(estimates) - rate_rps) < 4 * standard_error + 0.05 * rate_rps


def test_rate_decays_when_nothing_arrives() -> None:
    """A pause is information: half of the rate is forgotten in ln 2 time constants."""
    estimate = ArrivalRate(time_constant_s=1.0)
    for i in range(1000):
        estimate.observe(i * 0.01)
    now = 9.99
    assert estimate.rate_rps(now) == pytest.approx(100, rel=0.02)
    assert estimate.rate_rps(now + np.log(2)) == pytest.approx(50, rel=0.02)
    assert estimate.rate_rps(now + 100) < 1e-6


def test_first_arrivals_are_no_flood() -> None:
    """Two arrivals in the same microsecond at start-up must not read as a million a second."""
    estimate = ArrivalRate(time_constant_s=2.0)
    assert estimate.rate_rps(0.0) == 0.0
    estimate.observe(0.0)
    assert estimate.rate_rps(0.5) == 0.0
    estimate.observe(1e-6)
    assert 0 < estimate.rate_rps(1e-6) <= 5.0


def test_rows_count() -> None:
    """The rate is of rows, which is what batches are made of."""
    one, three = ArrivalRate(), ArrivalRate()
    for i in range(10):
        one.observe(float(i))
        three.observe(float(i), rows=3)
    assert three.rate_rps(10.0) == pytest.approx(3 * one.rate_rps(10.0))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_time_constant_is_refused(value: float) -> None:
    """The message names the argument."""
    with pytest.raises(ValueError, match="time_constant_s"):
        ArrivalRate(value)
