"""Around the published setting: one thing changed at a time, the same policy without retuning, and all its rivals.

Scenario
    The published setting of `benchmarks/paper.py`: YOLOv5s by its published p99 fit, 20 requests/s in bursts, 296.48
    KiB each over a 4G network, due 1 s after sending, at most 16 cores and batches of 8. Around it other arrivals,
    surges, payloads, rates, models, mixes of SLOs, noisy service times, lanes that slow each other down, slow resizes,
    and some of these together. Every policy meets the same requests and draws the same service times; seeds draw new
    ones. A run lasts ten minutes, or 12,000 requests if these are fewer.
Given
    For each policy, as means over the seeds: requests that missed their own deadline, those beyond what every schedule
    misses, seconds with a miss (the published way of counting), mean cores, and these over the least of any schedule
    with as few misses (docs/bound.md; a yardstick only where service times are random).
Verdict
    "ahead" if no rival has as few misses on as few cores; else who does. A rival with fewer misses on more cores is
    named as well: it bought them.
Rivals
    All of docs/baselines.md. Static lanes of one core in five numbers, from what the mean rate keeps busy to three
    times that: the best of these is what somebody would configure who knows the load beforehand and tried them all.
    The horizontal autoscaler from one replica, and prepared for the load and half more.

* ``--trace FILE``: the bandwidth log of the paper (the Ghent 4G logs), or any other; without it, a generated network.
* ``--profiles FILE``: the published profile (CSV) to fit the models to; without it, coefficients that were so fitted.
* ``--only TEXT``: scenarios whose name contains it. ``--all``: the table of every scenario beside the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from contenders import MODELS, ONE_LANE, PUBLISHED, SPONGE, Setting, clairvoyant, contenders, figures, fit_profiles

from sponge.core.latency import LatencyModel
from sponge.sim.kernel import simulate
from sponge.sim.service import Service
from sponge.workload import PROCESSES, BandwidthTrace, SloClass, Traffic, Workload, fixed, load_bandwidth, lte_like

DURATION_S = 600.0
REQUESTS = 12_000
LANES = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Static lanes that are tried, over those that the mean rate keeps busy."""
SAME_CORES = 1e-6
ROUGH = {"noise_cv": 0.1, "straggler_share": 0.01, "straggler_factor": 3.0}
MIX = (SloClass(0.5), SloClass(1.0, 2.0), SloClass(2.0))

Rows = dict[str, dict[str, list[float]]]
"""By policy and figure: a value for each seed."""


@attrs.frozen(kw_only=True)
class Scenario:
    """The published setting, but for what is said."""

    name: str
    arrivals: str = "bursts"
    rate_rps: float = 20.0
    payload_kib: float = 296.48
    model: str = "yolov5s"
    slos: tuple[SloClass, ...] = (SloClass(1.0),)
    service: dict[str, float] = attrs.field(factory=dict)
    interference: float = 0.0
    told: bool = True
    """Whether the latency model that the policies have knows of the interference, as a measured profile does."""
    resize_delay_s: float = 0.0
    generated: bool = False
    shortcut: bool = True
    """Network time from the bandwidth of one second, as published, instead of its integral."""

    @property
    def duration_s(self) -> float:
        """Length of a run [s]."""
        return min(DURATION_S, REQUESTS / self.rate_rps)

    def workload(self, trace: BandwidthTrace, seed: int) -> Workload:
        """Return the requests of a seed."""
        if self.generated:
            trace = lte_like(DURATION_S, np.random.default_rng([seed, 1]))
        traffic = Traffic(
            rate_rps=self.rate_rps,
            duration_s=self.duration_s,
            arrivals=PROCESSES[self.arrivals],
            payload=fixed(self.payload_kib * 1024),
            slos=self.slos,
        )
        return traffic.workload(trace, seed, shortcut=self.shortcut)

    def setting(self, models: dict[str, LatencyModel]) -> Setting:
        """Return what the policies know."""
        return Setting(
            latency=attrs.evolve(models[self.model], interference=self.interference if self.told else 0.0),
            rate_rps=self.rate_rps,
            slo_s=min(slo.slo_s for slo in self.slos),
            resize_delay_s=self.resize_delay_s,
        )


def scenarios() -> list[Scenario]:
    """Return all scenarios, the published setting first."""
    return [
        Scenario(name="published setting"),
        Scenario(name="uploads integrated over time", shortcut=False),
        Scenario(name="generated network", generated=True),
        *(Scenario(name=f"{name} arrivals", arrivals=name) for name in ("constant", "poisson", "markov")),
        Scenario(name="surges of 3x for 10 s", arrivals="surges"),
        *(Scenario(name=f"{size:g} KiB", payload_kib=size) for size in (100.0, 200.0, 500.0)),
        *(Scenario(name=f"{rate:g} requests/s", rate_rps=rate) for rate in (5.0, 10.0, 40.0, 80.0)),
        Scenario(name="poisson, 5 requests/s", arrivals="poisson", rate_rps=5.0),
        Scenario(name="poisson, 80 requests/s", arrivals="poisson", rate_rps=80.0),
        Scenario(name="surges, 40 requests/s", arrivals="surges", rate_rps=40.0),
        *_models(),
        Scenario(name="SLOs of 0.5, 1 and 2 s", slos=MIX),
        Scenario(name="SLOs of 0.5, 1 and 2 s, poisson", slos=MIX, arrivals="poisson"),
        Scenario(name="noise 10 %", service={"noise_cv": 0.1}),
        Scenario(name="noise 10 %, 1 % stragglers at 3x", service=ROUGH),
        *(
            Scenario(name=f"lanes slow each other by {share:.0%}", interference=share)
            for share in (0.01, 0.03, 0.05, 0.1)
        ),
        *(
            Scenario(name=f"the same by {share:.0%}, not in the profile", interference=share, told=False)
            for share in (0.03, 0.1)
        ),
        *(Scenario(name=f"resize takes {1000 * delay:g} ms", resize_delay_s=delay) for delay in (0.05, 1.0)),
        Scenario(name="resize takes 1 s, surges", resize_delay_s=1.0, arrivals="surges"),
        Scenario(
            name="surges, noise, stragglers, 3 % a lane, SLO mix, integrated",
            arrivals="surges",
            service=ROUGH,
            interference=0.03,
            slos=MIX,
            shortcut=False,
        ),
    ]


def _models() -> list[Scenario]:
    return [
        Scenario(name=f"{model}, {rate:g} requests/s{', ' + arrivals if arrivals != 'bursts' else ''}",
                 model=model, rate_rps=rate, arrivals=arrivals)
        for model in ("yolov5n", "resnet18")
        for rate, arrivals in ((20.0, "bursts"), (80.0, "bursts"), (80.0, "poisson"))
    ]  # fmt: skip


def run_seed(
    scenario: Scenario, trace: BandwidthTrace, models: dict[str, LatencyModel], seed: int
) -> dict[str, dict[str, float]]:
    """Run all policies on the requests of one seed."""
    setting = scenario.setting(models)
    requests = scenario.workload(trace, seed)
    real = attrs.evolve(models[scenario.model], interference=scenario.interference)
    least = clairvoyant(requests, attrs.evolve(setting, latency=real))
    service = Service(real, **scenario.service)
    return {
        contender.name: figures(
            simulate(requests, contender.make(), attrs.evolve(service, **contender.resize), seed=seed), least
        )
        for contender in contenders(setting, lanes=LANES)
    }


def mean(rows: Rows, policy: str, figure: str) -> float:
    """Return a figure of a policy, averaged over the seeds."""
    return float(np.mean(rows[policy][figure]))


def verdict(rows: Rows) -> dict[str, Any]:
    """Say who has as few misses as sponge on as few cores, and who has fewer misses on more cores."""
    missed, cores = mean(rows, SPONGE, "missed_pct"), mean(rows, SPONGE, "mean_cores")
    rivals = {
        policy: (mean(rows, policy, "missed_pct"), mean(rows, policy, "mean_cores"))
        for policy in rows
        if policy not in (SPONGE, ONE_LANE)
    }
    no_worse = {name for name, (m, c) in rivals.items() if m <= missed and c <= cores + SAME_CORES}
    beaten_by = sorted(no_worse, key=lambda name: rivals[name])
    bought = [name for name, (m, _) in rivals.items() if m < missed and name not in no_worse]
    return {
        "ahead": not beaten_by,
        "beaten_by": beaten_by,
        "fewer_misses_on_more_cores": sorted(bought, key=lambda name: rivals[name][1]),
    }


def said(found: dict[str, Any], rows: Rows) -> str:
    """Return the verdict in words."""

    def figures_of(policy: str) -> str:
        return f"{policy}: {mean(rows, policy, 'missed_pct'):.3f} %, {mean(rows, policy, 'mean_cores'):.2f} cores"

    if not found["ahead"]:
        return f"**not ahead** ({figures_of(found['beaten_by'][0])})"
    bought = found["fewer_misses_on_more_cores"]
    return f"ahead (fewer misses on more cores: {figures_of(bought[0])})" if bought else "ahead"


def summary_line(name: str, rows: Rows) -> str:
    """Return one scenario as a row of the summary."""

    def cell(policy: str) -> str:
        return f"{mean(rows, policy, 'missed_pct'):.3f} / {mean(rows, policy, 'mean_cores'):.2f}"

    over = float(np.mean(np.divide(rows[SPONGE]["mean_cores"], rows[SPONGE]["bound_mean_cores"])))
    horizontals = [policy for policy in rows if policy.startswith("horizontal")]
    static = min(
        (policy for policy in rows if "of 1 core, EDF" in policy),
        key=lambda policy: (mean(rows, policy, "missed_pct"), mean(rows, policy, "mean_cores")),
    )
    count = static.split()[1]
    return " | ".join(
        (
            f"| {name}",
            f"{cell(SPONGE)}",
            f"{mean(rows, SPONGE, 'avoidable_pct'):.3f}",
            f"{over:.2f}",
            cell(ONE_LANE),
            cell(f"{PUBLISHED}, partial batches wait 0.1 s"),
            *map(cell, horizontals),
            f"{cell(static)} ({count})",
            f"{said(verdict(rows), rows)} |",
        )
    )


HEAD = (
    "| scenario | sponge: missed [%] / cores | avoidable [%] | x bound | sponge, one lane | published, short wait "
    "| horizontal from 1 | prepared | best static lanes (how many) | |\n|---|---|---|---|---|---|---|---|---|---|"
)


def print_full(name: str, rows: Rows) -> None:
    """Print all policies of a scenario, as means and ranges over the seeds."""
    print(f"\n{name}\n")
    print(
        "| policy | missed [%] | avoidable [%] | seconds missed [%] | mean cores | x bound |\n|---|---|---|---|---|---|"
    )
    for policy, row in rows.items():
        missed, cores = row["missed_pct"], row["mean_cores"]
        over = float(np.mean(np.divide(cores, row["bound_mean_cores"])))
        print(
            f"| {policy} | {np.mean(missed):.3f} ({min(missed):.3f}-{max(missed):.3f}) "
            f"| {np.mean(row['avoidable_pct']):.3f} | {np.mean(row['seconds_missed_pct']):.2f} "
            f"| {np.mean(cores):.2f} ({min(cores):.2f}-{max(cores):.2f}) | {over:.2f} |"
        )


def run_all(
    chosen: list[Scenario], trace: BandwidthTrace, models: dict[str, LatencyModel], seeds: int, jobs: int
) -> dict[str, Rows]:
    """Run every scenario and seed in processes of their own."""
    each: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        tasks = {
            pool.submit(run_seed, scenario, trace, models, seed): (index, seed)
            for index, scenario in enumerate(chosen)
            for seed in range(seeds)
        }
        for done, task in enumerate(as_completed(tasks), start=1):
            index, seed = tasks[task]
            each[index, seed] = task.result()
            print(f"{done}/{len(tasks)}: {chosen[index].name}, seed {seed}", file=sys.stderr, flush=True)
    found: dict[str, Rows] = {}
    for index, scenario in enumerate(chosen):
        first = each[index, 0]
        found[scenario.name] = {
            policy: {figure: [each[index, seed][policy][figure] for seed in range(seeds)] for figure in first[policy]}
            for policy in first
        }
    return found


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="bandwidth log; by default a generated LTE-like network")
    parser.add_argument("--profiles", type=Path, help="CSV of the published profile")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one a CPU")
    parser.add_argument("--only", help="scenarios whose name contains this")
    parser.add_argument("--all", action="store_true", help="print all policies of every scenario, too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    chosen = [scenario for scenario in scenarios() if options.only is None or options.only in scenario.name]
    if not chosen or options.seeds < 1 or options.jobs < 1:
        parser.error("no scenario of that name, or seeds or jobs below 1")
    generated = lte_like(DURATION_S, np.random.default_rng(0))
    trace = generated if options.trace is None else load_bandwidth(options.trace)
    models = MODELS if options.profiles is None else fit_profiles(options.profiles)
    found = run_all(chosen, trace, models, options.seeds, options.jobs)
    if options.json:
        results = {name: {"policies": rows, "verdict": verdict(rows)} for name, rows in found.items()}
        json.dump({"seeds": options.seeds, "scenarios": results}, sys.stdout, indent=1)
        print()
        return 0
    network = "a generated network" if options.trace is None else options.trace.name
    print(f"{options.seeds} seeds over {network}\n\n{HEAD}")
    for name, rows in found.items():
        print(summary_line(name, rows))
    ahead = sum(verdict(rows)["ahead"] for rows in found.values())
    print(f"\nahead of every rival in {ahead} of {len(found)} scenarios")
    if options.all:
        for name, rows in found.items():
            print_full(name, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
