"""The published setting, replayed: the published algorithm and its rivals beside sponge, request by request.

Scenario (Razavi et al., EuroMLSys 2024): YOLOv5s by its published latency model, 20 requests a second that are all
sent in the first 0.2 s of it, 296.48 KiB each over a 4G network, an answer due one second after sending, at most 16
cores and batches of 8. All policies meet the same requests and the same service times on the simulator; every seed
draws new send times.

* ``--trace FILE``: the bandwidth log of the paper (the Ghent 4G logs), or any other; without it, a generated network.
* ``--published FILE``: the published series (column ``cores_sponge``), to hold the replayed algorithm against.
* ``--noise``, ``--stragglers``, ``--interference``: a service less ideal than the published model, which the policies
  are not told. Apart from that, sponge is run with lanes that slow each other down, as its profile would then say.

Given for each policy, as mean and range over the seeds: requests that missed their own deadline [%], those beyond
what every schedule misses at the least [%], seconds with at least one miss [%] (the published way of counting), mean
cores in force, these over the published algorithm's, and over the least that any schedule with as few misses needs.

`benchmarks/robustness.py` does the same around this setting.

The last rows are the clairvoyant bound (docs/bound.md), with as few misses as it can tell. It holds for the service
times of the model and for batches on a core or more; with ``--noise`` or ``--stragglers`` it is a yardstick, and a
replica that shares a core while it waits for another is outside of it. Where lanes slow each other down in the profile,
the bound that sponge is held against is charged for that, too.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from contenders import (
    MAX_BATCH_SIZE,
    MAX_CORES,
    ONE_LANE,
    PUBLISHED,
    SPONGE,
    YOLOV5S,
    Contender,
    Setting,
    clairvoyant,
    contenders,
    figures,
)

from sponge.optimize.clairvoyant import Bound, Relaxation
from sponge.sim.baselines import PublishedAllocation
from sponge.sim.kernel import simulate
from sponge.sim.run import Run
from sponge.sim.service import Service
from sponge.workload import PROCESSES, BandwidthTrace, Workload, load_bandwidth, lte_like

RATE_RPS = 20.0
SLO_S = 1.0
PAYLOAD_BYTES = 296.48 * 1024
DURATION_S = 600.0
SAFETY = 0.9
INTERFERENCE = (0.01, 0.03, 0.05, 0.10)
"""Slowdown for each further busy lane, swept for sponge."""


def workload(trace: BandwidthTrace, seed: int) -> Workload:
    """Return the published requests: network time by the bandwidth of the second in which they are sent."""
    sends = PROCESSES["bursts"](RATE_RPS, DURATION_S, np.random.default_rng([seed, 1]))
    return Workload.from_network(sends, trace, PAYLOAD_BYTES, SLO_S, shortcut=True)


def measure(
    contender: Contender, traces: list[Workload], bounds: list[Bound], service: Service
) -> tuple[dict[str, Any], Run]:
    """Run one policy on every seed's requests; return the figures, and the first run for the picture."""
    service = attrs.evolve(service, **contender.resize)
    runs = [simulate(requests, contender.make(), service, seed=seed) for seed, requests in enumerate(traces)]
    each = [figures(run, least) for run, least in zip(runs, bounds, strict=True)]
    return {"policy": contender.name, **{name: [row[name] for row in each] for name in each[0]}}, runs[0]


def interference_rows(traces: list[Workload], service: Service) -> list[dict[str, Any]]:
    """Run sponge where lanes slow each other down, as a profile that was measured with busy lanes would say."""
    rows = []
    for slowdown in INTERFERENCE:
        setting = Setting(latency=attrs.evolve(YOLOV5S, interference=slowdown))
        slowed = attrs.evolve(service, latency=setting.latency, interference=None)
        contender = next(each for each in contenders(setting) if each.name == SPONGE)
        least = [clairvoyant(requests, setting) for requests in traces]
        name = f"{SPONGE}, each further lane {100 * slowdown:g} % slower"
        rows.append({**measure(contender, traces, least, slowed)[0], "policy": name})
    return rows


def bound_row(name: str, traces: list[Workload], relaxations: list[Relaxation]) -> dict[str, Any]:
    """Return the bound in the figures of a policy, averaged over the time until the last deadline."""
    least = [
        relaxation.core_seconds() / float(np.max(requests.deadline_s))
        for requests, relaxation in zip(traces, relaxations, strict=True)
    ]
    missed = [
        100 * relaxation.misses_at_least / len(requests.deadline_s)
        for requests, relaxation in zip(traces, relaxations, strict=True)
    ]
    return {"policy": name, "missed_pct": missed, "mean_cores": least}


def published_series(trace: BandwidthTrace, path: Path | None) -> dict[str, Any]:
    """Replay the published allocation, second by second, from the network time of each second alone."""
    seconds = np.arange(DURATION_S)
    # The prototype works in whole milliseconds.
    network_s = np.floor(1000 * trace.upload_time_s(seconds, PAYLOAD_BYTES, shortcut=True)) / 1000
    algorithm = PublishedAllocation(YOLOV5S, max_cores=MAX_CORES, max_batch_size=MAX_BATCH_SIZE)
    cores = list(algorithm.replay((SAFETY * SLO_S - network_s).tolist(), arrival_rate_rps=RATE_RPS))
    found: dict[str, Any] = {"replayed_mean_cores": float(np.mean(cores))}
    if path is not None:
        with path.open(newline="") as file:
            published = [float(row["cores_sponge"]) for row in csv.DictReader(file) if row["cores_sponge"]]
        found["published_mean_cores"] = float(np.mean(published))
    return found


def draw(path: Path, runs: dict[str, Run], title: str) -> None:
    """Draw the remaining budget, the cores and the misses over time, a mean or sum for each second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    budget, cores, misses = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.4, 1]})
    edges = np.arange(DURATION_S + 1)
    for index, (name, run) in enumerate(runs.items()):
        if index == 0:
            left_ms = 1000 * (run.deadline_s - run.arrived_at_s)
            budget.plot(run.arrived_at_s, left_ms, ".", ms=1.5, color="0.4")
        per_second = run.in_force.mean_per_bin(edges)
        cores.step(edges[:-1], per_second, where="post", lw=1, label=f"{name}: {run.mean_cores:.2f} on average")
        count = np.histogram(run.arrived_at_s[~run.met], edges)[0]
        misses.step(edges[:-1], count, where="post", lw=1, label=f"{name}: {run.misses} of {len(run)}")
    budget.set(ylabel="budget left\nat arrival [ms]", ylim=(0, None))
    cores.set(ylabel="cores, mean of\neach second", ylim=(0, None))
    misses.set(ylabel="deadlines missed\nin each second", xlabel="time [s]", ylim=(0, None))
    for axes in (cores, misses):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", frameon=False)
    for axes in (budget, cores, misses):
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def print_table(rows: list[dict[str, Any]], series: dict[str, Any], seeds: int) -> None:
    """Print means, and the range over the seeds in brackets."""
    base = float(np.mean(next(row for row in rows if row["policy"] == PUBLISHED)["mean_cores"]))
    for name, value in series.items():
        print(f"{name.replace('_', ' ')}: {value:.2f}")
    print(f"{seeds} seeds, {RATE_RPS:g} requests/s over {DURATION_S:g} s\n")
    head = ("policy", "missed [%]", "avoidable [%]", "seconds missed [%]", "mean cores", "ratio", "x bound")
    print(f"{head[0]:58}{head[1]:>22}{head[2]:>15}{head[3]:>20}{head[4]:>22}{head[5]:>8}{head[6]:>10}")
    for row in rows:
        missed, cores = row["missed_pct"], row["mean_cores"]
        missed_said = f"{np.mean(missed):.3f} ({min(missed):.3f}-{max(missed):.3f})"
        cores_said = f"{np.mean(cores):.2f} ({min(cores):.2f}-{max(cores):.2f})"
        avoidable, seconds, over = "-", "-", "-"
        if "bound_mean_cores" in row:  # the bound itself has no seconds, and no avoidable misses
            avoidable = f"{np.mean(row['avoidable_pct']):.3f}"
            seconds = f"{np.mean(row['seconds_missed_pct']):.2f}"
            over = f"{np.mean(np.divide(cores, row['bound_mean_cores'])):.2f}"
        ratio = np.mean(cores) / base
        print(f"{row['policy']:58}{missed_said:>22}{avoidable:>15}{seconds:>20}{cores_said:>22}{ratio:8.2f}{over:>10}")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="bandwidth log; by default a generated LTE-like network")
    parser.add_argument("--published", type=Path, help="CSV of the published series")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the service time over its mean")
    parser.add_argument("--stragglers", type=float, default=0.0, help="share of batches that take three times as long")
    parser.add_argument("--interference", type=float, default=0.0, help="slowdown for each further busy lane")
    parser.add_argument("--out", type=Path, help="where to draw the picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    generated = options.trace is None
    trace = lte_like(DURATION_S, np.random.default_rng(0)) if generated else load_bandwidth(options.trace)
    service = Service(
        YOLOV5S,
        noise_cv=options.noise,
        straggler_share=options.stragglers,
        interference=options.interference,
    )
    requests = [workload(trace, seed) for seed in range(options.seeds)]
    began_s = time.process_time()
    bounds = [clairvoyant(each, Setting()) for each in requests]
    bound_s = (time.process_time() - began_s) / options.seeds
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    for contender in contenders(Setting()):
        print(contender.name, file=sys.stderr, flush=True)
        row, run = measure(contender, requests, bounds, service)
        rows.append(row)
        runs[contender.name] = run
    print("lane interference", file=sys.stderr, flush=True)
    rows += interference_rows(requests, service)
    rows.append(bound_row("clairvoyant bound, one lane", requests, [each.one_lane for each in bounds]))
    rows.append(bound_row("clairvoyant bound, lanes", requests, [each.many_lanes for each in bounds]))
    series = published_series(trace, options.published)
    series["cpu_seconds_to_bound_a_run"] = bound_s
    if options.out is not None:
        shown = (PUBLISHED, "static 16 cores, EDF, adaptive batches", ONE_LANE, SPONGE)
        shown += ("horizontal, from 1 replica, cold start 10 s",)
        network = "a generated network" if generated else options.trace.name
        title = f"{RATE_RPS:g} requests/s in bursts over {network}, answer due {SLO_S:g} s after sending"
        draw(options.out, {name: runs[name] for name in shown}, title)
    if options.json:
        given = {name: getattr(service, name) for name in ("noise_cv", "straggler_share", "interference")}
        json.dump({"seeds": options.seeds, "service": given, "series": series, "policies": rows}, sys.stdout, indent=1)
        print()
    else:
        print_table(rows, series, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
