"""Horizontal autoscaling: the program for one model, cold starts, and giving replicas back."""

from __future__ import annotations

import pytest

from sponge.core.actions import SetCpu
from sponge.core.events import BatchFinished, CpuApplied, Drain, Tick
from sponge.core.latency import LatencyModel
from sponge.sim.baselines import HorizontalController
from sponge.sim.baselines.horizontal import Replicas
from sponge.sim.kernel import simulate
from sponge.sim.service import Service
from sponge.workload import Workload
from tests.sim.scripts import arrived, start, started

MODEL = LatencyModel(0.1, 0.05, 0.0, 0.0)
"""0.15 s for one request on one core, 0.1 s for each more."""


@pytest.mark.parametrize(
    ("rate", "slo_s", "replicas"),
    [
        (20.0, 1.0, Replicas(count=3, batch_size=1, fill_s=0.05)),  # larger batches would still take three
        (16.0, 1.0, Replicas(count=2, batch_size=2, fill_s=0.125)),  # 16 · 0.25 / 2 = 2
        (16.0, 0.3, Replicas(count=3, batch_size=1, fill_s=0.0625)),  # 0.25 + 2/16 is too long
        (16.0, 0.1, Replicas(count=2, batch_size=8, fill_s=0.5)),  # nothing is in time: the best throughput
        (900.0, 1.0, Replicas(count=16, batch_size=8, fill_s=8 / 900)),  # more than there may be
        (0.5, 1.0, Replicas(count=1, batch_size=8, fill_s=16.0)),  # nobody finds company within the SLO
    ],
)
def test_fewest_replicas_that_keep_up_in_time(rate: float, slo_s: float, replicas: Replicas) -> None:
    """The one minimum that the published dynamic program is for a single model."""
    assert HorizontalController(MODEL, slo_s=slo_s).solve(rate) == replicas


def test_replica_is_used_once_it_is_there() -> None:
    """Asking is not having: the cold start is what a horizontal scaler pays."""
    s = HorizontalController(MODEL, max_batch_size=1)
    assert s.handle(arrived(0, 0.0, 1.0), now=0.0) == [SetCpu(1.0)]
    assert s.handle(CpuApplied(1.0), now=0.0) == [start(0, 0, cores=1.0, expected_s=MODEL.latency_s(1, 1.0))]
    for request_id in range(1, 20):
        assert s.handle(arrived(request_id, 0.1, 1.1), now=0.1) == []
    assert started(s.handle(BatchFinished(0), now=0.2)) == [(1,)]
    assert s.next_wakeup() == 1.0
    assert s.handle(Tick(), now=1.0) == [SetCpu(3.0)]
    assert s.handle(CpuApplied(2.0), now=5.0) == [
        start(2, 2, lane=1, cores=1.0, expected_s=MODEL.latency_s(1, 1.0)),
    ]
    assert started(s.handle(CpuApplied(3.0), now=6.0)) == [(3,)]


def test_replicas_are_given_back_late_and_only_when_their_batch_is_done() -> None:
    """For as long as the most of the last while would be needed again; and nobody's request is killed."""
    s = HorizontalController(MODEL, max_batch_size=1, scale_down_after_s=2.0, initial_replicas=3)
    s.handle(arrived(0, 0.0, 1.0), now=0.0)
    s.handle(CpuApplied(3.0), now=0.0)
    for request_id in range(1, 14):  # 14 a second: three replicas of 0.15 s
        s.handle(arrived(request_id, 0.0, 1.0), now=0.0)
    for i in range(4):
        for lane in range(3):
            s.handle(BatchFinished(lane), now=0.2 * (i + 1))
    assert s.queue_length == 0
    s.handle(BatchFinished(0), now=0.9)
    # Lane 1 is busy with the last one; nobody comes in the seconds after.
    assert s.handle(Tick(), now=1.0) == []
    assert s.handle(Tick(), now=2.0) == []
    assert s.handle(Tick(), now=3.0) == []
    assert s.next_wakeup() == 4.0
    assert s.handle(Tick(), now=4.0) == [SetCpu(1.0)]
    s.handle(CpuApplied(1.0), now=4.0)
    assert s.handle(arrived(14, 4.1, 5.0), now=4.1) == []
    assert started(s.handle(BatchFinished(1), now=4.2)) == [(14,)]


def test_draining_replica_is_paid_for_until_it_is_done() -> None:
    """Two are busy when one would do: the allocation falls by one when the first of them is done."""
    s = HorizontalController(MODEL, max_batch_size=1, scale_down_after_s=0.0, initial_replicas=2)
    s.handle(arrived(0, 0.0, 1.0), now=0.0)
    s.handle(CpuApplied(2.0), now=0.0)
    s.handle(arrived(1, 0.0, 1.0), now=0.0)
    s.handle(arrived(2, 0.0, 1.0), now=0.0)
    assert s.handle(Tick(), now=1.0) == []
    assert s.handle(BatchFinished(0), now=1.1) == [SetCpu(1.0)]
    assert s.handle(CpuApplied(1.0), now=1.1) == []
    assert started(s.handle(BatchFinished(1), now=1.2)) == [(2,)]


@pytest.mark.parametrize("late_answer", [True, False])
def test_replica_that_was_given_back_has_to_start_again(late_answer: bool) -> None:
    """Neither the memory of having had it nor a late answer to an older wish brings it back."""
    s = HorizontalController(MODEL, max_batch_size=1, scale_down_after_s=0.0, initial_replicas=3)
    assert s.handle(Tick(), now=0.0) == [SetCpu(3.0)]
    s.handle(CpuApplied(2.0), now=0.5)
    assert s.handle(Tick(), now=1.0) == [SetCpu(1.0)]
    if late_answer:
        s.handle(CpuApplied(3.0), now=1.1)
    for request_id in range(14):
        s.handle(arrived(request_id, 1.2, 9.0), now=1.2)
    assert s.handle(Tick(), now=2.0) == [SetCpu(3.0)]
    s.handle(BatchFinished(0), now=2.1)
    assert s.queue_length == 12, "one at a time"
    s.handle(CpuApplied(3.0), now=2.2)
    assert s.queue_length == 10


def test_partial_batch_waits_as_long_as_a_full_one_takes_to_come() -> None:
    """Which is what its place in the SLO was reserved for."""
    s = HorizontalController(MODEL, max_batch_size=2, initial_replicas=2)
    for request_id in range(16):
        s.handle(arrived(request_id, 0.0, 1.0), now=0.0)
    s.handle(CpuApplied(2.0), now=0.0)
    lanes = [0, 1]
    while not s.idle:
        s.handle(BatchFinished(lanes[0]), now=0.9)
        lanes.reverse()
    s.handle(Tick(), now=1.0)
    assert s.plan.batch_size == 2
    assert s.handle(arrived(16, 1.25, 2.0), now=1.25) == []
    assert s.next_wakeup() == 1.375
    assert started(s.handle(Tick(), now=1.375)) == [(16,)]
    s.handle(arrived(17, 1.5, 2.0), now=1.5)
    assert started(s.handle(Drain(), now=1.5)) == [(17,)]


def test_cold_starts_cost_deadlines() -> None:
    """The simulator supplies them: the same requests, with replicas that come at once and after ten seconds."""
    times = [i / 16 for i in range(16 * 30)]
    workload = Workload(sent_at_s=times, arrived_at_s=times, deadline_s=[at + 1.0 for at in times])

    def misses(delay_s: float) -> int:
        service = Service(MODEL, resize_delay_s=delay_s, shrink_delay_s=0.0)
        run = simulate(workload, HorizontalController(MODEL), service)
        return int((run.outcome != 0).sum())

    assert misses(0.0) < 0.1 * len(workload)
    assert misses(10.0) > 0.3 * len(workload)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slo_s": 0.0},
        {"rate_margin": 0.0},
        {"scale_down_after_s": -1.0},
        {"min_replicas": 0},
        {"initial_replicas": 17},
        {"period_s": 0.0},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """Named in the message."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HorizontalController(MODEL, **wrong)  # type: ignore[arg-type]
