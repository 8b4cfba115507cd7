"""The largest demand of a sliding window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sponge.core.reserve import PeakDemand

steps = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5).map(float)), min_size=1, max_size=40)


@given(steps, st.floats(0.1, 5))
def test_peak_is_the_largest_of_the_window(found: list[tuple[float, float]], window_s: float) -> None:
    """Against keeping everything: the latest demand counts, and whatever was observed within the window."""
    peak = PeakDemand(window_s)
    now = 0.0
    seen: list[tuple[float, float]] = []
    for gap_s, cores in found:
        now += gap_s
        peak.observe(now, cores)
        seen.append((now, cores))
        assert peak.cores(now) == max([c for t, c in seen if t + window_s > now] + [cores])


@given(steps, st.floats(0.1, 5))
def test_change_is_announced(found: list[tuple[float, float]], window_s: float) -> None:
    """Whoever sleeps until then finds a lower peak, and not before; in the end nothing is announced."""
    peak = PeakDemand(window_s)
    now = 0.0
    for gap_s, cores in found:
        now += gap_s
        peak.observe(now, cores)
    while (change := peak.changes_at(now)) != float("inf"):
        before = peak.cores(now)
        assert change > now
        assert peak.cores(change) < before
        now = change
    assert peak.cores(now) == found[-1][1]
