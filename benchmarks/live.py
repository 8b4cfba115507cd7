"""Live against forecast: the same requests served on this machine and simulated from this machine's profile.

For sponge and two static baselines: a text detector is profiled, then a workload (bursts over a generated 4G-like
network, half of what the machine can serve) is served live, each policy in turn, several times; and the simulator
forecasts each policy from the profile's samples. Given side by side are the deadlines missed, the mean allocation, the
response times, and the median service time of the batches, with the range over the repeats.

Besides, every live run of sponge is recorded and replayed through a fresh controller: the actions must be the same, all
of them, or the program fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sponge.commands.demo import DemoSettings, make_workload
from sponge.commands.detector import INPUT_NAME, SIDE_PX, detector_path, pages
from sponge.commands.replay import AllocationRecorder, replay
from sponge.core.actions import Action
from sponge.core.controller import Controller
from sponge.core.events import BatchFinished, Event
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.solver import Solver
from sponge.live.profiler import Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.sim.baselines import StaticController
from sponge.sim.kernel import simulate
from sponge.sim.service import Service
from sponge.workload import Workload

MAX_BATCH_SIZE = 8
LOAD = 0.5
Log = list[tuple[float, Event, list[Action]]]


class Recorder(AllocationRecorder):
    """Keeps everything that came in and what was decided."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []

    def __call__(self, now: float, event: Event, actions: list[Action]) -> None:
        super().__call__(now, event, actions)
        self.log.append((now, event, list(actions)))


def figures(
    missed: int,
    requests: int,
    mean_cores: float,
    responses_s: Sequence[float],
    services_s: Sequence[float],
    others_cores: float = 0.0,
) -> dict[str, float]:
    """Return what is compared; the last two tell whether the machine was as fast, and as free, as when profiled."""
    p50, p99 = np.percentile(responses_s, [50, 99])
    return {
        "missed_pct": 100 * missed / requests,
        "mean_cores": mean_cores,
        "response_ms_p50": 1000 * float(p50),
        "response_ms_p99": 1000 * float(p99),
        "service_ms_p50": 1000 * float(np.median(services_s)),
        "others_cores": others_cores,
    }


def serve(session: ElasticSession, controller: ControllerProtocol, workload: Workload) -> tuple[dict[str, float], Log]:
    """Serve the workload live."""
    inputs = [{INPUT_NAME: page} for page in pages(8, np.random.default_rng(0))]
    recorder = Recorder()
    with (
        contextlib.closing(best_scaler()) as scaler,
        Scheduler(session, scaler=scaler, controller=controller, recorder=recorder) as scheduler,
    ):
        run = replay(workload, scheduler, recorder, inputs)
    answered = [outcome for outcome in run.outcomes if outcome.finished_at is not None]
    missed = sum(not outcome.met for outcome in run.outcomes)
    responses_s = [outcome.response_s for outcome in answered]
    services_s = [
        event.service_s
        for _, event, _ in recorder.log
        if isinstance(event, BatchFinished) and event.service_s is not None
    ]
    others = run.cores_used_by_others
    return figures(missed, len(run.outcomes), run.allocation.mean_cores, responses_s, services_s, others), recorder.log


def forecast(profile: Any, controller: ControllerProtocol, workload: Workload, seed: int) -> dict[str, float]:
    """Simulate the workload from the profile's samples."""
    run = simulate(workload, controller, Service(profile), seed=seed)
    responses_s = run.response_s[np.isfinite(run.response_s)].tolist()
    services_s = (run.batches.finished_at_s - run.batches.started_at_s).tolist()
    return figures(run.misses, len(run), run.mean_cores, responses_s, services_s)


def said(runs: list[dict[str, float]], name: str) -> str:
    """Mean and range."""
    values = [run[name] for run in runs]
    return f"{np.mean(values):8.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--duration", type=float, default=15.0, help="of the workload [s]")
    parser.add_argument("--profile-s", type=float, default=25.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cores = min(available_cpus(), 4)
    shapes = {INPUT_NAME: (3, SIDE_PX, SIDE_PX)}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    replayed = 0
    with ElasticSession(detector_path(), max_threads=cores, max_lanes=cores) as session:
        profile = Profiler(
            session, batch_sizes=(1, 2, 4, 8), cores=None, shapes=shapes, budget_s=options.profile_s, progress=True
        ).run()
        typical, latency = LatencyModel.fit(profile, 50), LatencyModel.fit(profile, 99)
        rate_rps = LOAD * cores * typical.throughput_rps(1, 1.0, cores)
        solver = Solver(latency, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores)
        policies: dict[str, Callable[[], ControllerProtocol]] = {
            "static, FIFO, one by one": lambda: StaticController(
                cores, order="fifo", max_batch_size=1, latency=typical
            ),
            "static, EDF, lanes": lambda: StaticController(
                cores, order="edf", max_batch_size=1, lanes=cores, latency=typical, drop_late=True
            ),
            "sponge": lambda: Controller(solver),
        }
        session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=shapes)
        for repeat in range(options.repeats):
            settings = DemoSettings(duration_s=options.duration, seed=repeat)
            workload = make_workload(settings, None, rate_rps)
            for name, make in policies.items():
                live, log = serve(session, make(), workload)
                if name == "sponge":
                    again = make()
                    assert all(again.handle(event, now=now) == actions for now, event, actions in log), "not replayed"
                    replayed += len(log)
                both = results.setdefault(name, {"live": [], "forecast": []})
                both["live"].append(live)
                both["forecast"].append(forecast(profile, make(), workload, repeat))
    if options.json:
        json.dump({"rate_rps": rate_rps, "replayed_events": replayed, "policies": results}, sys.stdout, indent=1)
        print()
        return 0
    print(
        f"{rate_rps:.1f} requests/s, {options.repeats} repeats; {replayed} recorded events replayed to the same actions"
    )
    for name, both in results.items():
        print(name)
        for figure in both["live"][0]:
            print(f"  {figure:18} live {said(both['live'], figure):28} forecast {said(both['forecast'], figure)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
