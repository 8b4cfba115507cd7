"""What following the drift is worth: a neighbour, a model that drifts, a stale profile; against itself switched off.

Scenario: Poisson arrivals at 0.65 of what the machine can serve, budgets of five typical inferences, uniform from half
to one and a half of that, for 30 s: tight enough that a wrong prediction costs deadlines. Four disturbances: none;
another process that takes half of a core during the middle third; a model whose work goes up and down by 30 % as a sine
(its input says how much, which the scheduler does not know, and the model really does it); a profile from a machine
twice as fast (the samples of the one just measured, halved).

Contenders: sponge as it is, and with ``Settings(follow_drift=False)``. Both get the same requests, by turns, the order
turned round from repeat to repeat.

The same simulated, with several seeds: from the same profile, with the slowdown that the disturbance is worth (of a
neighbour: ``cores / (cores - 0.5)``, as if the kernel shared evenly). ``--simulate-only`` takes a profile that is made
up, and gives the same numbers on any machine; ``--scatter`` is that of its samples. The wider they scatter, the more
room the 99th percentile leaves for everything else, and the less is left for the correction to do.

Constraint: a request is missed if it was not answered by its deadline, whether late or turned away.

Final number: missed with and without, for each disturbance; live the mean and range over the repeats.

Left out: several models that disturb each other; a quota that somebody else changes (see ``soak.py``); drift that is
faster than the sixteen batches over which the correction follows the median.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from load_models import TURNS, Inputs, work, work_inputs
from openloop import Neighbour, OpenLoop, Schedule, say

from sponge.commands.replay import OtherProcesses
from sponge.core.controller import Controller
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.live.profiler import Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.profile import Cell, Profile
from sponge.sim.kernel import simulate
from sponge.sim.run import Outcome
from sponge.sim.service import Service
from sponge.workload import Workload

LOAD = 0.65
NEIGHBOUR_CORES = 0.5
SWING = 0.3
STALE = 0.5
MAX_BATCH_SIZE = 8
PATIENCE_S = 3.0
FOLLOWING = {True: "following", False: "switched off"}
SHOWN = {"missed_pct": "missed [%]", "late_pct": "late [%]", "mean_cores": "cores", "response_ms_p99": "p99 [ms]"}
BUDGET_INFERENCES = 5
"""Mean budget, in typical latencies of a lone request on one core."""


@attrs.frozen(kw_only=True)
class Disturbance:
    """One scenario; instants count from the start of a run."""

    name: str
    slowdown: Callable[[float], float]
    """How many times longer a batch takes that starts then, in the simulation."""
    work: Callable[[float], float] = lambda _: 1.0
    """How much more the model does for a request that arrives then, live."""
    neighbour_s: tuple[float, float] | None = None
    profile_scale: float = 1.0


def disturbances(duration_s: float, cores: int) -> list[Disturbance]:
    """What a run is put through."""

    def swing(now: float) -> float:
        return 1.0 + SWING * math.sin(4 * math.pi * now / duration_s)

    first_s, last_s = duration_s / 3, 2 * duration_s / 3
    shared = cores / (cores - NEIGHBOUR_CORES)
    return [
        Disturbance(name="none", slowdown=lambda _: 1.0),
        Disturbance(
            name=f"a neighbour that takes {NEIGHBOUR_CORES:g} cores",
            slowdown=lambda now: shared if first_s <= now < last_s else 1.0,
            neighbour_s=(first_s, last_s),
        ),
        Disturbance(name=f"drift of the model by ±{100 * SWING:.0f} %", slowdown=swing, work=swing),
        Disturbance(
            name="a profile of a machine twice as fast",
            slowdown=lambda _: 1.0,
            profile_scale=STALE,
        ),
    ]


def scaled(profile: Profile, factor: float) -> Profile:
    """The profile as of a machine that is faster or slower."""
    cells = [attrs.evolve(cell, samples_s=[factor * sample for sample in cell.samples_s]) for cell in profile.cells]
    return attrs.evolve(profile, cells=cells)


def made_up_profile(cores: int, scatter: float) -> Profile:
    """A detector-like model on *cores*: 20 ms on one, log-normal scatter, 3 batches in a thousand twice as long."""
    model = LatencyModel(gamma_s=0.017, epsilon_s=0.001, delta_s=0.001, eta_s=0.001, interference=0.05)
    rng = np.random.default_rng(0)
    cells = []
    for share, batch_size in itertools.product(range(1, cores + 1), (1, 2, 4, MAX_BATCH_SIZE)):
        for lanes in range(1, cores // share + 1):
            chance = rng.lognormal(0.0, scatter, 400) * np.where(rng.random(400) < 0.003, 2.0, 1.0)
            samples_s = model.latency_s(batch_size, share, lanes) * chance
            cells.append(Cell.of(batch_size=batch_size, cores=share, threads=share, samples_s=samples_s, lanes=lanes))
    return Profile(cells=cells)


@attrs.frozen(kw_only=True)
class Bench:
    """What both contenders serve with."""

    profile: Profile
    cores: int
    duration_s: float
    session: ElasticSession | None = None
    cpu_control: Any = "auto"

    @property
    def typical(self) -> LatencyModel:
        """Medians."""
        return LatencyModel.fit(self.profile, 50)

    @property
    def rate_rps(self) -> float:
        """What is offered."""
        return LOAD * self.cores * float(self.typical.throughput_rps(1, 1.0, self.cores))

    def schedule(self, seed: int) -> Schedule:
        """The requests of one repeat."""
        budget_s = BUDGET_INFERENCES * float(self.typical.latency_s(1, 1.0))
        return Schedule.of([(self.rate_rps, self.duration_s)], budget_s, seed)

    def controller(self, disturbance: Disturbance, following: bool) -> Controller:
        """A fresh contender."""
        latency = LatencyModel.fit(scaled(self.profile, disturbance.profile_scale), 99)
        solver = Solver(latency, max_cores=self.cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=self.cores)
        return Controller(solver, Settings(follow_drift=following))


def figures(
    arrives_s: Any, met: Any, late: int, response_s: Any, cores: float, duration_s: float, others: float = 0.0
) -> dict[str, Any]:
    """What is told of a run."""
    edges_s = np.arange(0.0, math.ceil(duration_s) + 1.0)
    missed = np.histogram(arrives_s[~met], edges_s)[0]
    answered_s = response_s[np.isfinite(response_s)]
    return {
        "requests": len(met),
        "missed_pct": 100 * float(np.mean(~met)),
        "late_pct": 100 * late / len(met),
        "mean_cores": cores,
        "response_ms_p99": 1000 * float(np.percentile(answered_s, 99)) if len(answered_s) else math.nan,
        "others_cores": others,
        "missed_pct_by_second": (100 * missed / np.maximum(1, np.histogram(arrives_s, edges_s)[0])).tolist(),
    }


def forecast(bench: Bench, disturbance: Disturbance, following: bool, seed: int) -> dict[str, Any]:
    """Simulate one run."""
    schedule = bench.schedule(seed)
    workload = Workload(sent_at_s=schedule.arrives_s, arrived_at_s=schedule.arrives_s, deadline_s=schedule.deadline_s)
    service = Service(bench.profile, slowdown=disturbance.slowdown)
    run = simulate(workload, bench.controller(disturbance, following), service, seed=seed)
    met = np.asarray(run.outcome == Outcome.MET)
    late = run.count(Outcome.LATE)
    return figures(schedule.arrives_s, met, late, run.response_s, run.mean_cores, bench.duration_s)


def serve(bench: Bench, disturbance: Disturbance, following: bool, seed: int) -> dict[str, Any]:
    """Serve one run live."""
    assert bench.session is not None
    schedule = bench.schedule(seed)
    turns = [round(TURNS * disturbance.work(at)) for at in schedule.arrives_s.tolist()]
    kept: dict[tuple[int, int], Inputs] = {}

    def inputs(k: int) -> Inputs:
        key = (k % 64, turns[k])
        if key not in kept:
            kept[key] = work_inputs(*key)
        return kept[key]

    with (
        best_scaler(bench.cpu_control) as scaler,  # type: ignore[attr-defined]
        Scheduler(bench.session, scaler=scaler, controller=bench.controller(disturbance, following)) as scheduler,
    ):
        others = OtherProcesses()
        loop = OpenLoop(schedule, inputs, lambda request, deadline: scheduler.submit(request, deadline=deadline))
        neighbour = None
        if disturbance.neighbour_s is not None:
            neighbour = Neighbour(NEIGHBOUR_CORES, *(loop.zero + at for at in disturbance.neighbour_s))
        sent = loop.wait(PATIENCE_S)
        mean_cores = scheduler.statistics().allocated_core_s / bench.duration_s
        found_others = others.cores()
        if neighbour is not None:
            neighbour.end()
    late = int(np.count_nonzero(np.isfinite(sent.response_s) & ~sent.met))
    return figures(schedule.arrives_s, sent.met, late, sent.response_s, mean_cores, bench.duration_s, found_others)


def run_all(bench: Bench, repeats: int, seeds: int) -> dict[str, Any]:
    """All disturbances, live by turns, and simulated."""
    results: dict[str, Any] = {}
    for disturbance in disturbances(bench.duration_s, bench.cores):
        results[disturbance.name] = {
            "simulated": {
                label: [forecast(bench, disturbance, following, seed) for seed in range(seeds)]
                for following, label in FOLLOWING.items()
            },
            "live": {label: [] for label in FOLLOWING.values()},
        }
        say(f"simulated: {disturbance.name}")
    if bench.session is None:
        return results
    for repeat in range(repeats):
        for disturbance in disturbances(bench.duration_s, bench.cores):
            for following in (True, False) if repeat % 2 == 0 else (False, True):
                found = serve(bench, disturbance, following, repeat)
                results[disturbance.name]["live"][FOLLOWING[following]].append(found)
                say(f"repeat {repeat}, {disturbance.name}, {FOLLOWING[following]}: missed {found['missed_pct']:.2f} %")
    return results


def said(runs: list[dict[str, Any]], name: str) -> str:
    """Mean and range."""
    values = [run[name] for run in runs]
    return f"{np.mean(values):7.2f} ({min(values):.2f}-{max(values):.2f})"


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for name, both in results.items():
        print(f"disturbance: {name}")
        for how, by_label in both.items():
            for label, runs in by_label.items():
                if runs:
                    print(f"  {how:9} {label:12}", *(f"{text} {said(runs, key):20}" for key, text in SHOWN.items()))


def draw(path: str, results: dict[str, Any], duration_s: float) -> None:
    """Missed over time, with and without, live and simulated."""
    from matplotlib.figure import Figure

    live = any(runs for both in results.values() for runs in both["live"].values())
    hows = ["live", "simulated"] if live else ["simulated"]
    figure = Figure(figsize=(5.5 * len(hows) + 1, 2.2 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), len(hows), sharex=True, sharey="row", squeeze=False)
    for (name, both), row in zip(results.items(), rows, strict=True):
        for axes, how in zip(row, hows, strict=True):
            for index, (label, runs) in enumerate(both[how].items()):
                series = np.array([run["missed_pct_by_second"] for run in runs])
                mean = series.mean(axis=0)
                total = np.mean([run["missed_pct"] for run in runs])
                at = np.arange(len(mean)) + 0.5
                axes.plot(at, mean, color=f"C{index}", label=f"{label}: {total:.2f} %")
                axes.fill_between(at, series.min(axis=0), series.max(axis=0), color=f"C{index}", alpha=0.15)
            if "neighbour" in name:
                axes.axvspan(duration_s / 3, 2 * duration_s / 3, color="0.92", zorder=0)
            axes.set_title(f"{name}, {how}", fontsize="small")
            axes.grid(alpha=0.25)
            axes.legend(fontsize="small")
        row[0].set_ylabel("missed [%]")
        row[0].set_ylim(bottom=0)
    for axes in rows[-1]:
        axes.set_xlabel("scheduled arrival [s]")
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run and print; exit 0 whatever came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of the live runs")
    parser.add_argument("--seeds", type=int, default=10, help="of the simulated runs")
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--simulate-only", action="store_true", help="from a profile that is made up")
    parser.add_argument(
        "--scatter", type=float, default=0.05, help="of the made-up profile, standard deviation of the log"
    )
    parser.add_argument("--profile-s", type=float, default=25.0)
    parser.add_argument("--cpu-control", default="auto", choices=["auto", "quota", "affinity", "threads"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", help="picture to draw")
    options = parser.parse_args()
    if options.simulate_only:
        bench = Bench(profile=made_up_profile(2, options.scatter), cores=2, duration_s=options.duration_s)
        results = run_all(bench, 0, options.seeds)
    else:
        bench, results = run_live(options)
    if options.out:
        draw(options.out, results, options.duration_s)
    if options.json:
        json.dump({"rate_rps": bench.rate_rps, "cores": bench.cores, "disturbances": results}, sys.stdout)
        print()
    else:
        print(f"{bench.rate_rps:.1f} requests/s on {bench.cores} cores, {options.duration_s:g} s")
        show(results)
    return 0


def run_live(options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Profile the model here, then run everything."""
    cores = min(available_cpus(), 4)
    with tempfile.TemporaryDirectory() as folder:
        model = work(Path(folder))
        with ElasticSession(model.path, max_threads=cores, max_lanes=cores) as session:
            profile = Profiler(
                session,
                batch_sizes=(1, 2, 4, MAX_BATCH_SIZE),
                inputs=model.inputs[0],
                budget_s=options.profile_s,
            ).run()
            session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=model.shapes)
            bench = Bench(
                profile=profile,
                cores=cores,
                duration_s=options.duration_s,
                session=session,
                cpu_control=options.cpu_control,
            )
            return bench, run_all(bench, options.repeats, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
