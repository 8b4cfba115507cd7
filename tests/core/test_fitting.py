"""Fits recover what made the data, resist stragglers, and say when the form does not suit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.core import fitting
from sponge.core.latency import LatencyModel, LatencyTable
from sponge.core.percentiles import order_statistic_ranks, percentile_interval
from sponge.core.values import intra_op_threads
from sponge.profile import Cell, Profile

BATCHES = (1, 2, 4, 8, 16)
CORES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)


def profile_of(latency, *, batches=BATCHES, cores=CORES, lanes=(1,), runs=1, noise=0.0, stragglers=0.0, seed=0):  # type: ignore[no-untyped-def]
    """Make a profile of samples around ``latency(b, c, k)``: log-normal noise, some runs twice as slow."""
    rng = np.random.default_rng(seed)
    return Profile(
        cells=[
            Cell.of(
                batch_size=b,
                cores=c,
                lanes=k,
                threads=intra_op_threads(c),
                samples_s=latency(b, c, k) * np.exp(rng.normal(0, noise, runs)) * (1 + (rng.random(runs) < stragglers)),
            )
            for b, c, k in itertools.product(batches, cores, lanes)
        ]
    )


def terms(model: LatencyModel) -> list[float]:
    return [model.gamma_s, model.epsilon_s, model.delta_s, model.eta_s]


def test_yolov5s_coefficients_come_back() -> None:
    """A grid made from the published coefficients of YOLOv5s, negative ε included, gives them back."""
    true = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221)
    profile = profile_of(true.latency_s, batches=(1, 2, 4, 8), cores=(1, 2, 4, 8, 16))
    model = LatencyModel.fit(profile, percentile=99)
    assert type(model) is LatencyModel
    assert terms(model) == pytest.approx(terms(true), abs=2e-5)
    assert model.report is not None
    assert model.report.form == "four-term"
    assert model.report.worst_error < 1e-3


def test_noise_and_stragglers_bend_the_median_fit_little() -> None:
    """One run in fifty twice as slow, 3 % noise: the surface stays within a few per cent."""
    true = LatencyModel(0.02, 0.005, 0.002, 0.003)
    profile = profile_of(true.latency_s, runs=60, noise=0.03, stragglers=0.02)
    model = LatencyModel.fit(profile, percentile=50)
    b, c = np.array(BATCHES)[:, None], np.array(CORES)
    np.testing.assert_allclose(model.latency_s(b, c), true.latency_s(b, c), rtol=0.05)


def test_a_spoilt_cell_is_taken_for_an_outlier() -> None:
    """One cell that met a disturbed host must not bend the others."""
    true = LatencyModel(0.02, 0.005, 0.002, 0.003)
    profile = profile_of(lambda b, c, k: true.latency_s(b, c) * (1.25 if (b, c) == (4, 2.0) else 1.0))
    model = LatencyModel.fit(profile)
    assert terms(model) == pytest.approx(terms(true), rel=0.02, abs=2e-4)
    assert model.report is not None
    cell = next(cell for cell in model.report.cells if (cell.batch_size, cell.cores) == (4, 2.0))
    assert cell.weight < 0.5
    assert cell.relative_error == pytest.approx(-0.2, abs=0.02)
    assert "outliers" in model.report.explain()


def test_super_linear_model_gets_a_table_and_is_told_why() -> None:
    """Latency that grows with b² is not of the form; the table follows it and the report says so."""
    profile = profile_of(lambda b, c, k: 0.002 * b**2 / c + 0.004 / c + 0.001)
    model = LatencyModel.fit(profile)
    assert isinstance(model, LatencyTable)
    assert model.report is not None
    assert model.report.form == "table"
    assert model.report.mean_error < 0.01 < fitting.MEAN_ERROR_LIMIT < model.report.four_term_mean_error
    assert "Latency table, as the four-term form is" in model.report.explain()
    assert model.latency_s(16, 2.0) == pytest.approx(0.002 * 128 + 0.002 + 0.001, rel=1e-3)


def test_scatter_of_a_few_runs_does_not_make_a_table() -> None:
    """A table would follow chance; three runs per cell that scatter by a third speak for the smoother form."""
    true = LatencyModel(0.02, 0.005, 0.002, 0.003)
    profile = profile_of(true.latency_s, runs=3, noise=0.3, seed=5)
    model = LatencyModel.fit(profile, percentile=50)
    assert model.report is not None
    assert model.report.form == "four-term"
    assert model.report.four_term_worst_error > fitting.WORST_ERROR_LIMIT > model.report.four_term_worst_excess


def test_missing_cells_are_filled_with_caution() -> None:
    """A cell that was too slow to measure must not look fast."""
    profile = profile_of(lambda b, c, k: 0.002 * b**2 / c + 0.001)
    cells = [cell for cell in profile.cells if (cell.batch_size, cell.cores) != (16, 0.5)]
    model = LatencyModel.fit(Profile(cells=tuple(cells)))
    assert isinstance(model, LatencyTable)
    assert model.latency_s(16, 0.5) >= 0.002 * 256 / 0.5 + 0.001


def test_linear_interference_becomes_one_coefficient() -> None:
    """Each further lane costs 10 %."""
    true = LatencyModel(0.02, 0.0, 0.001, 0.002, interference=0.1)
    model = LatencyModel.fit(profile_of(true.latency_s, lanes=(1, 2, 4)))
    assert model.interference == pytest.approx(0.1, abs=0.005)
    assert model.lane_factors == ()


def test_other_interference_is_kept_by_lane_count() -> None:
    """Two lanes fit into the cache, four do not."""
    base, factor = LatencyModel(0.02, 0.0, 0.001, 0.002), {1: 1.0, 2: 1.02, 4: 1.8}
    model = LatencyModel.fit(profile_of(lambda b, c, k: base.latency_s(b, c) * factor[k], lanes=(1, 2, 4)))
    assert model.interference == 0.0
    assert [model.lane_factor(k) for k in (1, 2, 4)] == pytest.approx([1.0, 1.02, 1.8], rel=0.01)


def test_fit_needs_a_lone_lane_and_a_sane_percentile() -> None:
    """Bad arguments are named."""
    profile = profile_of(lambda b, c, k: 0.1, lanes=(2,))
    with pytest.raises(ValueError, match="profile"):
        LatencyModel.fit(profile)
    with pytest.raises(ValueError, match="percentile"):
        LatencyModel.fit(profile, percentile=100)


@given(st.lists(st.lists(st.floats(1e-4, 10), min_size=3, max_size=3), min_size=1, max_size=6))
def test_envelope_is_monotone_and_keeps_monotone_grids(rows: list[list[float]]) -> None:
    """The table's promise, whatever was measured."""
    grid = np.array(rows)
    envelope = fitting.monotone_envelope(grid)
    assert np.all(np.diff(envelope, axis=1) <= 0)
    assert np.all(np.diff(envelope, axis=0) >= -1e-12 * envelope[:-1])
    np.testing.assert_allclose(fitting.monotone_envelope(envelope), envelope, rtol=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_nonnegative_least_squares_meets_the_optimality_conditions(seed: int) -> None:
    """Karush-Kuhn-Tucker: zero gradient where positive, no descent where held at zero."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(12, 4)), rng.normal(size=12)
    solution = fitting.nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ solution - target)
    assert np.all(solution >= 0)
    assert np.all(np.abs(gradient[solution > 0]) < 1e-8)
    assert np.all(gradient[solution == 0] > -1e-6)


def test_interval_of_a_percentile_covers_it_as_often_as_promised() -> None:
    """95 % confidence, with any distribution; 20 samples cannot bound a p99 and say so."""
    assert order_statistic_ranks(20, 99)[2] is False
    assert order_statistic_ranks(367, 99)[2] is False
    assert order_statistic_ranks(368, 99)[2] is True
    rng = np.random.default_rng(1)
    true = np.exp(0.5 * 1.2815515655446004)  # p90 of a log-normal, sigma 0.5
    hits = 0
    for _ in range(1_000):
        _, low, high, bounded = percentile_interval(np.sort(np.exp(rng.normal(0, 0.5, 100))), 90)
        hits += bounded and low <= true <= high
    assert hits >= 930  # 950 expected at least; 20 below is 3 standard deviations


def test_few_samples_borrow_their_tail() -> None:
    """Where one run in twenty is a straggler, a p99 of 20 runs is a lottery; pooled over similar cells it is not."""
    true = 2.0 * np.exp(0.03 * 0.8416)  # p99 of the mixture: the 80th percentile of the slow twentieth
    own, pooled = [], []
    for seed in range(10):
        profile = profile_of(
            lambda b, c, k: 0.02 * b / c, cores=(0.5, 1.0), runs=20, noise=0.03, stragglers=0.05, seed=seed
        )
        for estimate, cell in zip(profile.estimates(99), profile.cells, strict=True):
            assert estimate.pooled
            assert not estimate.bounded
            assert estimate.low_s <= estimate.latency_s <= estimate.high_s
            scale = 0.02 * cell.batch_size / cell.cores * true
            own.append(np.log(percentile_interval(np.sort(cell.samples_s), 99)[0] / scale))
            pooled.append(np.log(estimate.latency_s / scale))
    assert np.sqrt(np.mean(np.square(pooled))) < 0.5 * np.sqrt(np.mean(np.square(own)))


def test_many_samples_stand_for_themselves() -> None:
    """A cell with a tail of its own is not bent towards its neighbours."""
    profile = profile_of(lambda b, c, k: 0.02, runs=400, noise=0.1)
    assert not any(estimate.pooled for estimate in profile.estimates(99))
    first = profile.cells[0].samples_s
    assert profile.estimates(99)[0].latency_s == np.percentile(first, 99, method="median_unbiased")
