"""Everybody who is compared on a simulated service, and by what: sponge, and all that docs/baselines.md describes.

Each rival is given what somebody who configures it with care would give it: the mean rate, the tightest SLO, as many
replicas at the start as the rate needs. sponge is given the latency model and the limits.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np

from sponge.core.controller import Controller
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.optimize.clairvoyant import Bound, bound
from sponge.sim.baselines import (
    HorizontalController,
    OnlineFitBatcher,
    PublishedController,
    QueueTimeoutBatcher,
    RecommenderController,
    StaticController,
)
from sponge.sim.run import Run
from sponge.workload import Workload

PUBLISHED = "published algorithm"
SPONGE = "sponge"
ONE_LANE = "sponge, one lane"
COLD_START_S = 10.0
POD_RESIZE_S = 1.0
MAX_CORES = 16
MAX_BATCH_SIZE = 8

YOLOV5S = LatencyModel(gamma_s=0.1404, epsilon_s=-0.0508, delta_s=0.0252, eta_s=0.0221)
"""Least-squares fit of the published p99 profile (Razavi et al., EuroMLSys 2024): batches to 8, cores to 16."""
MODELS = {
    "yolov5s": YOLOV5S,
    "yolov5n": LatencyModel(gamma_s=0.0577, epsilon_s=-0.0073, delta_s=0.0122, eta_s=0.0154),
    "resnet18": LatencyModel(gamma_s=0.0390, epsilon_s=0.0042, delta_s=0.0024, eta_s=0.0084),
}
"""The same of the other two models of that profile; `fit_profiles` makes them from the file."""


def fit_profiles(path: Path) -> dict[str, LatencyModel]:
    """Fit the four terms to each model of a published profile, by plain least squares, as the paper does.

    The file has the columns ``model``, ``batch_size``, ``cores`` and ``latency_ms_p99``.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = {}
    for name in sorted({row["model"] for row in rows}):
        cells = [
            (int(row["batch_size"]), int(row["cores"]), float(row["latency_ms_p99"]) / 1000)
            for row in rows
            if row["model"] == name and int(row["batch_size"]) <= MAX_BATCH_SIZE and int(row["cores"]) <= MAX_CORES
        ]
        terms = np.array([(b / c, 1 / c, b, 1.0) for b, c, _ in cells])
        fitted, *_ = np.linalg.lstsq(terms, np.array([latency_s for *_, latency_s in cells]), rcond=None)
        models[name] = LatencyModel(*fitted.tolist())
    return models


@attrs.frozen(kw_only=True)
class Setting:
    """What all policies know."""

    latency: LatencyModel = YOLOV5S
    rate_rps: float = 20.0
    slo_s: float = 1.0
    """The tightest."""
    max_cores: int = MAX_CORES
    max_batch_size: int = MAX_BATCH_SIZE
    resize_delay_s: float = 0.0
    """Where a policy changes the cores of a running service; replicas take `COLD_START_S` anyway."""


def clairvoyant(requests: Workload, setting: Setting) -> Bound:
    """Return what no scheduler can beat on these requests, where lanes slow each other down as the latency says."""
    return bound(
        requests.arrived_at_s,
        requests.deadline_s,
        setting.latency,
        max_cores=setting.max_cores,
        max_batch_size=setting.max_batch_size,
        max_lanes=setting.max_cores,
        charge_interference=setting.latency.interference > 0,
    )


def figures(run: Run, least: Bound) -> dict[str, float]:
    """Return what a policy is judged by.

    Requests that missed their own deadline; those beyond what every schedule misses; seconds with a miss, the published
    way of counting [all in %]; mean cores in force; and the least mean cores of any schedule with as few misses.
    """
    count = max(len(run), 1)
    return {
        "missed_pct": 100 * run.misses / count,
        "avoidable_pct": 100 * (run.misses - least.misses_at_least) / count,
        "seconds_missed_pct": 100 * float(run.summary()["seconds_with_a_miss"]),
        "mean_cores": run.mean_cores,
        "bound_mean_cores": least.many_lanes.core_seconds(max(run.misses, least.misses_at_least)) / run.horizon_s,
    }


@attrs.frozen
class Contender:
    """A policy, and what a resize takes where it runs."""

    name: str
    make: Callable[[], ControllerProtocol]
    resize: dict[str, float] = attrs.field(factory=dict)


def contenders(setting: Setting, *, lanes: tuple[float, ...] = (1.25,)) -> list[Contender]:
    """Return all policies. What a rival is given is said in its name; docs/baselines.md says where each comes from.

    *lanes* are the static lanes to be tried, over those that the mean rate keeps busy.
    """
    return [*_published(setting), *_static(setting, lanes), *_scaling(setting), *_batching(setting), *_sponge(setting)]


def sponge_controller(setting: Setting, lanes: int) -> Controller:
    """Return the controller that serves, with its settings as they come; it is told how long a resize takes."""
    solver = Solver(
        setting.latency, max_cores=setting.max_cores, max_batch_size=setting.max_batch_size, max_lanes=lanes
    )
    return Controller(solver, Settings(resize_delay_s=setting.resize_delay_s))


def _sponge(setting: Setting) -> list[Contender]:
    in_place = {"resize_delay_s": setting.resize_delay_s}
    return [
        Contender(ONE_LANE, lambda: sponge_controller(setting, 1), in_place),
        Contender(SPONGE, lambda: sponge_controller(setting, setting.max_cores), in_place),
    ]


def _published(setting: Setting) -> list[Contender]:
    def make(wait_s: float) -> ControllerProtocol:
        return PublishedController(
            setting.latency,
            max_cores=setting.max_cores,
            max_batch_size=setting.max_batch_size,
            slo_s=setting.slo_s,
            arrival_rate_rps=setting.rate_rps,
            partial_wait_s=wait_s,
        )

    in_place = {"resize_delay_s": setting.resize_delay_s}
    return [
        Contender(PUBLISHED, lambda: make(1.0), in_place),
        Contender(f"{PUBLISHED}, partial batches wait 0.1 s", lambda: make(0.1), in_place),
    ]


def _static(setting: Setting, lanes: tuple[float, ...]) -> list[Contender]:
    latency, most = setting.latency, setting.max_cores

    def one_by_one(cores: int) -> Contender:
        name = f"static {cores} cores, FIFO, batch 1"
        return Contender(name, lambda: StaticController(cores, order="fifo", max_batch_size=1, latency=latency))

    def side_by_side(count: int) -> Contender:
        return Contender(
            f"static {count} {'lane' if count == 1 else 'lanes'} of 1 core, EDF",
            lambda: StaticController(
                count, lanes=count, latency=latency, order="edf", max_batch_size=1, drop_late=True
            ),
        )

    busy = busy_lanes(setting)
    counts = sorted({min(most, max(1, math.ceil(share * busy))) for share in lanes})
    adaptive = Contender(
        f"static {most} cores, EDF, adaptive batches",
        lambda: StaticController(
            most, order="edf", max_batch_size=setting.max_batch_size, batching="adaptive", latency=latency
        ),
    )
    return [one_by_one(most // 2), one_by_one(most), adaptive, *map(side_by_side, counts)]


def busy_lanes(setting: Setting) -> float:
    """Return how many lanes of one core the mean rate keeps busy, in batches of one."""
    return setting.rate_rps * setting.latency.latency_s(1, 1.0)


def _scaling(setting: Setting) -> list[Contender]:
    replica = {"resize_delay_s": COLD_START_S, "shrink_delay_s": 0.0}
    pod_s = max(POD_RESIZE_S, setting.resize_delay_s)
    prepared = min(setting.max_cores, math.ceil(1.25 * busy_lanes(setting)))

    def horizontal(replicas: int, margin: float) -> ControllerProtocol:
        return HorizontalController(
            setting.latency,
            max_replicas=setting.max_cores,
            max_batch_size=setting.max_batch_size,
            slo_s=setting.slo_s,
            initial_replicas=replicas,
            rate_margin=margin,
        )

    def vertical() -> ControllerProtocol:
        return RecommenderController(
            setting.max_cores / 2,
            max_cores=setting.max_cores,
            latency=setting.latency,
            half_life_s=300.0,
            max_batch_size=setting.max_batch_size,
        )

    cold = f"cold start {COLD_START_S:g} s"
    replicas = "replica" if prepared == 1 else "replicas"
    return [
        Contender(f"horizontal, from 1 replica, {cold}", lambda: horizontal(1, 1.0), replica),
        Contender(
            f"horizontal, from {prepared} {replicas}, rate x 1.5, {cold}", lambda: horizontal(prepared, 1.5), replica
        ),
        Contender(f"vertical recommender, resize {pod_s:g} s", vertical, {"resize_delay_s": pod_s}),
    ]


def _batching(setting: Setting) -> list[Contender]:
    most, size, latency = setting.max_cores, setting.max_batch_size, setting.latency
    return [
        Contender(
            f"queue-timeout batcher, {most} cores, 10 ms",
            lambda: QueueTimeoutBatcher(most, max_batch_size=size, window_s=0.01, latency=latency),
        ),
        Contender(
            f"batcher with online fit, {most} cores",
            lambda: OnlineFitBatcher(
                most, max_batch_size=size, order="fifo", max_latency_s=setting.slo_s, latency=latency
            ),
        ),
    ]
