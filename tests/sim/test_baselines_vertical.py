"""The recommender: its histogram, and an allocation that follows the usage a minute late."""

from __future__ import annotations

import pytest

from sponge.core.actions import SetCpu
from sponge.core.events import BatchFinished, CpuApplied, Tick
from sponge.sim.baselines import RecommenderController
from sponge.sim.baselines.vertical import DecayingHistogram
from tests.sim.scripts import arrived, start


def test_percentile_is_the_end_of_a_bucket() -> None:
    """Never below the sample, and at most 5 % above it."""
    for value in (0.0, 0.001, 0.5, 3.0, 64.0):
        histogram = DecayingHistogram(10.0)
        histogram.add(value, 1.0, 0.0)
        assert value < histogram.percentile(0.9) <= value * 1.05 + 0.001 + 1e-9
    assert DecayingHistogram(10.0).percentile(0.9) == 0.0


def test_samples_halve_with_their_half_life() -> None:
    """A sample of twice the age weighs half: the median of an old 10 and a new 1 is 1, the third quartile 10."""
    histogram = DecayingHistogram(100.0)
    histogram.add(10.0, 1.0, 0.0)
    histogram.add(1.0, 1.0, 100.0)
    assert histogram.percentile(0.66) == pytest.approx(1.0, rel=0.06)
    assert histogram.percentile(0.68) == pytest.approx(10.0, rel=0.06)


def test_old_samples_are_forgotten_without_overflow() -> None:
    """Weights grow instead of decaying; after a month of one-minute half-lives they must still be numbers."""
    histogram = DecayingHistogram(60.0)
    for minute in range(0, 60 * 24 * 30, 45):
        histogram.add(8.0, 1.0, 60.0 * minute)
    histogram.add(1.0, 1.0, 60.0 * 60 * 24 * 31)
    assert histogram.percentile(0.999) == pytest.approx(1.0, rel=0.06)


def test_allocation_follows_the_usage_once_a_minute() -> None:
    """A lane that is busy half of the time on 4 cores uses 2; with its margin that is 2.3, and a bucket's width."""
    s = RecommenderController(4.0, max_batch_size=2, sample_s=10.0, update_s=60.0)
    assert s.handle(arrived(0, 0.0, 9.0), now=0.0) == [SetCpu(4.0), start(0, 0, cores=4.0)]
    s.handle(CpuApplied(4.0), now=0.0)
    changes = []
    for i in range(12):
        assert not s.handle(BatchFinished(0), now=5.0 + 10.0 * i)
        actions = s.handle(arrived(i + 1, 10.0 * (i + 1), 999.0), now=10.0 * (i + 1))
        changes += [(10.0 * (i + 1), action) for action in actions if isinstance(action, SetCpu)]
    ((at, change),) = changes
    assert at == 60.0
    assert change.cores == pytest.approx(1.15 * 2.0, rel=0.06)
    assert s.recommendation_cores() == pytest.approx(1.15 * 2.0, rel=0.06)


def test_usage_is_cut_at_the_samples() -> None:
    """A batch from 5 to 25 s keeps the cores busy for 5, 10 and 5 s of the first three samples."""
    s = RecommenderController(1.0, sample_s=10.0, update_s=30.0, percentile=1.0, margin=1.0, least_change=0.0)
    s.handle(Tick(), now=0.0)
    s.handle(arrived(0, 5.0, 99.0), now=5.0)
    s.handle(BatchFinished(0), now=25.0)
    s.handle(Tick(), now=30.0)
    assert s.recommendation_cores() == pytest.approx(1.0, rel=0.06)
    half = RecommenderController(1.0, sample_s=10.0, update_s=30.0, percentile=0.5, margin=1.0)
    half.handle(Tick(), now=0.0)
    half.handle(arrived(0, 5.0, 99.0), now=5.0)
    half.handle(BatchFinished(0), now=25.0)
    half.handle(Tick(), now=30.0)
    assert half.recommendation_cores() == pytest.approx(0.5, rel=0.06)


def test_idle_service_shrinks_to_the_floor_and_is_then_left_alone() -> None:
    """The controller asks to be woken as long as there is something to give back."""
    s = RecommenderController(4.0, min_cores=0.5, half_life_s=60.0)
    s.handle(Tick(), now=0.0)
    wakeup = s.next_wakeup()
    asked: list[float] = []
    while wakeup is not None:
        asked += [action.cores for action in s.handle(Tick(), now=wakeup) if isinstance(action, SetCpu)]
        wakeup = s.next_wakeup()
    assert asked == [0.5]


def test_small_changes_are_not_followed() -> None:
    """Within a tenth of what is allocated."""
    s = RecommenderController(2.2, sample_s=10.0, update_s=10.0, margin=1.0, max_batch_size=1)
    s.handle(arrived(0, 0.0, 99.0), now=0.0)
    s.handle(CpuApplied(2.2), now=0.0)
    assert s.handle(BatchFinished(0), now=10.0) == []
    assert abs(s.recommendation_cores() - 2.2) < 0.22


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_cores": 0.0},
        {"min_cores": 17.0},
        {"percentile": 0.0},
        {"margin": 0.9},
        {"half_life_s": 0.0},
        {"sample_s": 0.0},
        {"update_s": 20.0},
        {"least_change": -0.1},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """Named in the message."""
    name = next(iter(wrong))
    with pytest.raises(ValueError, match="cores" if name == "initial_cores" else name):
        RecommenderController(**{"initial_cores": 1.0, **wrong})  # type: ignore[arg-type]
