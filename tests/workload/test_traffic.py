"""Surges and Markov-modulated arrivals, payload sizes, SLO classes, and the workloads made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sponge.workload import (
    PROCESSES,
    BandwidthTrace,
    SloClass,
    Traffic,
    constant,
    empirical,
    fixed,
    lognormal,
    markov,
    rate_trace,
    surges,
)

LINK = BandwidthTrace(times_s=[0.0], bytes_per_s=[1e6], end_s=1.0)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def markov_variance(rate: float, duration: float, factor: float, calm: float, busy: float) -> float:
    """Variance of the number of requests of a stationary two-state process, from its autocovariance."""
    share, tau = busy / (calm + busy), 1 / (1 / calm + 1 / busy)
    calm_rate = rate * (calm + busy) / (calm + factor * busy)
    step = (factor - 1) * calm_rate
    decay = duration / tau - 1 + math.exp(-duration / tau)
    return rate * duration + 2 * share * (1 - share) * (step * tau) ** 2 * decay


@pytest.mark.parametrize("duration", [1.0, 45.0, 100.0])
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_every_process_keeps_its_mean_rate_at_any_length(name: str, duration: float) -> None:
    """Also when a surge is cut by the end: a process that offers more than it says spoils every comparison by load.

    The mean over n runs may stray five standard errors; the widest variance is that of the Markov process.
    """
    runs = 400
    counts = [len(PROCESSES[name](20.0, duration, rng(seed))) for seed in range(runs)]
    error = math.sqrt(markov_variance(20.0, duration, 4.0, 8.0, 2.0) / runs)
    assert np.mean(counts) == pytest.approx(20.0 * duration, abs=5 * error)


def test_markov_counts_have_the_variance_of_their_formula() -> None:
    """Bursts of the stated size and length: a Poisson process would have a tenth of it.

    A sample variance of n nearly normal counts has a relative standard error of sqrt(2/n): 5 % with 800.
    """
    counts = [len(markov(20.0, 60.0, rng(seed))) for seed in range(800)]
    expected = markov_variance(20.0, 60.0, 4.0, 8.0, 2.0)
    assert expected > 5 * 20.0 * 60.0
    assert np.var(counts) == pytest.approx(expected, rel=0.25)


def test_markov_of_equal_rates_is_poisson() -> None:
    """With a factor of 1 the states do not matter: the variance of the count is its mean."""
    counts = [len(markov(20.0, 10.0, rng(seed), factor=1.0)) for seed in range(800)]
    assert np.var(counts) == pytest.approx(200.0, rel=0.25)


def test_surges_are_three_times_as_dense_as_the_rest() -> None:
    """Ten seconds in the middle of each minute; of 200 minutes, to within five standard errors."""
    times = np.mod(surges(20.0, 12_000.0, rng(0)), 60.0)
    inside = np.count_nonzero((times >= 25.0) & (times < 35.0)) / 10.0
    outside = np.count_nonzero((times < 25.0) | (times >= 35.0)) / 50.0
    expected = 20.0 * 60 / 80 * 200
    assert outside == pytest.approx(expected, abs=5 * math.sqrt(expected / 50))
    assert inside == pytest.approx(3 * expected, abs=5 * math.sqrt(3 * expected / 10))


def test_short_workload_has_one_short_surge() -> None:
    """Twelve seconds of a minute's pattern hold two seconds of surge, from the fifth second on."""
    times = np.concatenate([surges(100.0, 12.0, rng(seed)) for seed in range(200)])
    inside = np.count_nonzero((times >= 5.0) & (times < 7.0)) / 2.0
    outside = np.count_nonzero((times < 5.0) | (times >= 7.0)) / 10.0
    assert inside / outside == pytest.approx(3.0, rel=0.05)


def test_rate_trace_follows_its_steps() -> None:
    """Nothing in an outage, and each step's own density; what begins after the end does not count."""
    times = rate_trace([0.0, 100.0, 200.0, 500.0], [50.0, 0.0, 10.0, 1e6], 400.0, rng(0))
    assert np.all(np.diff(times) >= 0)
    counts = np.histogram(times, [0.0, 100.0, 200.0, 400.0])[0]
    assert counts[0] == pytest.approx(5000, abs=5 * math.sqrt(5000))
    assert counts[1] == 0
    assert counts[2] == pytest.approx(2000, abs=5 * math.sqrt(2000))
    assert len(times) == counts.sum()


def test_rate_trace_refuses_what_is_no_step_function() -> None:
    """Told by name, before numpy does."""
    for times, rates, word in [
        ([1.0], [1.0], "times_s"),
        ([0.0, 2.0, 1.0], [1.0, 1.0, 1.0], "times_s"),
        ([0.0], [-1.0], "rates_rps"),
        ([0.0], [math.inf], "rates_rps"),
        ([0.0], [1e9], "rates_rps"),
        ([0.0, 1.0], [1.0], "equal length"),
        ([], [], "not empty"),
    ]:
        with pytest.raises(ValueError, match=word):
            rate_trace(times, rates, 10.0, rng(0))


def test_modulated_processes_refuse_what_cannot_be() -> None:
    """A surge that is longer than its period, or a state without length."""
    with pytest.raises(ValueError, match="factor"):
        surges(1.0, 1.0, rng(0), factor=0.5)
    with pytest.raises(ValueError, match="length_s"):
        surges(1.0, 1.0, rng(0), length_s=61.0)
    with pytest.raises(ValueError, match="factor"):
        markov(1.0, 1.0, rng(0), factor=math.inf)
    with pytest.raises(ValueError, match="busy_s"):
        markov(1.0, 1.0, rng(0), busy_s=0.0)
    with pytest.raises(ValueError, match="calm_s"):
        markov(1.0, 1.0, rng(0), calm_s=1e-12)


def test_lognormal_sizes_have_their_mean_and_spread() -> None:
    """To five standard errors of 100,000 sizes, the variance's by the kurtosis of this distribution (11.7)."""
    sizes = lognormal(300e3, 0.6)(100_000, rng(0))
    assert sizes.min() > 0
    assert sizes.mean() == pytest.approx(300e3, rel=5 * 0.6 / math.sqrt(1e5))
    assert sizes.std() == pytest.approx(180e3, rel=5 * math.sqrt(10.7 / 1e5) / 2)
    assert np.allclose(lognormal(300e3, 0.0)(10, rng(0)), 300e3)


def test_empirical_sizes_are_those_observed_in_their_shares() -> None:
    """Two of three are small."""
    sizes = empirical([1e3, 1e3, 9e5])(30_000, rng(0))
    assert set(sizes.tolist()) == {1e3, 9e5}
    assert np.mean(sizes == 1e3) == pytest.approx(2 / 3, abs=5 * math.sqrt(2 / 9 / 30_000))
    assert fixed(5.0)(3, rng(0)).tolist() == [5.0, 5.0, 5.0]


def test_payloads_refuse_what_is_no_size() -> None:
    """At once, not when the first request is made."""
    for make, word in [
        (lambda: fixed(-1.0), "size_bytes"),
        (lambda: fixed(math.nan), "size_bytes"),
        (lambda: lognormal(-1.0, 0.5), "mean_bytes"),
        (lambda: lognormal(1.0, -0.5), "cv"),
        (lambda: empirical([]), "not empty"),
        (lambda: empirical([1.0, math.inf]), "sizes_bytes"),
    ]:
        with pytest.raises(ValueError, match=word):
            make()


def test_classes_come_in_the_shares_of_their_weights() -> None:
    """Each request keeps the deadline of its class, in whatever order it arrives."""
    slos = (SloClass(0.5, 1.0), SloClass(2.0, 3.0))
    workload = Traffic(rate_rps=50.0, duration_s=200.0, slos=slos).workload(LINK, 0)
    tight = np.isclose(workload.slo_s, 0.5)
    assert np.all(tight | np.isclose(workload.slo_s, 2.0))
    assert tight.mean() == pytest.approx(0.25, abs=5 * math.sqrt(3 / 16 / len(workload)))


def test_sizes_and_classes_leave_the_send_times_alone() -> None:
    """One seed is one set of clients: a comparison over payloads must not compare other instants."""
    plain = Traffic(rate_rps=20.0, duration_s=50.0, payload=fixed(1e5)).workload(LINK, 7)
    slos = (SloClass(0.5), SloClass(1.0))
    mixed = Traffic(rate_rps=20.0, duration_s=50.0, payload=lognormal(1e5, 0.5), slos=slos).workload(LINK, 7)
    assert np.array_equal(np.sort(plain.sent_at_s), np.sort(mixed.sent_at_s))
    assert plain.network_s == pytest.approx(0.1)
    assert mixed.network_s.std() > 0.03
    other = Traffic(rate_rps=20.0, duration_s=50.0, payload=fixed(1e5)).workload(LINK, 8)
    assert not np.array_equal(plain.sent_at_s, other.sent_at_s)


def test_traffic_refuses_what_cannot_be() -> None:
    """With the name of what is wrong."""
    with pytest.raises(ValueError, match="rate_rps"):
        Traffic(rate_rps=0.0, duration_s=1.0)
    with pytest.raises(ValueError, match="duration_s"):
        Traffic(rate_rps=1.0, duration_s=math.inf)
    with pytest.raises(ValueError, match="slos"):
        Traffic(rate_rps=1.0, duration_s=1.0, slos=())
    with pytest.raises(ValueError, match="slo_s"):
        SloClass(0.0)
    with pytest.raises(ValueError, match="weight"):
        SloClass(1.0, 0.0)


def test_traffic_takes_any_process() -> None:
    """Also one of the user's own: here, a constant one entered elsewhere in the trace."""
    link = BandwidthTrace(times_s=[0.0, 10.0], bytes_per_s=[1e6, 1e5], end_s=20.0)
    traffic = Traffic(rate_rps=2.0, duration_s=5.0, arrivals=constant, payload=fixed(1e4))
    assert traffic.workload(link, 0).network_s == pytest.approx(0.01)
    assert traffic.workload(link, 0, offset_s=10.0).network_s == pytest.approx(0.1)
