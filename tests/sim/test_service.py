"""How long things take: the noise, the samples of a profile, and allocations that come late."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge import LatencyModel, Profile, Service
from sponge.profile import Cell
from sponge.sim.service import Resizer, Times

MODEL = LatencyModel(gamma_s=0.2, epsilon_s=0.0, delta_s=0.0, eta_s=0.1, interference=0.1)


def profile(*cells: tuple[int, float, int, list[float]]) -> Profile:
    return Profile(
        cells=[
            Cell(batch_size=batch_size, cores=cores, lanes=lanes, threads=1, samples_s=samples)
            for batch_size, cores, lanes, samples in cells
        ]
    )


def factors(service: Service, count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    times = Times(service, seed)
    return np.array([times.factor(1, 1.0, 1) for _ in range(count)])


def test_plain_service_takes_the_model_s_latency() -> None:
    """With interference as the model has it, or as the sweep says instead."""
    times = Times(Service(MODEL), 0)
    assert (times.latency_s(2, 1.0, 1), times.latency_s(2, 2.0, 3)) == pytest.approx((0.5, 0.3 * 1.2))
    assert times.factor(2, 1.0, 1) == 1.0
    assert times.latency_s(2, 0.0, 1) == math.inf
    assert Times(Service(MODEL, interference=0.5), 0).latency_s(2, 2.0, 3) == pytest.approx(0.3 * 2.0)
    assert Times(Service(MODEL, interference=0.0), 0).latency_s(2, 2.0, 3) == pytest.approx(0.3)


@pytest.mark.parametrize("noise", ["lognormal", "gamma"])
@pytest.mark.parametrize("cv", [0.1, 1.0])
def test_noise_has_mean_one_and_the_spread_that_was_asked_for(noise: str, cv: float) -> None:
    """Switching noise on must not make the service faster or slower on average."""
    count = 200_000
    drawn = factors(Service(MODEL, noise_cv=cv, noise=noise), count)  # type: ignore[arg-type]
    # Five standard errors of the mean; those of the spread, of a long-tailed sum, measured on the sample itself.
    assert abs(drawn.mean() - 1.0) < 5 * cv / math.sqrt(count)
    squares = (drawn - 1.0) ** 2
    assert abs(squares.mean() - cv**2) < 5 * squares.std() / math.sqrt(count)
    assert drawn.min() > 0


def test_gamma_noise_of_spread_one_is_exponential() -> None:
    """Which is what the M of queueing theory stands for: a share e^-x lasts longer than x times the mean."""
    drawn = factors(Service(MODEL, noise_cv=1.0, noise="gamma"), 100_000)
    for x in (0.5, 1.0, 3.0):
        share = math.exp(-x)
        assert abs(np.mean(drawn > x) - share) < 5 * math.sqrt(share * (1 - share) / len(drawn))


def test_stragglers_leave_the_noise_of_the_others_alone() -> None:
    """Each kind of chance has its own stream, so that a sweep of one changes nothing else."""
    plain = factors(Service(MODEL, noise_cv=0.3), 20_000)
    mixed = factors(Service(MODEL, noise_cv=0.3, straggler_share=0.01, straggler_factor=4.0), 20_000)
    ratio = mixed / plain
    assert set(np.round(ratio, 9)) == {1.0, 4.0}
    assert abs(np.mean(ratio > 1) - 0.01) < 5 * math.sqrt(0.01 * 0.99 / len(ratio))


def test_noise_of_a_batch_depends_on_its_number_alone() -> None:
    """Neither what the batches are nor the decisions in between shift it."""
    service = Service(MODEL, noise_cv=0.3, decision_s=0.001, decision_cv=1.0)
    times = Times(service, 7)
    shuffled = []
    for k in range(100):
        for _ in range(k % 3):
            times.decision_s()
        shuffled.append(times.factor(1 + k % 4, 1.0 + k % 2, 1 + k % 5))
    assert shuffled == factors(service, 100, seed=7).tolist()
    assert shuffled != factors(service, 100, seed=8).tolist()


def test_slowdown_is_of_the_instant_and_leaves_chance_alone() -> None:
    """So that a forecast with a neighbour, or with the speed that was measured, differs from the one without in nothing
    else."""
    calm = Times(Service(MODEL, noise_cv=0.3), 3)
    disturbed = Times(Service(MODEL, noise_cv=0.3, slowdown=lambda now: 2.0 if now >= 5.0 else 1.0), 3)
    ratios = [disturbed.factor(1, 1.0, 1, now) / calm.factor(1, 1.0, 1, now) for now in (0.0, 4.9, 5.0, 9.0)]
    assert ratios == pytest.approx([1.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize("slowdown", [0.0, -1.0, math.inf, math.nan])
def test_slowdown_that_is_no_factor_is_refused(slowdown: float) -> None:
    """A batch that ends before it starts would stop the simulator without a word."""
    with pytest.raises(ValueError, match=r"slowdown must be above 0 and finite, got .* at 2 s"):
        Times(Service(MODEL, slowdown=lambda _: slowdown), 0).factor(1, 1.0, 1, 2.0)


def test_decisions_take_their_mean_time() -> None:
    """And none, if none was asked for."""
    times = Times(Service(MODEL, decision_s=0.001, decision_cv=0.5), 0)
    drawn = np.array([times.decision_s() for _ in range(20_000)])
    assert abs(drawn.mean() - 0.001) < 5 * 0.0005 / math.sqrt(len(drawn))
    assert Times(Service(MODEL), 0).decision_s() == 0.0


def test_measured_cell_gives_back_its_samples() -> None:
    """All of them, and nothing else: what was measured is not smoothed away."""
    samples = [0.1, 0.11, 0.12, 0.3]
    cells = profile((1, 1.0, 1, samples), (1, 2.0, 1, [0.06, 0.07]), (4, 1.0, 1, [0.4, 0.41]), (4, 2.0, 1, [0.2, 0.21]))
    times = Times(Service(cells), 0)
    drawn = [times.latency_s(1, 1.0, 1) * times.factor(1, 1.0, 1) for _ in range(400)]
    values, counts = np.unique(np.round(drawn, 9), return_counts=True)
    assert values.tolist() == pytest.approx(samples)
    assert counts.min() > 400 / 4 - 5 * math.sqrt(400 * 0.25 * 0.75)


def test_beside_the_measured_cells_samples_move_with_the_model() -> None:
    """The scatter of the nearest cell around what the model of the medians says."""
    cells = profile(
        *((b, c, 1, [0.1 * b / c * k for k in (0.9, 1.0, 1.0, 1.0, 1.5)]) for b in (1, 2, 4) for c in (1.0, 2.0, 4.0))
    )
    times = Times(Service(cells), 0)
    drawn = {round(times.latency_s(3, 2.0, 1) * times.factor(3, 2.0, 1) / 0.15, 2) for _ in range(100)}
    assert drawn == {0.9, 1.0, 1.5}


def test_allocation_without_delay_is_there_at_once() -> None:
    """A quota write."""
    resizer = Resizer(Service(MODEL), 1.0)
    assert resizer.ask(3.0, 5.0)
    assert (resizer.cores, resizer.next_at) == (3.0, math.inf)


def test_first_allocation_is_there_at_once_if_none_was_given() -> None:
    """A service that is up when the workload begins."""
    resizer = Resizer(Service(MODEL, resize_delay_s=1.0), None)
    assert resizer.ask(3.0, 5.0)
    assert not resizer.ask(4.0, 5.5)
    assert (resizer.cores, resizer.next_at) == (3.0, 6.5)
    assert resizer.advance(6.5)
    assert (resizer.cores, resizer.next_at) == (4.0, math.inf)


def test_growth_that_is_no_longer_wanted_does_not_come() -> None:
    """A replica that is starting is given up when fewer are asked for; a later one starts anew."""
    resizer = Resizer(Service(MODEL, resize_delay_s=10.0, shrink_delay_s=0.0), 1.0)
    assert not resizer.ask(4.0, 0.0)
    resizer.ask(2.0, 5.0)
    assert resizer.cores == 1.0
    resizer.ask(4.0, 8.0)
    seen = []
    while resizer.next_at < math.inf:
        now = resizer.next_at
        if resizer.advance(now):
            seen.append((now, resizer.cores))
    # Two have been wanted without a break from 0 on, the rest from 8.
    assert seen == [(10.0, 2.0), (18.0, 4.0)]


delays = st.sampled_from([0.0, 1.0, 2.0, 7.0])


@given(
    grow_s=delays,
    shrink_s=delays,
    initial=st.integers(0, 5),
    asks=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=30),
)
def test_cores_in_force_are_as_defined(
    grow_s: float, shrink_s: float, initial: int, asks: list[tuple[int, int]]
) -> None:
    """At every instant: the least (or most) that was asked for in the window that the two delays span."""
    resizer = Resizer(Service(MODEL, resize_delay_s=grow_s, shrink_delay_s=shrink_s), float(initial))
    log = [(-100.0, float(initial))]
    now = 0.0
    for gap_s, cores in asks:
        until = now + gap_s
        while resizer.next_at <= until:
            at = resizer.next_at
            resizer.advance(at)
            assert resizer.cores == by_definition(log, at, grow_s, shrink_s)
        now = until
        assert resizer.cores == by_definition(log, now, grow_s, shrink_s)
        resizer.ask(float(cores), now)
        log.append((now, float(cores)))
        assert resizer.cores == by_definition(log, now, grow_s, shrink_s)


def by_definition(log: list[tuple[float, float]], now: float, grow_s: float, shrink_s: float) -> float:
    first, last = now - max(grow_s, shrink_s), now - min(grow_s, shrink_s)
    before = [cores for at, cores in log if at <= first][-1]
    within = [cores for at, cores in log if first < at <= last]
    return min([before, *within]) if grow_s >= shrink_s else max([before, *within])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_cv", -0.1),
        ("noise_cv", math.nan),
        ("straggler_share", 1.1),
        ("straggler_factor", 0.5),
        ("interference", -1.0),
        ("resize_delay_s", math.inf),
        ("shrink_delay_s", -1.0),
        ("decision_s", -1.0),
        ("decision_cv", math.inf),
        ("noise", "normal"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: object) -> None:
    """By name, where the service is described and not where it is used."""
    with pytest.raises(ValueError, match=name):
        Service(MODEL, **{name: value})  # type: ignore[arg-type]
