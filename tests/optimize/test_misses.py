"""How few deadlines any schedule misses: never more than the best schedule, and exact where room is scarce."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from sponge.core.latency import LatencyModel
from sponge.optimize import misses
from sponge.optimize.clairvoyant import bound
from sponge.optimize.envelope import Limits, Widths
from tests.optimize.schedules import Machine, schedules
from tests.optimize.test_clairvoyant import MODEL, bound_of, instances

UNIT = LatencyModel(0.0, 0.0, 0.0, 1.0)
"""Every batch takes a second, whatever it has."""
SLOW = LatencyModel(1.0, 0.0, 0.0, 0.0)
"""A core-second for each request."""


def least(latency: LatencyModel, arrived: list[float], deadline: list[float], *, lanes: int, cores: float = 1.0) -> int:
    return bound(
        arrived, deadline, latency, max_cores=cores, max_batch_size=1, max_lanes=lanes, core_step=1.0
    ).misses_at_least


@settings(max_examples=100, deadline=None)
@given(instances(most=5).filter(lambda instance: instance[0].lanes * len(instance[0].widths) <= 4))
def test_the_best_schedule_misses_as_many_or_more(instance: tuple[Machine, list[float], list[float]]) -> None:
    """Avoidable misses are what exceeds this number: were it too high, a bad policy would look good."""
    machine, arrived, deadline = instance
    fewest = min(missed for missed, _ in schedules(machine, arrived, deadline))
    found = bound_of(machine, arrived, deadline)
    assert found.lost_at_arrival <= found.misses_at_least <= fewest


def test_lost_at_arrival_is_what_all_cores_cannot_save() -> None:
    """Alone on the whole machine, and still too late; rounding is no reason to write a request off."""
    latency_s = MODEL.latency_s(1, 16)
    budgets_s = np.array([latency_s * 0.999, latency_s * (1 - 1e-12), latency_s, 1.0, -2.0])
    assert misses.lost_at_arrival(budgets_s, MODEL, 16.0).tolist() == [True, False, False, False, True]


def test_crowd_is_turned_away_in_whole_requests() -> None:
    """Three at once, room for one, twice: four are missed, and it shows without trying anything."""
    assert least(UNIT, [0.0] * 3 + [10.0] * 3, [1.5] * 3 + [11.5] * 3, lanes=1) == 4


def test_more_lanes_make_more_room_but_not_more_cores() -> None:
    """Two lanes save two of three where cores do not matter, and one where the work has to share a core."""
    assert least(UNIT, [0.0] * 3, [1.5] * 3, lanes=2, cores=2.0) == 1
    assert least(SLOW, [0.0] * 3, [1.5] * 3, lanes=2, cores=1.0) == 2


def test_long_overload_is_seen_by_its_work() -> None:
    """1000 requests in 100 s at one per second: no short span tells how many are missed."""
    arrived = np.linspace(0.0, 100.0, 1000).tolist()
    found = least(SLOW, arrived, [start + 5.0 for start in arrived], lanes=4)
    assert 1000 - 105 <= found <= 1000 - 99


def test_urgent_requests_cannot_ride_in_long_batches() -> None:
    """Throughput comes from large batches, which those in a hurry do not have the time for."""
    model = LatencyModel(0.0, 0.0, 0.1, 1.0)  # one: 1.1 s; eight: 1.8 s
    arrived = np.repeat(np.arange(0.0, 50.0, 1.0), 2)
    found = bound(arrived, arrived + 1.15, model, max_cores=1.0, max_batch_size=8, max_lanes=1)
    assert found.misses_at_least >= 100 - 50.0 / 1.1 - 2


def test_rounding_makes_no_misses() -> None:
    """0.03 − 0.02 is less than 0.01, and late on a clock by a lot; yet a batch of 0.01 s fits between."""
    model = LatencyModel(0.0, 0.0, 0.0, 0.01)
    assert (0.02 + 0.01) - 0.02 < 0.01
    assert (1e7 + 0.02 + 0.01) - (1e7 + 0.02) < 0.01 * (1 - 1e-9)
    for lanes in (1, 2):
        for start in (0.02, 1e7 + 0.02):
            found = bound([start] * 2, [start + 0.01] * 2, model, max_cores=2, max_batch_size=2, max_lanes=lanes)
            assert found.misses_at_least == 0


def test_wide_batches_leave_less_room_for_many() -> None:
    """In 0.4 s a batch needs 4 of 8 cores, and so half of the machine, though narrow ones would do with an eighth."""
    model = LatencyModel(0.8, 0.0, 0.0, 0.2)
    assert least(model, [0.0] * 4, [0.4 + 1e-6] * 4, lanes=8, cores=8.0) == 2
    assert least(model, [0.0] * 8, [1.0 + 1e-6] * 8, lanes=8, cores=8.0) == 0


def test_urgent_requests_need_wide_batches_all_along() -> None:
    """As above, in a stream without a crowd at any time: ten a second, of which the machine can save five."""
    model = LatencyModel(0.8, 0.0, 0.2, 0.0)  # two on all cores: 0.6 s
    arrived = np.arange(200) * 0.1
    found = bound(arrived, arrived + 0.4, model, max_cores=8, max_batch_size=2, max_lanes=8, core_step=1.0)
    assert 200 - 5 * 20.5 <= found.misses_at_least <= 100


def test_less_urgent_requests_can_ride_together() -> None:
    """Two at a time fit, three would not: a schedule that misses nothing is at hand."""
    model = LatencyModel(0.0, 0.0, 0.1, 1.0)
    arrived = np.repeat(np.arange(10) * 1.25, 2)
    found = bound(arrived, arrived + 1.25, model, max_cores=1, max_batch_size=3, max_lanes=1)
    assert found.misses_at_least == 0


def test_room_of_one_lane_is_exact() -> None:
    """How many requests fit into a time, batch after batch, found by trying all sequences."""
    model = LatencyModel(0.05, 0.0, 0.01, 0.1)
    widths = Widths.between(1.0, 2.0, 1.0)
    limits = Limits(latency=model, widths=widths, max_cores=2.0, max_batch_size=3)
    spans_s = np.linspace(0.01, 1.5, 60)
    found = misses.most_in(spans_s, limits, 1, np.inf)

    def most(left_s: float) -> int:
        fits = [b for b in (1, 2, 3) if model.latency_s(b, 2.0) <= left_s]
        return max([b + most(left_s - model.latency_s(b, 2.0)) for b in fits], default=0)

    assert found.tolist() == [most(float(span_s)) for span_s in spans_s]


@pytest.mark.parametrize("lanes", [1, 4])
def test_budgets_of_hours_hide_no_crowd_and_take_no_time(lanes: int) -> None:
    """A lane could serve 86 billion such requests before the last deadline; counting them would take for ever."""
    quick = LatencyModel(0.0, 0.0, 0.0, 1e-6)
    arrived = [0.0] * (lanes + 3) + [5.0]
    deadline = [1.5e-6] * (lanes + 3) + [86400.0]
    assert least(quick, arrived, deadline, lanes=lanes, cores=float(lanes)) == 3


@pytest.mark.parametrize("lanes", [1, 4])
def test_light_load_misses_nothing(lanes: int) -> None:
    """Zero where a schedule without a miss is at hand."""
    arrived = np.arange(100) * 1.0
    found = bound(arrived, arrived + 0.5, MODEL, max_cores=16, max_batch_size=8, max_lanes=lanes)
    assert (found.lost_at_arrival, found.misses_at_least) == (0, 0)
