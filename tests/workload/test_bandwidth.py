"""Uploads under a changing bandwidth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sponge.workload import BandwidthTrace, lte_like


def step_trace(*steps: tuple[float, float], loops: bool = True) -> BandwidthTrace:
    """Make a trace of (duration [s], bandwidth [bytes/s]) steps."""
    edges = np.concatenate([[0.0], np.cumsum([duration for duration, _ in steps])])
    return BandwidthTrace(times_s=edges[:-1], bytes_per_s=[rate for _, rate in steps], end_s=edges[-1], loops=loops)


def upload_by_stepping(trace: BandwidthTrace, sent_at_s: float, payload_bytes: float) -> float:
    """Walk from step to step and take from the payload what each delivers: slow, but plainly right."""
    edges = [*trace.times_s.tolist(), trace.end_s]
    rates = trace.bytes_per_s.tolist()
    if trace.loops:
        position = math.fmod(sent_at_s, trace.end_s)
    else:
        position = sent_at_s
        edges[-1] = math.inf
    step = max(i for i in range(len(rates)) if edges[i] <= position)
    elapsed, left = 0.0, payload_bytes
    while left > 0:
        length = edges[step + 1] - position
        if rates[step] * length >= left if math.isfinite(length) else rates[step] > 0:
            return elapsed + left / rates[step]
        if math.isinf(length):
            return math.inf
        left -= rates[step] * length
        elapsed += length
        step = (step + 1) % len(rates)
        position = edges[step]
    return elapsed


steps = st.lists(
    st.tuples(st.floats(0.05, 5.0), st.one_of(st.just(0.0), st.floats(1.0, 1e6))), min_size=1, max_size=8
).filter(lambda pairs: any(rate > 0 for _, rate in pairs))


@settings(max_examples=400, deadline=None)
@given(steps, st.booleans(), st.floats(0.0, 40.0), st.floats(0.01, 5.0))
def test_upload_time_equals_stepping_through_the_trace(
    pairs: list[tuple[float, float]], loops: bool, sent_at_s: float, share: float
) -> None:
    """Budgets are wrong if an upload is; outages, loops and held ends are all in here."""
    trace = step_trace(*pairs, loops=loops)
    payload = share * max(rate for _, rate in pairs)
    got = float(trace.upload_time_s(sent_at_s, payload))
    expected = upload_by_stepping(trace, sent_at_s, payload)
    if math.isinf(expected) or math.isinf(got):
        # At the very end of a trace that holds an outage, rounding decides between "just done" and "never".
        delivered = sum(duration * rate for duration, rate in pairs)
        on_the_edge = not loops and math.isclose(payload, delivered, rel_tol=1e-6)
        assert got == expected or on_the_edge
        return
    # Rounding of the bytes delivered so far shifts the crossing by at most one outage if it falls on its
    # edge.
    before = float(trace.upload_time_s(sent_at_s, payload * (1 - 1e-9)))
    after = float(trace.upload_time_s(sent_at_s, payload * (1 + 1e-9)))
    assert before - 1e-6 <= expected <= after + 1e-6
    assert before - 1e-6 <= got <= after + 1e-6


def test_outage_is_waited_out() -> None:
    """Dividing by the bandwidth of an outage would give infinity; the real upload ends when it is over."""
    trace = step_trace((1.0, 100.0), (2.0, 0.0), (1.0, 50.0))
    assert trace.upload_time_s(0.5, 75.0) == pytest.approx(0.5 + 2.0 + 0.5)
    assert trace.upload_time_s(1.2, 10.0) == pytest.approx(1.8 + 0.2)
    assert trace.upload_time_s(1.2, 10.0, shortcut=True) == math.inf


def test_upload_that_ends_with_the_step_does_not_wait_for_the_outage_after_it() -> None:
    """The first instant by which all bytes are there counts."""
    trace = step_trace((1.0, 100.0), (2.0, 0.0))
    assert trace.upload_time_s(0.0, 100.0) == 1.0
    assert step_trace((1.0, 0.0), (1.0, 100.0)).upload_time_s(0.0, 300.0) == pytest.approx(6.0)


def test_looping_trace_repeats_and_other_trace_holds_its_last_bandwidth() -> None:
    """What lies beyond the log is a choice, and must be the one that the caller made."""
    looping = step_trace((1.0, 100.0), (1.0, 10.0))
    assert looping.upload_time_s(1.0, 60.0) == pytest.approx(1.5)
    assert looping.upload_time_s(21.0, 60.0) == pytest.approx(1.5)
    assert looping.upload_time_s(0.0, 1100.0) == pytest.approx(20.0)
    held = step_trace((1.0, 100.0), (1.0, 10.0), loops=False)
    assert held.upload_time_s(1.0, 60.0) == pytest.approx(6.0)
    assert held.upload_time_s(50.0, 60.0) == pytest.approx(6.0)
    assert step_trace((1.0, 100.0), (1.0, 0.0), loops=False).upload_time_s(0.5, 60.0) == math.inf


def test_shortcut_divides_by_the_bandwidth_of_the_sending_instant() -> None:
    """It is what the published results did, so it must be that exactly, dips and all."""
    trace = step_trace((1.0, 100.0), (1.0, 10.0), (1.0, 400.0))
    times = trace.upload_time_s([0.0, 0.999, 1.0, 2.5, 3.0], 100.0, shortcut=True)
    assert times.tolist() == pytest.approx([1.0, 1.0, 10.0, 0.25, 1.0])


def test_empty_payload_takes_no_time_even_in_an_outage() -> None:
    """A request without a body is not held up by bandwidth."""
    trace = step_trace((1.0, 0.0), (1.0, 10.0))
    assert trace.upload_time_s([0.0, 0.5], 0.0).tolist() == [0.0, 0.0]
    assert trace.upload_time_s(0.0, 0.0, shortcut=True) == 0.0


def test_upload_times_broadcast() -> None:
    """Many requests of one size, or one instant and many sizes, are one call."""
    trace = step_trace((1.0, 100.0))
    assert trace.upload_time_s(np.zeros((3, 1)), [10.0, 20.0]).shape == (3, 2)
    assert trace.upload_time_s([], 10.0).shape == (0,)


def test_resampling_keeps_the_bytes() -> None:
    """A picture of a packet-level log per second must not invent or lose data."""
    trace = step_trace((0.4, 100.0), (1.1, 10.0), (0.7, 0.0))
    coarse = trace.resample(1.0)
    assert coarse.times_s.tolist() == [0.0, 1.0, 2.0]
    assert coarse.bytes_per_s.tolist() == pytest.approx([46.0, 5.0, 0.0])
    assert coarse.mean_bytes_per_s == pytest.approx(trace.mean_bytes_per_s)


def test_bandwidth_at_an_instant_is_that_of_the_step_that_begins_there() -> None:
    """Half-open steps leave no instant without a bandwidth, and none with two."""
    trace = step_trace((1.0, 100.0), (1.0, 10.0))
    assert trace.at([0.0, 1.0, 1.999, 2.0, 3.5]).tolist() == [100.0, 10.0, 10.0, 100.0, 10.0]


@pytest.mark.parametrize(
    ("times_s", "bytes_per_s", "end_s", "word"),
    [
        ([], [], 1.0, "empty"),
        ([0.0, 1.0], [1.0], 2.0, "equal length"),
        ([1.0], [1.0], 2.0, "start at 0"),
        ([0.0, 2.0, 1.0], [1.0, 1.0, 1.0], 3.0, "increasing"),
        ([0.0, 1.0], [1.0, 1.0], 1.0, "increasing"),
        ([0.0], [-1.0], 1.0, "between 0"),
        ([0.0], [math.nan], 1.0, "between 0"),
        ([0.0], [1.0], math.inf, "finite"),
        ([0.0], [1.0], 1e-6, "end_s"),
        ([0.0], [0.0], 1.0, "carry data"),
    ],
)
def test_impossible_traces_are_refused(times_s: list[float], bytes_per_s: list[float], end_s: float, word: str) -> None:
    """Found at construction, so that no later sum can be wrong."""
    with pytest.raises(ValueError, match=word):
        BandwidthTrace(times_s=times_s, bytes_per_s=bytes_per_s, end_s=end_s)


@pytest.mark.parametrize(("sent", "payload"), [(-1.0, 1.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_uploads_are_refused(sent: float, payload: float) -> None:
    """A negative time would read the trace backwards without a word."""
    with pytest.raises(ValueError, match=r"sent_at_s|payload_bytes"):
        step_trace((1.0, 1.0)).upload_time_s(sent, payload)


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Return the autocorrelation of a stationary series at a lag."""
    centred = values - values.mean()
    return float((centred[:-lag] * centred[lag:]).mean() / (centred**2).mean())


def test_generated_traces_have_the_documented_statistics() -> None:
    """The docstring's figures are what a reader judges the demo by; a long run must show them.

    The standard error of the mean of 40,000 correlated seconds (effective size about 40,000/12) is 0.65 %;
    the bounds leave five of them.
    """
    rate = lte_like(40_000, np.random.default_rng(7)).bytes_per_s
    mean = float(rate.mean())
    assert mean == pytest.approx(3.45e6, rel=0.035)
    assert float(rate.std()) / mean == pytest.approx(0.37, abs=0.025)
    assert autocorrelation(rate, 1) == pytest.approx(0.75, abs=0.03)
    assert autocorrelation(rate, 2) == pytest.approx(0.63, abs=0.04)
    assert autocorrelation(rate, 5) == pytest.approx(0.39, abs=0.05)
    assert float((rate < 0.3 * mean).mean()) == pytest.approx(0.012, abs=0.005)


def test_generated_dips_can_be_outages() -> None:
    """``dip_depth=0`` turns dips into outages of the documented share and length."""
    rate = lte_like(40_000, np.random.default_rng(7), dip_share=0.1, dip_depth=0.0, dip_length_s=4.0).bytes_per_s
    out = rate == 0
    starts = int(np.sum(out[1:] & ~out[:-1]))
    assert float(out.mean()) == pytest.approx(0.1, abs=0.02)
    assert float(out.sum()) / starts == pytest.approx(4.0, abs=0.5)
    assert float(rate.mean()) == pytest.approx(3.45e6, rel=0.05)


def test_generator_repeats_with_its_seed_and_leaves_global_randomness_alone() -> None:
    """Every policy of a comparison must meet the same network."""
    before = np.random.get_state()[1].tolist()
    first = lte_like(60, np.random.default_rng(3)).bytes_per_s
    assert np.array_equal(first, lte_like(60, np.random.default_rng(3)).bytes_per_s)
    assert not np.array_equal(first, lte_like(60, np.random.default_rng(4)).bytes_per_s)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"duration_s": 0.5},
        {"mean_bytes_per_s": 0.0},
        {"sigma": -1.0},
        {"correlation": 1.0},
        {"noise_share": 2.0},
        {"dip_share": 0.5},
        {"dip_depth": 2.0},
        {"dip_length_s": 0.5},
    ],
)
def test_generator_refuses_parameters_out_of_range(wrong: dict[str, float]) -> None:
    """Named in the message, as everywhere."""
    arguments = {"duration_s": 10.0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lte_like(rng=np.random.default_rng(0), **arguments)
