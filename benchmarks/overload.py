"""What a surge does: goodput, memory, refusals and recovery from half of what can be served to ten times as much.

Scenario: Poisson arrivals at each load for a minute, budgets uniform from 0.5 to 1.5 times their mean, sent open loop
by threads of the same process (see ``openloop.py``). The capacity is measured first: what the scheduler answers per
second when its queue never empties. Then a surge: half of the capacity, several times the capacity, half again.

Models: the text detector of the demo; ``cheap``, some 1 ms a request, so that ten times its capacity is thousands of
requests a second; ``trivial``, which does nothing, so that the capacity is that of the service's own Python and of the
senders', who cannot send ten times as much: what they did send is told.

Contenders: sponge; sponge with clients that never read their results; a scheduler with all cores and earliest deadline
first, in as many lanes, refusing what is late already; and a plain ``ThreadPoolExecutor`` over ``session.run``, first
come first served, which knows no deadline.

Constraint: an answer counts if it came by its deadline. Goodput is such answers per second of scheduled arrivals, the
first tenth of each minute left out.

Final numbers: the least goodput at or above capacity as a share of the peak (reach: 0.9 at least); the 99th percentile
of the time from when a request was hopeless until its client was told (at most 5 ms); growth of the resident memory
during a minute, the first tenth left out; time from the end of the surge until misses and response times are what they
were before (at most 2 s).

When a request is hopeless: at once if the queue is full; else when less is left than the model usually takes alone on
all cores (the profile's median), plus the guard: an idle lane still tries what the tail would not allow; at the call of
`submit` if that is so already. A refusal before that instant counts as 0. *At the door* are the refusals of those that
were hopeless when they came, from the call of `submit` on.

Senders at thousands of requests a second hold the interpreter's lock for much of the time, and a thread that wants it,
such as the one that tells who is refused, waits for up to one switch interval of the interpreter, 5 ms unless
``--switch-interval-s`` says otherwise.

Left out: the network and its own queues; several models in one process; clients that try again at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import load_models
import numpy as np
from load_models import Inputs, Model
from openloop import DEADLINE, LATE, QUEUE_FULL, UNSENT, Memory, OpenLoop, Schedule, Sent, Submit, say
from overhead import bare_session, keep_busy

from sponge.commands.demo import best_batch_size
from sponge.commands.replay import OtherProcesses
from sponge.core.controller import Controller
from sponge.core.latency import LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.live.profiler import Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.sim.baselines import StaticController

UNREAD_SPONGE = "sponge, unread"
LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
BLOCKS = 9
"""Parts of a minute, of whose goodputs the spread is given."""
REACH_SHARE, REACH_REFUSAL_MS, REACH_RECOVERY_S = 0.9, 5.0, 2.0
CALM = 0.5
"""Load before and after the surge."""
WINDOW_S = 0.25
"""Windows by which the time to recovery is told."""
WELL_FOR_S = 1.0
MAX_BATCH_SIZE = 8
PATIENCE_S = 3.0
MOST_REQUESTS = 3_000_000
"""Of one load: more are a shorter run."""


@attrs.frozen(kw_only=True)
class Bench:
    """What all contenders serve with."""

    model: Model
    session: ElasticSession
    solver: Solver
    typical: LatencyModel
    cpu_control: Any
    senders: int

    @property
    def fastest_s(self) -> float:
        """The least that a lone request usually takes, guard included [s]."""
        return float(self.typical.latency_s(1, self.solver.max_cores)) + Settings().guard_s

    def static(self) -> StaticController:
        """All cores, earliest deadline first, one lane for each."""
        cores = round(self.solver.max_cores)
        return StaticController(
            cores,
            order="edf",
            max_batch_size=best_batch_size(self.typical, 1.0, cores),
            lanes=cores,
            drop_late=True,
            latency=self.typical,
        )


@contextlib.contextmanager
def serving(bench: Bench, contender: str) -> Iterator[tuple[Submit, Scheduler | None]]:
    """Start a contender; give what hands in a request, and the scheduler if it is one."""
    if contender == "executor":
        bare = bare_session(bench.model.path, 1)
        pool = ThreadPoolExecutor(round(bench.solver.max_cores))
        try:
            yield (lambda inputs, _: pool.submit(bare.run, None, inputs)), None
        finally:
            pool.shutdown(cancel_futures=True)
        return
    reads = contender != UNREAD_SPONGE
    controller: ControllerProtocol = bench.static() if contender == "static" else Controller(bench.solver)
    with (
        best_scaler(bench.cpu_control) as scaler,  # type: ignore[attr-defined]
        Scheduler(bench.session, scaler=scaler, controller=controller) as scheduler,
    ):

        def submit(inputs: Inputs, deadline: float) -> Future[Any] | None:
            future = scheduler.submit(inputs, deadline=deadline)
            return future if reads else None

        try:
            yield submit, scheduler
        finally:
            scheduler.close(drain=False)


def capacity_rps(bench: Bench) -> float:
    """What the scheduler answers per second when its queue never empties: median of three rounds."""
    cores = round(bench.solver.max_cores)
    guess = cores * float(bench.typical.throughput_rps(MAX_BATCH_SIZE, 1.0, cores))
    with serving(bench, "sponge") as (_, scheduler):
        assert scheduler is not None
        count = int(min(40_000, max(50, 2 * guess)))
        return float(np.median([keep_busy(scheduler, bench.model.inputs[0], count, 64) for _ in range(3)]))


def at_load(bench: Bench, contender: str, rate_rps: float, duration_s: float, seed: int) -> dict[str, Any]:
    """Serve one load."""
    duration_s = min(duration_s, MOST_REQUESTS / rate_rps)
    schedule = Schedule.of([(rate_rps, duration_s)], bench.model.budget_s, seed)
    with serving(bench, contender) as (submit, scheduler), Memory() as memory:
        others = OtherProcesses()
        loop = OpenLoop(schedule, bench.model.inputs, submit, senders=bench.senders)
        sent = loop.wait(PATIENCE_S)
        if contender == UNREAD_SPONGE:
            assert scheduler is not None
            scheduler.close()
        statistics = None if scheduler is None else scheduler.statistics()
        samples = memory.samples(loop.zero)
        others_cores = others.cores()
    skipped_s = duration_s / 10
    inside = [(at, mb) for at, mb in samples if skipped_s <= at <= duration_s]
    found: dict[str, Any] = {
        "requests": len(sent.fate),
        "sent_share": 1 - sent.count(UNSENT) / len(sent.fate),
        "others_cores": others_cores,
        "memory_mb": inside,
        "memory_growth_mb": inside[-1][1] - inside[0][1] if inside else 0.0,
    }
    if statistics is not None and contender == UNREAD_SPONGE:
        found["goodput_rps"] = statistics.met / duration_s
        found["accounted"] = statistics.submitted == (
            statistics.met
            + statistics.late
            + statistics.failed
            + statistics.cancelled
            + sum(statistics.rejected.values())
        )
        return found
    return found | read_figures(bench, sent, skipped_s, duration_s)


def read_figures(bench: Bench, sent: Sent, skipped_s: float, duration_s: float) -> dict[str, Any]:
    """What clients that read have seen."""
    arrives_s = sent.schedule.arrives_s
    edges_s = np.linspace(skipped_s, duration_s, BLOCKS + 1)
    goodput = np.histogram(arrives_s[sent.met], edges_s)[0] / np.diff(edges_s)
    counted = arrives_s >= skipped_s
    response_ms = 1000 * sent.response_s[counted]
    response_ms = response_ms[np.isfinite(response_ms)]
    return {
        "goodput_rps": float(goodput.mean()),
        "goodput_rps_p10_p90": np.percentile(goodput, [10, 90]).tolist(),
        "met_share": float(np.mean(sent.met[counted])),
        "late": sent.count(LATE),
        "rejected_deadline": sent.count(DEADLINE),
        "rejected_queue_full": sent.count(QUEUE_FULL),
        "response_ms_p50_p99": np.percentile(response_ms, [50, 99]).tolist() if len(response_ms) else None,
        "submit_us_p50_p99": (1e6 * np.nanpercentile(sent.returned_s - sent.submitted_s, [50, 99])).tolist(),
        **refusals(bench, sent),
    }


def refusals(bench: Bench, sent: Sent) -> dict[str, Any]:
    """How long it took to tell those who were turned away [ms]."""
    hopeless_s = sent.schedule.deadline_s - bench.fastest_s
    full, refused = sent.fate == QUEUE_FULL, (sent.fate == QUEUE_FULL) | (sent.fate == DEADLINE)
    at_the_door = full | (refused & (hopeless_s <= sent.submitted_s))
    since_s = np.where(at_the_door, sent.submitted_s, hopeless_s)
    told_ms = 1000 * np.maximum(0.0, sent.told_s - since_s)

    def spread(which: Any) -> list[float] | None:
        return np.percentile(told_ms[which], [50, 99, 100]).tolist() if which.any() else None

    return {
        "refusal_ms_p50_p99_max": spread(refused),
        "at_the_door_ms_p50_p99_max": spread(at_the_door),
        "at_the_door": int(np.count_nonzero(at_the_door)),
    }


def surge(bench: Bench, contender: str, rate_rps: float, factor: float, lengths_s: Sequence[float], seed: int) -> Any:
    """Half of the capacity, a surge, half again; see how long the surge is felt after its end."""
    before_s, surge_s, after_s = lengths_s
    calm_rps = CALM * rate_rps
    phases = [(calm_rps, before_s), (factor * rate_rps, surge_s), (calm_rps, after_s)]
    schedule = Schedule.of(phases, bench.model.budget_s, seed)
    with serving(bench, contender) as (submit, _):
        sent = OpenLoop(schedule, bench.model.inputs, submit, senders=bench.senders).wait(PATIENCE_S)
    edges_s = np.arange(0.0, sum(lengths_s) + WINDOW_S / 2, WINDOW_S)
    missed, response_ms = by_window(sent, edges_s)
    recovery_s = recovered_after_s(edges_s, missed, response_ms, before_s, before_s + surge_s)
    return {
        "recovery_s": recovery_s,
        "windows_s": edges_s[:-1].tolist(),
        "missed_share": missed.tolist(),
        "response_ms": [None if np.isnan(value) else value for value in response_ms.tolist()],
        "surge_from_to_s": [before_s, before_s + surge_s],
    }


def by_window(sent: Sent, edges_s: Any) -> tuple[Any, Any]:
    """Share missed, and median response of the answered [ms], by the window of the arrival."""
    window = np.digitize(sent.schedule.arrives_s, edges_s) - 1
    missed, response_ms = [], []
    for k in range(len(edges_s) - 1):
        here = window == k
        missed.append(1 - sent.met[here].mean() if here.any() else 0.0)
        answered = sent.response_s[here]
        answered = answered[np.isfinite(answered)]
        response_ms.append(1000 * float(np.median(answered)) if len(answered) else np.nan)
    return np.array(missed), np.array(response_ms)


def recovered_after_s(edges_s: Any, missed: Any, response_ms: Any, calm_until_s: float, surge_until_s: float) -> float:
    """From the end of the surge to the first window from which on, for a second, none is worse than the worst before.

    A window may have a tenth more of both, since few requests fall into one; ``inf`` if that never came to be.
    """
    starts_s = edges_s[:-1]
    calm = (starts_s >= min(1.0, calm_until_s / 2)) & (edges_s[1:] <= calm_until_s)
    worst_missed = missed[calm].max() + 0.1
    worst_ms = 1.1 * np.nanmax(response_ms[calm])
    well = (missed <= worst_missed) & ~(response_ms > worst_ms)
    windows = round(WELL_FOR_S / WINDOW_S)
    for k in np.flatnonzero(starts_s >= surge_until_s - 1e-9):
        if k + windows <= len(well) and well[k : k + windows].all():
            return float(starts_s[k] - surge_until_s)
    return float("inf")


def verdict(loads: dict[str, dict[str, list[Any]]], surges: dict[str, list[Any]]) -> dict[str, Any]:
    """The final numbers of each contender; over the repeats the worst."""
    final: dict[str, Any] = {}
    for contender, by_load in loads.items():
        goodput = {float(load): np.mean([run["goodput_rps"] for run in runs]) for load, runs in by_load.items()}
        peak = max(goodput.values())
        beyond = [value for load, value in goodput.items() if load >= 1.0]
        every = [run for runs in by_load.values() for run in runs]
        refused = [run["refusal_ms_p50_p99_max"][1] for run in every if run.get("refusal_ms_p50_p99_max")]
        door = [run["at_the_door_ms_p50_p99_max"][1] for run in every if run.get("at_the_door_ms_p50_p99_max")]
        recovery = [run["recovery_s"] for run in surges.get(contender, [])]
        final[contender] = {
            "peak_goodput_rps": peak,
            "least_share_of_peak": min(beyond) / peak if beyond and peak else None,
            "refusal_ms_p99_worst_load": max(refused, default=None),
            "at_the_door_ms_p99_worst_load": max(door, default=None),
            "memory_growth_mb_worst": max(run["memory_growth_mb"] for run in every),
            "recovery_s": recovery,
        }
    return final


def draw(path: str, results: dict[str, Any]) -> None:
    """Goodput, refusals and memory over the load; misses around the surge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (goodput, refusal), (memory, recovery) = figure.subplots(2, 2)
    colours = {contender: f"C{index}" for index, contender in enumerate(results["loads"])}
    for contender, by_load in results["loads"].items():
        loads = [float(load) for load in by_load]
        runs = list(by_load.values())
        style = {"color": colours[contender], "marker": ".", "label": contender}
        goodput.plot(loads, [np.mean([run["goodput_rps"] for run in some]) for some in runs], **style)
        spans = [[run["goodput_rps_p10_p90"] for run in some if "goodput_rps_p10_p90" in run] for some in runs]
        if all(spans):
            low, high = np.array([np.mean(some, axis=0) for some in spans]).T
            goodput.fill_between(loads, low, high, color=colours[contender], alpha=0.15)
        told = [
            [run["refusal_ms_p50_p99_max"][1] for run in some if run.get("refusal_ms_p50_p99_max")] for some in runs
        ]
        points = [(load, max(some)) for load, some in zip(loads, told, strict=True) if some]
        if points:
            refusal.plot(*zip(*points, strict=True), **style)
        memory.plot(loads, [max(run["memory_growth_mb"] for run in some) for some in runs], **style)
    for contender, runs in results["surges"].items():
        for number, run in enumerate(runs):
            label = contender if not number else None
            missed = 100 * np.array(run["missed_share"])
            recovery.plot(run["windows_s"], missed, color=colours[contender], lw=1, label=label)
    if any(results["surges"].values()):
        recovery.axvspan(*next(iter(results["surges"].values()))[0]["surge_from_to_s"], color="0.9")
    goodput.plot(LOADS, [min(load, 1) * results["capacity_rps"] for load in LOADS], ":", color="0.6", label="ideal")
    refusal.axhline(REACH_REFUSAL_MS, ls=":", color="0.6")
    goodput.set_ylabel("answers in time per second")
    refusal.set(ylabel="hopeless until told, p99 [ms]", yscale="symlog")
    memory.set(ylabel="growth of memory in a run [MB]", ylim=(-1, max(1.0, 1.1 * memory.get_ylim()[1])))
    goodput.set_ylim(0, None)
    recovery.set(xlabel="scheduled arrival [s]", ylabel="missed [%]")
    for axes in (goodput, refusal, memory):
        axes.set(xscale="log", xlabel="offered load, share of capacity")
        axes.set_xticks(LOADS, [f"{load:g}" for load in LOADS], minor=False)
        axes.minorticks_off()
    for axes in (goodput, refusal, memory, recovery):
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    figure.suptitle(
        f"{results['model']}: {results['capacity_rps']:,.0f} requests/s can be served; surge to {results['surge']:g}×"
    )
    figure.savefig(path, dpi=130)


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    capacity_rps, budget_s = results["capacity_rps"], results["budget_s"]
    print(f"{results['model']}: {capacity_rps:,.0f} requests/s can be served; budgets {budget_s:g} s ± half")
    print(
        f"{'':20} load   sent   in time/s (p10-p90 of blocks)  late  refused p99 [ms]  at the door  others  memory [MB]"
    )
    for contender, by_load in results["loads"].items():
        for load, runs in by_load.items():
            for run in runs:
                low, high = run.get("goodput_rps_p10_p90", (np.nan, np.nan))
                told, door = (
                    "-" if not run.get(name) else f"{run[name][1]:.2f}"
                    for name in ("refusal_ms_p50_p99_max", "at_the_door_ms_p50_p99_max")
                )
                print(
                    f"{contender:20} {load:>4}  {100 * run['sent_share']:3.0f} %  {run['goodput_rps']:9,.1f} "
                    f"({low:,.1f}-{high:,.1f})  {run.get('late', '-'):>5}  {told:>15}  {door:>13}  "
                    f"{run['others_cores']:6.2f}  {run['memory_growth_mb']:+10.2f}"
                )
    for contender, final in results["final"].items():
        share, recovery = final["least_share_of_peak"], final["recovery_s"]
        print(f"{contender}: least goodput beyond capacity {share and round(share, 3)} of the peak, "
              f"refusal p99 {final['refusal_ms_p99_worst_load']} ms, recovery {recovery} s")  # fmt: skip


def run_all(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """All loads and surges of all contenders, in turn."""
    rate_rps = capacity_rps(bench)
    say(f"{bench.model.name}: {rate_rps:,.0f} requests/s can be served")
    contenders = options.contenders.split(";")
    loads: dict[str, dict[str, list[Any]]] = {name: {f"{load:g}": [] for load in options.loads} for name in contenders}
    surges: dict[str, list[Any]] = {name: [] for name in contenders if name != UNREAD_SPONGE}
    lengths_s = (10 * options.surge_scale, 10 * options.surge_scale, 20 * options.surge_scale)
    for repeat in range(options.repeats):
        for load in options.loads:
            for contender in contenders:
                found = at_load(bench, contender, load * rate_rps, options.duration_s, repeat)
                loads[contender][f"{load:g}"].append(found)
                say(f"repeat {repeat}, load {load:g}, {contender}: {found['goodput_rps']:,.1f}/s in time")
        for contender, runs in surges.items():
            runs.append(surge(bench, contender, rate_rps, options.surge, lengths_s, repeat))
            say(f"repeat {repeat}, surge, {contender}: recovered after {runs[-1]['recovery_s']:g} s")
    return {
        "model": bench.model.name,
        "capacity_rps": rate_rps,
        "budget_s": bench.model.budget_s,
        "surge": options.surge,
        "switch_interval_s": options.switch_interval_s,
        "loads": loads,
        "surges": surges,
        "final": verdict(loads, surges),
    }


def main() -> int:
    """Run and print; exit 0 whatever was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["detector", "cheap", "trivial"], default="detector")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), help="shares of the capacity")
    parser.add_argument("--duration-s", type=float, default=60.0, help="of each load")
    parser.add_argument("--surge", type=float, default=5.0, help="load during the surge")
    parser.add_argument("--surge-scale", type=float, default=1.0, help="of 10 s before, 10 s surge, 20 s after")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--senders", type=int, default=2)
    parser.add_argument("--switch-interval-s", type=float, default=sys.getswitchinterval(), help="of the interpreter")
    parser.add_argument("--contenders", default=f"sponge;{UNREAD_SPONGE};static;executor", help="separated by ;")
    parser.add_argument("--cpu-control", default="auto", choices=["auto", "quota", "affinity", "threads"])
    parser.add_argument("--profile-s", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", help="picture to draw")
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_interval_s)
    cores = min(available_cpus(), 4)
    with tempfile.TemporaryDirectory() as folder:
        cheap = attrs.evolve(load_models.work(Path(folder), 8), name="cheap")
        model = {
            "detector": load_models.detector,
            "cheap": lambda: cheap,
            "trivial": lambda: load_models.trivial(Path(folder)),
        }
        results = run_model(model[options.model](), cores, options)
    if options.out:
        draw(options.out, results)
    if options.json:
        json.dump(results, sys.stdout)
        print()
    else:
        show(results)
    return 0


def run_model(model: Model, cores: int, options: argparse.Namespace) -> dict[str, Any]:
    """Profile a model and run everything."""
    with ElasticSession(model.path, max_threads=cores, max_lanes=cores) as session:
        profile = Profiler(
            session,
            batch_sizes=(1, 2, 4, MAX_BATCH_SIZE),
            inputs=model.inputs[0],
            budget_s=options.profile_s,
        ).run()
        latency = LatencyModel.fit(profile, 99)
        bench = Bench(
            model=model,
            session=session,
            solver=Solver(latency, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores),
            typical=LatencyModel.fit(profile, 50),
            cpu_control=options.cpu_control,
            senders=options.senders,
        )
        session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=model.shapes)
        return run_all(bench, options)


if __name__ == "__main__":
    sys.exit(main())
