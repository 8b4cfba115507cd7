"""Predictions are monotone, invertible, and the same for scalars and arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.core.fitting import monotone_envelope
from sponge.core.latency import LatencyModel, LatencyTable
from sponge.core.values import intra_op_threads

seconds = st.floats(0, 0.5)
batches = st.integers(1, 100)
shares = st.floats(0.05, 64)


@st.composite
def models(draw: st.DrawFn) -> LatencyModel:
    gamma = draw(seconds)
    epsilon = draw(st.floats(-gamma - 0.1, 0.5))
    return LatencyModel(gamma, epsilon, draw(seconds), draw(st.floats(1e-3, 0.5)), interference=draw(st.floats(0, 1)))


@st.composite
def tables(draw: st.DrawFn) -> LatencyModel:
    batch_sizes = sorted(draw(st.sets(st.integers(1, 32), min_size=1, max_size=5)))
    cores = sorted(draw(st.sets(st.sampled_from([0.5, 1, 1.25, 1.5, 2, 3, 4, 8]), min_size=1, max_size=6)))
    cell = st.floats(1e-3, 2.0)
    rows = [[draw(cell) for _ in cores] for _ in batch_sizes]
    factors = ((2, draw(st.floats(1, 1.5))), (4, draw(st.floats(1.5, 3))))
    return LatencyTable(
        0.01,
        0.0,
        0.001,
        0.001,
        lane_factors=factors,
        batch_sizes=batch_sizes,
        cores=cores,
        table_s=monotone_envelope(np.array(rows)),
    )


any_latency = st.one_of(models(), tables())


@given(any_latency, batches, batches, shares, shares, st.integers(1, 9), st.integers(1, 9))
def test_latency_falls_with_cores_and_rises_with_batch_and_lanes(
    model: LatencyModel, b1: int, b2: int, c1: float, c2: float, k1: int, k2: int
) -> None:
    """The solver inverts the prediction; a bump would make it choose wrongly."""
    worst = model.latency_s(max(b1, b2), min(c1, c2), max(k1, k2))
    best = model.latency_s(min(b1, b2), max(c1, c2), min(k1, k2))
    assert 0 < best <= worst * (1 + 1e-12)


@given(any_latency, batches, st.floats(1e-4, 20), st.integers(1, 9))
def test_cores_for_is_the_smallest_adequate_allocation(
    model: LatencyModel, batch_size: int, target_s: float, lanes: int
) -> None:
    """Too few cores miss deadlines, too many are paid for."""
    cores = model.cores_for(batch_size, target_s, lanes)
    if math.isinf(cores):
        assert model.latency_s(batch_size, 1e9, lanes) > target_s * (1 - 1e-9)
        return
    if cores > 0:
        assert model.latency_s(batch_size, cores, lanes) <= target_s * (1 + 1e-9)
        assert model.latency_s(batch_size, cores * 0.999, lanes) > target_s * (1 - 1e-9)
    else:
        assert model.latency_s(batch_size, 1e-6, lanes) <= target_s * (1 + 1e-9)


@given(any_latency, st.lists(st.tuples(batches, shares, st.floats(-1, 5)), min_size=1, max_size=8), st.integers(1, 5))
def test_arrays_agree_with_scalars(model: LatencyModel, rows: list[tuple[int, float, float]], lanes: int) -> None:
    """Two code paths give one answer."""
    b, c, t = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    pairs: list[tuple[Any, list[float]]] = [
        (model.latency_s(b, c, lanes), [model.latency_s(x, y, lanes) for x, y in zip(b, c, strict=True)]),
        (model.throughput_rps(b, c, lanes), [model.throughput_rps(x, y, lanes) for x, y in zip(b, c, strict=True)]),
        (model.cores_for(b, t, lanes), [model.cores_for(x, y, lanes) for x, y in zip(b, t, strict=True)]),
    ]
    for array, scalars in pairs:
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, scalars, rtol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        LatencyModel(0.02, 0.0, 0.001, 0.002),
        LatencyTable(0.02, 0, 0, 0, batch_sizes=[1, 4], cores=[1, 2], table_s=[[0.1, 0.06], [0.3, 0.2]]),
    ],
)
def test_shapes_follow_broadcasting(model: LatencyModel) -> None:
    """Scalars give floats; a grid is one call."""
    assert type(model.latency_s(np.int64(1), np.float64(2.0))) is float
    assert type(model.cores_for(1, 0.07)) is float
    assert type(model.throughput_rps(2, 1)) is float
    b, c = np.arange(1, 6)[:, None], np.array([0.5, 1.0, 4.0])
    assert model.latency_s(b, c).shape == (5, 3)
    assert model.cores_for(b, c).shape == (5, 3)
    assert model.latency_s(3, c, np.array([[1], [2]])).shape == (2, 3)
    assert model.latency_s(np.array(1.0), 1.0).shape == ()
    assert model.cores_for(np.array([]), 1.0).shape == (0,)


def test_negative_parallel_work_is_held_at_zero() -> None:
    """Otherwise more cores would make a small batch slower."""
    model = LatencyModel(0.01, -0.025, 0.005, 0.002)
    assert model.latency_s(2, 0.1) == model.latency_s(2, 8) == pytest.approx(0.012)
    assert model.cores_for(2, 0.012) == 0.0
    assert model.cores_for(2, 0.0119) == math.inf


def test_inverse_reproduces_the_closed_form() -> None:
    """c = (γ·b + ε) / (L − δ·b − η), the formula the solver rests on."""
    model = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221)
    assert model.cores_for(4, 0.3) == pytest.approx((0.1404 * 4 - 0.0508) / (0.3 - 0.0252 * 4 - 0.0221))
    assert model.cores_for(4, 0.3, 2) == model.cores_for(4, 0.3)


def test_table_meets_its_grid_and_extrapolates_as_documented() -> None:
    """Measured values come back; beyond them the documented rules hold."""
    table = LatencyTable(
        0,
        0,
        0,
        1,
        batch_sizes=[1, 2, 4],
        cores=[0.5, 1, 2],
        table_s=[[0.4, 0.2, 0.12], [0.7, 0.4, 0.2], [1.5, 0.9, 0.5]],
    )
    assert table.latency_s(2, 1) == pytest.approx(0.4)
    assert table.latency_s(4, 2) == 0.5
    assert table.latency_s(1, 0.25) == pytest.approx(0.8)
    assert table.latency_s(1, 64) == 0.12
    assert table.latency_s(8, 1) == pytest.approx(0.9 + 4 * 0.25)
    assert table.latency_s(3, 2) == pytest.approx(0.35)
    assert table.latency_s(1, 1.6) == pytest.approx(0.12 + (1 / 1.6 - 0.5) / 0.5 * 0.08)


def test_one_thread_gains_nothing_between_one_core_and_a_second_thread() -> None:
    """A plan for 1.3 cores would pay for 0.3 that one thread cannot use; the inverse jumps to two threads."""
    table = LatencyTable(0, 0, 0, 1, batch_sizes=[1], cores=[1, 2], table_s=[[0.2, 0.1]])
    assert table.latency_s(1, 1.0) == table.latency_s(1, 1.49) == 0.2
    assert table.latency_s(1, 1.5) < 0.15
    for target in (0.199, 0.17, 0.14):
        assert intra_op_threads(table.cores_for(1, target)) == 2
    assert table.cores_for(1, 0.199) == 1.5
    assert table.cores_for(1, 0.2) == 1.0


def test_lane_factors_interpolate_and_continue() -> None:
    """Lane counts between and beyond the measured ones still have a slowdown."""
    model = LatencyModel(0.1, 0, 0, 0, lane_factors=((2, 1.2), (4, 2.0)))
    assert [model.lane_factor(k) for k in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.2, 1.6, 2.0, 2.8])
    assert LatencyModel(0.1, 0, 0, 0, interference=0.1).lane_factor(4) == pytest.approx(1.3)
    assert model.cores_for(1, 0.12, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: LatencyModel(-1, 0, 0, 1), "gamma_s"),
        (lambda m: LatencyModel(math.nan, 0, 0, 1), "gamma_s"),
        (lambda m: LatencyModel(0, -1, 0, 0), "gamma_s, epsilon_s"),
        (lambda m: LatencyModel(1, 0, 0, 0, interference=-0.1), "interference"),
        (lambda m: LatencyModel(1, 0, 0, 0, lane_factors=((2, 1.5), (3, 1.2))), "lane_factors"),
        (lambda m: LatencyTable(1, 0, 0, 0, batch_sizes=[2, 1], cores=[1], table_s=[[1], [1]]), "batch_sizes"),
        (lambda m: LatencyTable(1, 0, 0, 0, batch_sizes=[1], cores=[1, 2], table_s=[[1, 2]]), "table_s"),
        (lambda m: LatencyTable(1, 0, 0, 0, batch_sizes=[1], cores=[1, 2], table_s=[[1]]), "table_s"),
        (lambda m: m.latency_s(0, 1), "batch_size"),
        (lambda m: m.latency_s(1, 0), "cores"),
        (lambda m: m.latency_s(1, math.nan), "cores"),
        (lambda m: m.latency_s(np.array([1, 0]), 1), "batch_size"),
        (lambda m: m.latency_s(1, 1, 0), "lanes"),
        (lambda m: m.cores_for(0, 1), "batch_size"),
        (lambda m: m.cores_for(1, 1.0, 0), "lanes"),
    ],
)
def test_bad_arguments_are_named(call: Any, name: str) -> None:
    """An error tells which argument was wrong."""
    with pytest.raises(ValueError, match=name):
        call(LatencyModel(1, 0, 0, 0))
