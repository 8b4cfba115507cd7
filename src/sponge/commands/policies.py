"""The policies that ``sponge simulate`` compares, by the names that it knows them by.

Each rival is given what somebody who configures it with care would give it: the mean rate, the tightest SLO, as many
replicas at the start as the rate needs. `docs/baselines.md` says where each comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from sponge.core.controller import Controller
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.sim.baselines import (
    HorizontalController,
    OnlineFitBatcher,
    PublishedController,
    QueueTimeoutBatcher,
    RecommenderController,
    StaticController,
)

POD_RESIZE_S = 1.0
COLD_START_S = 10.0


@attrs.frozen(kw_only=True)
class Task:
    """What a policy is made for."""

    latency: LatencyModel
    max_cores: int
    max_batch_size: int
    max_lanes: int
    rate_rps: float
    slo_s: float
    """The tightest."""
    resize_delay_s: float


@attrs.frozen
class Policy:
    """One that can be chosen."""

    what: str
    """In a few words."""
    make: Callable[[Task], ControllerProtocol]
    grow_s: float = 0.0
    """How long more cores take where it usually runs, if nothing else is asked for [s]."""
    shrink_s: float | None = None
    """The same for fewer; None: as long."""


def _sponge(task: Task, lanes: int) -> Controller:
    solver = Solver(
        task.latency, max_cores=task.max_cores, max_batch_size=task.max_batch_size, max_lanes=min(lanes, task.max_cores)
    )
    return Controller(solver, Settings(resize_delay_s=task.resize_delay_s))


def _published(task: Task) -> PublishedController:
    return PublishedController(
        task.latency,
        max_cores=task.max_cores,
        max_batch_size=task.max_batch_size,
        slo_s=task.slo_s,
        arrival_rate_rps=task.rate_rps,
        partial_wait_s=0.1 * task.slo_s,
    )


def _static(task: Task) -> StaticController:
    return StaticController(
        task.max_cores, order="edf", max_batch_size=task.max_batch_size, batching="adaptive", latency=task.latency
    )


def _static_lanes(task: Task) -> StaticController:
    return StaticController(
        task.max_cores,
        order="edf",
        max_batch_size=1,
        lanes=min(task.max_lanes, task.max_cores),
        drop_late=True,
        latency=task.latency,
    )


def _horizontal(task: Task) -> HorizontalController:
    needed = math.ceil(task.rate_rps / task.latency.throughput_rps(1, 1.0))
    return HorizontalController(
        task.latency,
        max_replicas=task.max_cores,
        max_batch_size=task.max_batch_size,
        slo_s=task.slo_s,
        rate_margin=1.5,
        initial_replicas=min(needed, task.max_cores),
    )


def _vertical(task: Task) -> RecommenderController:
    return RecommenderController(
        task.max_cores,
        max_cores=task.max_cores,
        max_batch_size=task.max_batch_size,
        half_life_s=300.0,
        latency=task.latency,
    )


POLICIES: dict[str, Policy] = {
    "sponge": Policy("lanes and cores chosen at every dispatch", lambda task: _sponge(task, task.max_lanes)),
    "sponge-one-lane": Policy("the same, one batch at a time", lambda task: _sponge(task, 1)),
    "published": Policy("one decision a second, one batch at a time", _published),
    "static": Policy("all cores, earliest deadline first, adaptive batches", _static),
    "static-lanes": Policy("all cores as lanes, earliest deadline first, one by one", _static_lanes),
    "fifo": Policy(
        "all cores, first come first served, one by one",
        lambda task: StaticController(task.max_cores, order="fifo", max_batch_size=1, latency=task.latency),
    ),
    "window": Policy(
        "all cores, batches that wait 10 ms",
        lambda task: QueueTimeoutBatcher(task.max_cores, max_batch_size=task.max_batch_size, latency=task.latency),
    ),
    "online-fit": Policy(
        "all cores, batches by a latency that is learnt while serving",
        lambda task: OnlineFitBatcher(
            task.max_cores, max_batch_size=task.max_batch_size, max_latency_s=task.slo_s, latency=task.latency
        ),
    ),
    "horizontal": Policy(
        f"one-core replicas, cold start {COLD_START_S:g} s", _horizontal, grow_s=COLD_START_S, shrink_s=0.0
    ),
    "vertical": Policy(f"VPA-like recommender, resize {POD_RESIZE_S:g} s", _vertical, grow_s=POD_RESIZE_S),
}
"""By name, as the command offers them."""
