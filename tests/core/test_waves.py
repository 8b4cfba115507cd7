"""What a queue asks of a batch: the sample of a long queue against the whole of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.core.waves import Waves, WaveSample


def both(deadlines: list[float], now: float, products: list[int]) -> tuple[list[float], list[float]]:
    exact = Waves(products).tightest_s(np.array(deadlines) - now)
    sampled = WaveSample(products).tightest_s(np.array([*deadlines, np.inf]), now)
    return exact.tolist(), sampled.tolist()


@given(
    st.lists(st.floats(-1, 10) | st.just(np.inf), max_size=200).map(sorted),
    st.floats(-5, 5),
    st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_short_queues_are_read_exactly(deadlines: list[float], now: float, products: list[int]) -> None:
    """Within the first 32 waves nothing is approximated, and those are the ones that are decided about."""
    exact, sampled = both(deadlines, now, products)
    for product, left, right in zip(products, exact, sampled, strict=True):
        if len(deadlines) <= 32 * product:
            assert left == right


@given(st.integers(0, 2**32 - 1), st.integers(0, 20_000), st.sampled_from([0.1, 1.0, 3.0]))
def test_long_queues_are_read_on_the_safe_side(seed: int, count: int, shape: float) -> None:
    """A sample must never promise more time than there is, and at most 3 % less, whatever the deadlines look like."""
    rng = np.random.default_rng(seed)
    deadlines = np.sort(rng.gamma(shape, 1.0, count)) * rng.uniform(0.1, 10)
    products = [1, 2, 3, 5, 8, 13, 64, 300]
    exact, sampled = both(deadlines.tolist(), 0.0, products)
    for left, right in zip(exact, sampled, strict=True):
        assert right <= left
        assert right >= left / (1 + 1 / 32) - 1e-12


@pytest.mark.parametrize("count", [100, 1_000, 10_000, 100_000])
def test_the_sample_grows_with_the_logarithm(count: int) -> None:
    """What is read for a product: 32 waves, and then some 22 for every doubling of the queue."""
    sample = WaveSample([1])
    firsts, _, _ = sample._layout(count)
    assert len(firsts) <= 32 * (1 + np.log(2 * count / 32)) + 33
