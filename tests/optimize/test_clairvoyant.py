"""The clairvoyant bound: below every real schedule, equal to the best where that is known, and quick to have."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sponge.core.latency import LatencyModel, LatencyTable
from sponge.optimize import envelope
from sponge.optimize.clairvoyant import Bound, bound
from sponge.optimize.envelope import Limits, Widths
from tests.optimize.problems import latencies
from tests.optimize.schedules import Machine, cheapest

MODEL = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221)
"""A detector's p99 latency on CPUs."""


@st.composite
def instances(draw: st.DrawFn, *, most: int = 4) -> tuple[Machine, list[float], list[float]]:
    """Few requests, crowded or not, with budgets about as long as a batch takes."""
    latency = draw(latencies())
    widths = draw(st.sampled_from([(1.0, 2.0), (0.5, 1.0), (1.0, 3.0), (2.0,)]))
    lanes = draw(st.integers(1, 3))
    machine = Machine(
        latency=latency,
        widths=widths,
        max_cores=draw(st.sampled_from([1.0, 1.5, 2.0])) * widths[-1],
        max_batch_size=draw(st.integers(1, 3)),
        lanes=lanes,
        interference=draw(st.booleans()),
    )
    count = draw(st.integers(1, most))
    unit_s = latency.latency_s(1, widths[-1])
    arrived = [draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 3.0)) * unit_s for _ in range(count)]
    budgets = [draw(st.sampled_from([1.0, 2.0]) | st.floats(0.8, 6.0)) * unit_s for _ in range(count)]
    return machine, arrived, [start + budget for start, budget in zip(arrived, budgets, strict=True)]


def bound_of(machine: Machine, arrived: list[float], deadline: list[float], **more: Any) -> Bound:
    steps = {round(b - a, 9) for a, b in itertools.pairwise(machine.widths)}
    more.setdefault("core_step", steps.pop() if steps else 100.0)
    return bound(
        arrived,
        deadline,
        machine.latency,
        max_cores=max(machine.widths) if machine.lanes == 1 else machine.max_cores,
        max_batch_size=machine.max_batch_size,
        max_lanes=machine.lanes,
        min_cores=min(machine.widths),
        charge_interference=machine.interference,
        **more,
    )


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from([0.0, 0.3, 1.0, 5.0]), st.booleans())
def test_no_real_schedule_beats_the_bound(
    instance: tuple[Machine, list[float], list[float]], idle_cores: float, any_share: bool
) -> None:
    """The one property that a bound must have: every schedule, at its own number of misses, costs as much or more."""
    machine, arrived, deadline = instance
    more = {"core_step": None} if any_share else {}
    found = bound_of(machine, arrived, deadline, idle_cores=idle_cores, **more)
    relaxation = found.many_lanes
    best = cheapest(machine, arrived, deadline, idle_cores=idle_cores)
    assert relaxation.misses_at_least <= min(best)
    for misses, core_s in best.items():
        assert relaxation.core_seconds(misses) <= core_s * (1 + 1e-9) + 1e-12


@settings(max_examples=40, deadline=None)
@given(instances(most=3))
def test_many_lanes_are_bounded_below_one(instance: tuple[Machine, list[float], list[float]]) -> None:
    """One lane is a special case of many, so that the bound for many lanes is the one that judges any policy."""
    machine, arrived, deadline = instance
    found = bound_of(machine, arrived, deadline)
    assert found.misses_at_least <= found.one_lane.misses_at_least
    misses = found.one_lane.misses_at_least
    assert found.many_lanes.core_seconds(misses) <= found.one_lane.core_seconds(misses) * (1 + 1e-9)


@pytest.mark.parametrize("budget_s", [0.1, 0.1369, 0.2, 1.0, math.inf])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_request_costs_its_cheapest_width(budget_s: float, batch_size: int) -> None:
    """With nothing to share and nothing to wait for the bound is what a real schedule pays."""
    model = LatencyModel(0.1, 0.02, 0.0, 0.0169)
    deadline = 5.0 + budget_s
    found = bound([5.0], [deadline], model, max_cores=16, max_batch_size=batch_size, max_lanes=4)
    cores = max(1.0, model.cores_for(1, deadline - 5.0))
    alone = cores * model.latency_s(1, cores)
    company = 1.0 if batch_size == 1 else (0.1 * 4 + 0.02 + 0.0169) / 4 / alone
    assert found.core_seconds_lanes <= alone * (1 + 1e-9)
    if batch_size == 1:
        assert found.core_seconds_lanes >= alone * (1 - 2e-3)
    else:  # full batches from the first request on are part of the relaxation
        assert found.core_seconds_lanes >= 0.99 * alone * company


def test_long_uniform_stream_on_one_lane_is_tight() -> None:
    """Full batches back to back at a knot of the envelope cost the bound, but for the start and the end."""
    widths = Widths.between(1.0, 16.0, 1.0)
    lane = envelope.lane_envelope(Limits(latency=MODEL, widths=widths, max_cores=16.0, max_batch_size=8))
    knot = 7
    cores = lane.cores[knot]
    batch_size = next(b for b in range(1, 9) if math.isclose(b / MODEL.latency_s(b, cores), lane.rps[knot]))
    latency_s, batches = MODEL.latency_s(batch_size, cores), 400
    arrived = np.arange(batches * batch_size) * latency_s / batch_size
    starts_s = (np.arange(batches) + 1) * latency_s
    deadline = np.repeat(starts_s + latency_s, batch_size) + 1e-9
    assert np.all(np.repeat(starts_s, batch_size) >= arrived)
    found = bound(arrived, deadline, MODEL, max_cores=16, max_batch_size=8, max_lanes=1, core_step=1.0)
    real = batches * cores * latency_s
    assert found.misses_at_least == 0
    assert real * (1 - 3 / batches) <= found.core_seconds_one_lane <= real


def test_wide_budgets_on_many_lanes_are_tight() -> None:
    """Where every request can have its own lane and the cheapest batch, there is nothing to lose."""
    arrived = np.arange(200) * 0.1
    found = bound(arrived, arrived + 1.0, MODEL, max_cores=16, max_batch_size=8, max_lanes=16, core_step=1.0)
    assert MODEL.latency_s(1, 1) == pytest.approx(0.1369)  # a batch of one on one core is the cheapest here
    assert found.core_seconds_lanes == pytest.approx(200 * 0.1369)
    assert found.many_lanes.request_core_seconds() == pytest.approx(found.many_lanes.fluid_core_seconds())


def test_small_budgets_cost_more_than_speed_alone() -> None:
    """Of two requests with the same share of the machine's speed the one in a hurry needs the wider batch."""
    arrived = np.arange(50) * 10.0
    found = bound(arrived, arrived + 0.06, MODEL, max_cores=16, max_batch_size=8, max_lanes=16, core_step=1.0)
    cores = math.ceil(MODEL.cores_for(1, 0.06))
    assert found.many_lanes.fluid_core_seconds() == pytest.approx(50 * 0.1369)
    assert found.many_lanes.request_core_seconds() > 50 * (cores - 1) * 0.06
    assert found.core_seconds_lanes <= 50 * cores * MODEL.latency_s(1, cores)


def test_misses_make_it_cheaper_until_nothing_is_left() -> None:
    """A run is compared with the bound at its own misses: whoever serves nobody needs nothing."""
    rng = np.random.default_rng(4)
    arrived = rng.uniform(0, 5, 100)
    found = bound(arrived, arrived + rng.uniform(0.02, 0.5, 100), MODEL, max_cores=8, max_batch_size=4, max_lanes=4)
    assert 0 < found.lost_at_arrival < found.one_lane.misses_at_least
    for relaxation in (found.one_lane, found.many_lanes):
        costs = [relaxation.core_seconds(misses) for misses in range(relaxation.misses_at_least, 101)]
        assert costs[0] == relaxation.core_seconds()
        assert all(after <= before for before, after in itertools.pairwise(costs))
        assert costs[-1] == 0.0
        assert relaxation.core_seconds(relaxation.misses_at_least - 1) == math.inf
        with pytest.raises(ValueError, match="misses must be >= 0, got -1"):
            relaxation.core_seconds(-1)


def test_idle_allocation_is_charged_for_as_long_as_every_run_lasts() -> None:
    """A floor that is allocated anyway is paid while nothing runs, and only once while something does."""
    arrived, deadline = [0.0, 100.0], [1.0, 101.0]
    plain = bound(arrived, deadline, MODEL, max_cores=16, max_batch_size=8, max_lanes=4, core_step=1.0)
    idle = bound(arrived, deadline, MODEL, max_cores=16, max_batch_size=8, max_lanes=4, core_step=1.0, idle_cores=0.5)
    assert plain.core_seconds_lanes == pytest.approx(2 * 0.1369)
    assert idle.horizon_s == 100.0
    assert idle.core_seconds_one_lane == pytest.approx(50.0 + 2 * 0.1369 / 2)
    assert idle.core_seconds_lanes == pytest.approx(50.0 + 2 * 0.1369 / 2)
    wide = bound(arrived, deadline, MODEL, max_cores=16, max_batch_size=8, max_lanes=4, idle_cores=3.0, horizon_s=200.0)
    assert wide.core_seconds_lanes == pytest.approx(600.0)


def test_profile_is_the_fluid_optimum_over_time() -> None:
    """The picture of the bound has the bound as its area."""
    rng = np.random.default_rng(5)
    arrived = np.sort(rng.uniform(0, 30, 300))
    found = bound(arrived, arrived + rng.uniform(0.5, 1.5, 300), MODEL, max_cores=16, max_batch_size=8, max_lanes=16)
    assert found.one_lane.misses_at_least == 0
    for relaxation in (found.one_lane, found.many_lanes):
        profile = found.cores_over_time(relaxation)
        assert profile.core_seconds == pytest.approx(relaxation.fluid_core_seconds())
        assert profile.cores.max() <= 16
        edges = np.linspace(-1.0, 40.0, 83)
        assert profile.mean_per_bin(edges).sum() * 0.5 == pytest.approx(profile.core_seconds)
    assert (profile.times_s[0], profile.times_s[-1]) == (arrived[0], pytest.approx(found.speed.times_s[-1]))


def test_interference_is_charged_only_on_request() -> None:
    """A service whose lanes do not disturb each other must not be told that it beat its bound."""
    disturbed = LatencyModel(0.1404, -0.0508, 0.0252, 0.0221, interference=0.2)
    arrived = np.zeros(40)
    costs = [
        bound(arrived, arrived + 1.0, latency, max_cores=16, max_batch_size=1, max_lanes=16, **more).many_lanes
        for latency, more in ((MODEL, {}), (disturbed, {}), (disturbed, {"charge_interference": True}))
    ]
    assert costs[0].core_seconds(20) == costs[1].core_seconds(20)
    assert costs[2].fluid_core_seconds(20) > costs[1].fluid_core_seconds(20)


def test_interference_is_charged_to_the_later_of_two_batches() -> None:
    """The first of two batches starts alone, and runs as if it stayed so: charging both would be more than is paid."""
    model = LatencyModel(0.0, 0.0, 0.0, 0.1, interference=0.5)
    found = bound(
        [0.0, 0.0],
        [0.1, 0.15],
        model,
        max_cores=2,
        max_batch_size=1,
        max_lanes=2,
        core_step=1.0,
        charge_interference=True,
    )
    np.testing.assert_allclose(found.many_lanes.envelope.rps, [0.0, 10.0, 10.0 + 10.0 / 1.5], rtol=1e-8)
    np.testing.assert_allclose(found.many_lanes.envelope.cores, [0.0, 1.0, 2.0])
    assert found.misses_at_least == 0
    assert found.core_seconds_lanes <= 0.1 + 0.15


def test_measured_tables_are_bounded_too() -> None:
    """A model that the four terms do not describe has a bound by the same means."""
    sizes, cores = (1.0, 2.0, 4.0), (1.0, 2.0, 4.0)
    table_s = MODEL.latency_s(np.array(sizes)[:, None], np.array(cores)[None, :]).tolist()
    table = LatencyTable(0.1404, -0.0508, 0.0252, 0.0221, batch_sizes=sizes, cores=cores, table_s=table_s)
    arrived = np.linspace(0, 9, 90)
    found = [
        bound(arrived, arrived + 0.5, latency, max_cores=4, max_batch_size=4, max_lanes=2) for latency in (MODEL, table)
    ]
    assert found[0].one_lane.core_seconds(30) == pytest.approx(found[1].one_lane.core_seconds(30), rel=0.02)


def test_requests_that_are_never_due_cost_the_cheapest_batch() -> None:
    """They make no haste, but work."""
    found = bound([0.0, 3.0, 4.0], [math.inf, math.inf, 5.0], MODEL, max_cores=16, max_batch_size=8, max_lanes=2)
    assert found.many_lanes.fluid_core_seconds() == pytest.approx(3 * 0.1369, rel=1e-3)
    assert found.many_lanes.request_core_seconds() == pytest.approx(3 * 0.1369, rel=1e-3)
    assert found.misses_at_least == 0


def test_nothing_to_do_costs_nothing() -> None:
    """No requests, or none that can be saved."""
    empty = bound([], [], MODEL, max_cores=4, max_batch_size=2, max_lanes=2)
    assert (empty.requests, empty.core_seconds_lanes, empty.misses_at_least) == (0, 0.0, 0)
    late = bound([1.0, 0.0], [1.01, -3.0], MODEL, max_cores=4, max_batch_size=2, max_lanes=2)
    assert (late.requests, late.core_seconds_one_lane, late.lost_at_arrival, late.misses_at_least) == (2, 0.0, 2, 2)
    assert late.cores_over_time(late.one_lane).core_seconds == 0.0


def test_documentation_shows_what_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that a reader tries."""
    text = (Path(__file__).parents[2] / "docs" / "bound.md").read_text()
    code, shown = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arrived_at_s": [[0.0]]}, "one-dimensional"),
        ({"deadline_s": [1.0]}, "equal length"),
        ({"arrived_at_s": [0.0, math.inf]}, "arrived_at_s must be finite"),
        ({"deadline_s": [1.0, math.nan]}, "deadline_s must be numbers"),
        ({"max_cores": 0.5}, "max_cores"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_lanes": 0}, "max_lanes"),
        ({"idle_cores": -1.0}, "idle_cores"),
        ({"min_cores": 0.0}, "min_cores"),
        ({"core_step": 0.0}, "core_step"),
        ({"horizon_s": math.inf}, "horizon_s"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """A bound of nonsense would look like a bound."""
    fine: dict[str, Any] = {
        "arrived_at_s": [0.0, 1.0],
        "deadline_s": [1.0, 2.0],
        "latency": MODEL,
        "max_cores": 4.0,
        "max_batch_size": 2,
        "max_lanes": 2,
    }
    with pytest.raises(ValueError, match=message):
        bound(**(fine | arguments))
