"""Live against forecast: the same requests served on this machine and simulated from this machine's profile.

Scenario: a text detector is profiled; then a workload (bursts over a generated 4G-like network, half of what the
machine can serve) is served live, each policy in turn, several times, and the simulator forecasts each policy from the
profile's samples. Policies: two static baselines, sponge, and, where a quota is allowed, sponge in steps of half a
core.

Constraint: every live run of sponge is recorded and replayed through a fresh controller; the actions must be the same,
all of them, or the program fails.

The difference between the two is explained by forecasts that know more of the live run, one thing after the other:

* ``forecast``: the profile's samples, as if the machine were now as it was then;
* ``+ speed``: and how fast the machine was in each second, by the live batches: the median, over the second, of
  measured over typical predicted service time;
* ``+ batches``: instead of the profile's scatter, what the live batch took that started nearest to the simulated one;
* ``+ shell``: and what came before and after the model ran (waking the lane up, joining, answering, the interpreter's
  lock), and when each request was really handed in.

What each step adds is the share of the missed deadlines that it explains; what the last leaves is unexplained.

Final numbers: missed live, in each forecast, and unexplained; mean and range over the repeats.

Left out: what the machine would have done to the batches of another policy; the network, which is simulated live too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from openloop import say

from sponge.commands.demo import DemoSettings, make_workload
from sponge.commands.detector import INPUT_NAME, SIDE_PX, detector_path, pages
from sponge.commands.replay import AllocationRecorder, Replayed, replay
from sponge.core.actions import Action, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import BatchFinished, Event
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.solver import Solver
from sponge.live.profiler import WHOLE_CORES_ONLY, Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.profile import Profile
from sponge.sim.baselines import StaticController
from sponge.sim.kernel import simulate
from sponge.sim.service import Service
from sponge.workload import Workload

MAX_BATCH_SIZE = 8
LOAD = 0.5
FEWEST_BATCHES = 3
"""In a second, for its speed to be told by them; else the run's median stands for it."""
FORECASTS = ("forecast", "+ speed", "+ batches", "+ shell")
SHOWN = ("missed_pct", "mean_cores", "response_ms_p50", "response_ms_p99", "service_ms_p50")
Log = list[tuple[float, Event, list[Action]]]
Figures = dict[str, float]


class Recorder(AllocationRecorder):
    """Keeps everything that came in and what was decided."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []

    def __call__(self, now: float, event: Event, actions: list[Action]) -> None:
        super().__call__(now, event, actions)
        self.log.append((now, event, list(actions)))


@attrs.frozen(kw_only=True)
class Series:
    """A factor over time: that of the nearest instant holds."""

    at_s: Sequence[float]
    factors: Sequence[float]

    def __call__(self, now: float) -> float:
        """Return the factor at an instant [s]."""
        k = bisect_left(self.at_s, now)
        if k == len(self.at_s) or (k and now - self.at_s[k - 1] < self.at_s[k] - now):
            k -= 1
        return self.factors[k]


@attrs.frozen(kw_only=True)
class Measured:
    """What a live run tells of the machine: each batch's start [s from time zero] and how many times longer it took
    than is typical by the profile, as the model ran and from decision to end; and when each request was handed in."""

    started_s: Sequence[float]
    service: Sequence[float]
    turnaround: Sequence[float]
    submitted_s: Sequence[float]

    @classmethod
    def of(cls, log: Log, run: Replayed, zero: float, typical: LatencyModel) -> Measured:
        """Read it from a recorded run."""
        running: dict[int, tuple[float, float]] = {}
        found: list[tuple[float, float, float]] = []
        for now, event, actions in log:
            if isinstance(event, BatchFinished):
                started_at, typical_s = running.pop(event.lane)
                if event.service_s is not None:
                    found.append((started_at - zero, event.service_s / typical_s, (now - started_at) / typical_s))
            for action in actions:
                if isinstance(action, StartBatch):
                    batch = action.batch
                    typical_s = typical.latency_s(batch.rows, batch.cores, len(running) + 1)
                    running[batch.lane] = now, typical_s
        started_s, service, turnaround = zip(*sorted(found), strict=True)
        submitted_s = [float(outcome.submitted_at) for outcome in run.outcomes]
        return cls(started_s=started_s, service=service, turnaround=turnaround, submitted_s=submitted_s)

    def speed(self) -> Series:
        """The median of each second."""
        second = np.floor(self.started_s).astype(int)
        service = np.array(self.service)
        seconds = range(int(second.min()), int(second.max()) + 1)
        of_run = float(np.median(service))
        medians = [
            float(np.median(service[second == k])) if np.count_nonzero(second == k) >= FEWEST_BATCHES else of_run
            for k in seconds
        ]
        return Series(at_s=[k + 0.5 for k in seconds], factors=medians)

    def handed_in(self, workload: Workload) -> Workload:
        """The requests with their real instants of arrival, in their order."""
        arrived_s = np.maximum(self.submitted_s, workload.arrived_at_s)
        order = np.argsort(arrived_s, kind="stable")
        return Workload(
            sent_at_s=workload.sent_at_s[order],
            arrived_at_s=arrived_s[order],
            deadline_s=workload.deadline_s[order],
        )


def figures(
    missed: int, requests: int, mean_cores: float, responses_s: Sequence[float], services_s: Sequence[float]
) -> Figures:
    """What is compared; the last tells whether the machine was as fast as when profiled."""
    p50, p99 = np.percentile(responses_s, [50, 99])
    return {
        "missed_pct": 100 * missed / requests,
        "mean_cores": mean_cores,
        "response_ms_p50": 1000 * float(p50),
        "response_ms_p99": 1000 * float(p99),
        "service_ms_p50": 1000 * float(np.median(services_s)),
    }


def serve(
    session: ElasticSession, controller: ControllerProtocol, workload: Workload, typical: LatencyModel
) -> tuple[Figures, Log, Measured, list[float]]:
    """Serve the workload live; also return the arrivals that missed."""
    inputs = [{INPUT_NAME: page} for page in pages(8, np.random.default_rng(0))]
    recorder = Recorder()
    with (
        contextlib.closing(best_scaler()) as scaler,
        Scheduler(session, scaler=scaler, controller=controller, recorder=recorder) as scheduler,
    ):
        run = replay(workload, scheduler, recorder, inputs)
    answered = [outcome for outcome in run.outcomes if outcome.finished_at is not None]
    missed_s = [outcome.arrived_at for outcome in run.outcomes if not outcome.met]
    services_s = [
        event.service_s
        for _, event, _ in recorder.log
        if isinstance(event, BatchFinished) and event.service_s is not None
    ]
    # The replay's time zero is told by any request: its deadline on the clock, and in the workload.
    first = next(event.request for _, event, _ in recorder.log if hasattr(event, "request"))
    zero = first.deadline - float(workload.deadline_s[0])
    measured = Measured.of(recorder.log, run, zero, typical)
    found = figures(
        len(missed_s),
        len(run.outcomes),
        run.allocation.mean_cores,
        [outcome.response_s for outcome in answered],
        services_s,
    )
    return found | {"others_cores": run.cores_used_by_others}, recorder.log, measured, missed_s


def forecasts(
    profile: Profile, make: Callable[[], ControllerProtocol], workload: Workload, measured: Measured, seed: int
) -> dict[str, tuple[Figures, list[float]]]:
    """Simulate the workload, each time knowing more of the live run; with the arrivals that missed."""
    typical = LatencyModel.fit(profile, 50)
    batches = Series(at_s=measured.started_s, factors=measured.service)
    shell = Series(at_s=measured.started_s, factors=measured.turnaround)
    known = {
        "forecast": (workload, Service(profile)),
        "+ speed": (workload, Service(profile, slowdown=measured.speed())),
        "+ batches": (workload, Service(typical, slowdown=batches)),
        "+ shell": (measured.handed_in(workload), Service(typical, slowdown=shell)),
    }
    found = {}
    for name, (requests, service) in known.items():
        run = simulate(requests, make(), service, seed=seed)
        # From the scheduled arrival, which the last forecast's requests have moved away from.
        late_s = requests.arrived_at_s - np.sort(workload.arrived_at_s)
        responses_s = (run.response_s + late_s)[np.isfinite(run.response_s)].tolist()
        services_s = (run.batches.finished_at_s - run.batches.started_at_s).tolist()
        missed_s = requests.arrived_at_s[~(run.finished_at_s <= run.deadline_s)].tolist()
        found[name] = figures(run.misses, len(run), run.mean_cores, responses_s, services_s), missed_s
    return found


def policies(
    latency: LatencyModel, typical: LatencyModel, cores: int, fractional: bool
) -> dict[str, Callable[[], ControllerProtocol]]:
    """What is compared, made afresh for every run."""
    solver = Solver(latency, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores)
    found: dict[str, Callable[[], ControllerProtocol]] = {
        "static, FIFO, one by one": lambda: StaticController(cores, order="fifo", max_batch_size=1, latency=typical),
        "static, EDF, lanes": lambda: StaticController(
            cores, order="edf", max_batch_size=1, lanes=cores, latency=typical, drop_late=True
        ),
        "sponge": lambda: Controller(solver),
    }
    if fractional:
        halves = attrs.evolve(solver, min_cores=0.5, core_step=0.5)
        found["sponge, half cores"] = lambda: Controller(halves)
    return found


def said(runs: list[Figures], name: str) -> str:
    """Mean and range."""
    values = [run[name] for run in runs]
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def show(results: dict[str, Any]) -> None:
    """Print live beside the forecasts, and what explains the difference."""
    print(
        f"{results['rate_rps']:.1f} requests/s, {results['repeats']} repeats; {results['replayed_events']} recorded "
        "events replayed to the same actions"
    )
    for policy, runs in results["policies"].items():
        print(policy)
        print("  " + " " * 16 + "".join(f"{name:>26}" for name in ("live", *FORECASTS)))
        for figure in SHOWN:
            columns = [said([run[name] for run in runs], figure) for name in ("live", *FORECASTS)]
            print(f"  {figure:16}" + "".join(f"{column:>26}" for column in columns))
        missed = {name: np.mean([run[name]["missed_pct"] for run in runs]) for name in ("live", *FORECASTS)}
        steps = [f"{name[2:]} {missed[name] - missed[before]:+.2f}" for before, name in itertools.pairwise(FORECASTS)]
        print(
            f"  missed, live less forecast: {missed['live'] - missed['forecast']:+.2f} points, of these "
            f"{', '.join(steps)}, unexplained {missed['live'] - missed[FORECASTS[-1]]:+.2f}"
        )
        speeds = np.concatenate([run["speed_by_second"] for run in runs])
        low, middle, high = np.percentile(speeds, [10, 50, 90])
        print(
            f"  the model took {middle:.2f} times what is typical by the profile (p10 to p90 of the seconds: {low:.2f} "
            f"to {high:.2f}); others used {said([run['live'] for run in runs], 'others_cores')} cores"
        )


def draw(path: str, results: dict[str, Any]) -> None:
    """For each policy: how slow the machine was in each second of each repeat, and who missed."""
    from matplotlib.figure import Figure

    names = list(results["policies"])
    figure = Figure(figsize=(11, 2.4 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.6]})
    for name, (bars, speed) in zip(names, rows, strict=True):
        runs = results["policies"][name]
        for place, column in enumerate(("live", *FORECASTS)):
            values = [run[column]["missed_pct"] for run in runs]
            bars.bar(place, np.mean(values), color="C3" if column == "live" else "C0", alpha=0.8)
            bars.plot([place] * len(values), values, ".", color="k", ms=4)
        bars.set_xticks(range(5), ("live", *FORECASTS), fontsize="small")
        bars.set_ylabel("missed [%]")
        bars.set_title(name, fontsize="small")
        width_s = max(len(run["speed_by_second"]) for run in runs)
        for place, run in enumerate(runs):
            start_s = place * width_s
            speed.plot(
                start_s + np.arange(len(run["speed_by_second"])) + 0.5,
                run["speed_by_second"],
                color="0.3",
                label="service time over the profile's" if not place else None,
            )
            for column, colour, height in (("live", "C3", 0.02), (FORECASTS[-1], "C0", 0.08)):
                missed = start_s + np.array(run["missed_s"][column])
                speed.plot(
                    missed,
                    np.full(len(missed), height),
                    "|",
                    color=colour,
                    transform=speed.get_xaxis_transform(),
                    label=f"missed, {column}" if not place else None,
                )
        speed.set_ylim(bottom=0)
        speed.set_xlabel("time, repeats one after the other [s]")
        speed.legend(fontsize="x-small", ncols=3)
        for axes in (bars, speed):
            axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def run_all(
    session: ElasticSession, profile: Profile, cores: int, fractional: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Serve and simulate all policies, in turn."""
    typical = LatencyModel.fit(profile, 50)
    rate_rps = options.load * cores * typical.throughput_rps(1, 1.0, cores)
    made = policies(LatencyModel.fit(profile, 99), typical, cores, fractional)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
    replayed = 0
    for repeat in range(options.repeats):
        workload = make_workload(DemoSettings(duration_s=options.duration_s, seed=repeat), None, rate_rps)
        for name, make in made.items():
            live, log, measured, missed_s = serve(session, make(), workload, typical)
            if name.startswith("sponge"):
                again = make()
                assert all(again.handle(event, now=now) == actions for now, event, actions in log), "not replayed"
                replayed += len(log)
            simulated = forecasts(profile, make, workload, measured, repeat)
            results[name].append(
                {
                    "live": live,
                    **{key: found for key, (found, _) in simulated.items()},
                    "speed_by_second": list(measured.speed().factors),
                    "missed_s": {"live": missed_s, **{key: missed for key, (_, missed) in simulated.items()}},
                }
            )
            say(f"repeat {repeat}, {name}: missed {live['missed_pct']:.2f} % live")
    return {"rate_rps": rate_rps, "repeats": options.repeats, "replayed_events": replayed, "policies": results}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duration-s", type=float, default=15.0, help="of the workload")
    parser.add_argument("--load", type=float, default=LOAD, help="share of what single-core lanes can serve")
    parser.add_argument("--profile-s", type=float, default=40.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", help="picture to draw")
    options = parser.parse_args()
    cores = min(available_cpus(), 4)
    shapes = {INPUT_NAME: (3, SIDE_PX, SIDE_PX)}
    with contextlib.closing(best_scaler()) as scaler:
        fractional = scaler.how not in WHOLE_CORES_ONLY
    if not fractional:
        say(f"the allocation is limited by {scaler.how}, in whole cores: no steps of half a core")
    with ElasticSession(detector_path(), max_threads=cores, max_lanes=cores) as session:
        profile = Profiler(
            session, batch_sizes=(1, 2, 4, MAX_BATCH_SIZE), shapes=shapes, budget_s=options.profile_s, progress=True
        ).run()
        session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=shapes)
        results = run_all(session, profile, cores, fractional, options)
    if options.out:
        draw(options.out, results)
    if options.json:
        json.dump(results, sys.stdout)
        print()
    else:
        show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
