"""The race itself, inside the environment that `race.py` makes.

Scenario: a text detector (20 ms on one core) gets pictures over a 4G-like network, which leaves each a budget of its
own. Everybody has the same ONNX Runtime, threads without spinning, raw bytes in and out, and the same open-loop trace.
Peers batch, with settings tuned on another seed (`--tune`) and then frozen in ``tuned.json``. Final number: the share
answered within its own deadline, and how many of those a core-second of all server processes gives.

Every contender runs in a virtual environment of its own, in a control group that is measured, limited and ended. Only
loopback is used. What the race leaves out is in ``README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import environments
import figures
import group
import numpy as np
import tune
import workload
from contenders import CONTENDERS, CORES, HTTP, STATIC, Contender
from environments import HERE, say
from models import make as make_models
from replay import OK
from running import ContenderFailed, Running

TUNED = HERE / "tuned.json"
LOADS = (0.1, 0.3, 0.6, 0.9, 1.2)
LIMITED_LOAD = 0.6
BATCH = 8
BATCHING = {"batch": BATCH, "window_ms": 10}
TRACE_SEED, TUNING_SEED = 1000, 90_000
ROUNDS = 2
"""How often each contender is started: its repeats are shared out, so that the machine's moods are too."""
POISON_RATE_RPS, POISON_EVERY, POISON_BUDGET_S = 150.0, 1000, 0.25
CAPACITY_S = 4.0
STARTS = 3
SMALL_REPEATS = 3
SECTIONS = ("loads", "limited", "plain", "faults", "poison")


class Race:
    """Everything that a race shares: folders, settings, the trace, and what has come of it so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.folder
        self.contenders = [one for one in CONTENDERS if options.peers is None or one.name in options.peers]
        self.tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
        _, budget_s = workload.requests(200.0, 60.0, TUNING_SEED)
        self.budgets_s = dict(
            zip(
                ("tight", "third", "median", "two_thirds"),
                np.percentile(budget_s, [5, 100 / 3, 50, 200 / 3]),
                strict=True,
            )
        )
        self.capacity_rps = 0.0
        self.failed: dict[str, str] = {}
        self.runs: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        self.others: dict[str, Any] = {name: defaultdict(list) for name in SECTIONS[1:]}

    def settings(self, contender: Contender, model: str) -> dict[str, Any]:
        """Return all that the contender's server and client are told."""
        stem = self.folder / "models" / model
        alone_s = CORES / self.capacity_rps if self.capacity_rps else 0.02
        return {
            "model": f"{stem}.onnx",
            "cache": str(self.folder / "cache"),
            "service_s": 1.5 * alone_s,
            "classes_s": [self.budgets_s["third"], self.budgets_s["two_thirds"]],
            "batch": 4,
            "window_ms": 5,
            **STATIC[0],
            **json.loads(stem.with_suffix(".json").read_text()),
            **contender.settings,
            **self._tuned_for(contender.tuned_as or contender.name, model),
            **(
                {"slo_ms": round(1000 * self.budgets_s[contender.settings["slo"]])}
                if "slo" in contender.settings
                else {}
            ),
        }

    def _tuned_for(self, name: str, model: str) -> dict[str, Any]:
        return dict(self.tuned.get(f"{name}/{model}", self.tuned.get(name, {})))

    @contextlib.contextmanager
    def started(self, contender: Contender, model: str, **changed: Any) -> Iterator[Running]:
        """Start a contender, again if need be (pytriton allows its processes one second to meet), and warm it."""
        settings = self.settings(contender, model) | changed
        log = self.folder / "logs" / f"{contender.name}.txt"
        log.parent.mkdir(exist_ok=True)
        with self._start(contender, settings, log) as running:
            running.warm_up(BATCH)
            yield running

    def _start(self, contender: Contender, settings: dict[str, Any], log: Path) -> Running:
        for _ in range(STARTS - 1):
            try:
                return Running(contender, settings, self.folder, log)
            except ContenderFailed as failure:
                say(f"{failure}; once more")
        return Running(contender, settings, self.folder, log)

    def measure_capacity(self) -> None:
        """Ask `session.run` on all cores for as many answers as it can give."""
        bare = next(one for one in CONTENDERS if one.name == "bare")
        rates = []
        for placement in STATIC:
            with self.started(bare, "detector", **placement) as running:
                rates.append(running.throughput(CAPACITY_S)[0])
        self.capacity_rps = max(rates)
        say(f"capacity {self.capacity_rps:.1f} requests/s (side by side {rates[0]:.1f}, one wide {rates[1]:.1f})")

    def trace(self, load: float, seed: int, duration_s: float | None = None) -> tuple[Any, Any]:
        """Return instants and budgets at a share of the capacity."""
        return workload.requests(load * self.capacity_rps, duration_s or self.options.duration_s, seed)

    # -- what is run ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all sections."""
        in_rounds = {"loads", "limited", "plain"} & self.options.sections
        repeats = np.array_split(range(self.options.repeats), min(ROUNDS, self.options.repeats))
        for turn, repeated in enumerate(repeats):
            # The order turns round, but sponge over HTTP stays first: it tells how many cores the others get.
            order = self.contenders if turn % 2 == 0 else [*self.contenders[:1], *reversed(self.contenders[1:])]
            for contender in order if in_rounds else ():
                self._attempt(contender, functools.partial(self._race, contender, [int(one) for one in repeated]))
        if "faults" in self.options.sections:
            for contender in self.contenders:
                self._attempt(contender, functools.partial(self._faults, contender))
        if {"plain", "poison"} & self.options.sections:
            for contender in self.contenders:
                self._attempt(contender, functools.partial(self._race_small, contender))

    def _attempt(self, contender: Contender, part: Any) -> None:
        if contender.name in self.failed:
            return
        started = time.monotonic()
        try:
            part()
        except (ContenderFailed, OSError) as failure:
            self.failed[contender.name] = str(failure)
            say(f"given up: {failure}")
        say(f"{contender.name}: {time.monotonic() - started:.0f} s")

    def _race(self, contender: Contender, repeats: Sequence[int]) -> None:
        sections = self.options.sections
        with self.started(contender, "detector") as running:
            for repeat in repeats:
                if "loads" in sections:
                    for load in self.options.loads:
                        self._load(running, load, repeat)
                if "limited" in sections and contender.lane == HTTP and not contender.is_sponge:
                    self._limited(running, repeat)
                if "plain" in sections:
                    self._plain(running, "detector")

    def _load(self, running: Running, load: float, repeat: int) -> None:
        at_s, budget_s = self.trace(load, TRACE_SEED + repeat)
        if not len(at_s):
            return
        run = figures.judge(running.replay(at_s, budget_s), budget_s)
        self.runs[running.contender.name][str(load)].append(run)
        say(
            f"{running.contender.name:18} load {load:4} met {run['met_pct']:5.1f} %  "
            f"too late {run['too_late_pct']:5.1f} %  {run['met_per_core_s']:5.1f} per core-second"
        )

    def _limited(self, running: Running, repeat: int) -> None:
        """Once more with as many cores as sponge took at that load."""
        sponges = self.runs.get("sponge-http", {}).get(str(LIMITED_LOAD))
        if not sponges:
            return
        cores = float(np.mean([run["cpu_cores"] for run in sponges]))
        at_s, budget_s = self.trace(LIMITED_LOAD, TRACE_SEED + repeat)
        running.limit(cores)
        reply = running.replay(at_s, budget_s)
        running.limit(None)
        run = figures.judge(reply, budget_s) | {"cores": cores}
        self.others["limited"][running.contender.name].append(run)
        say(f"{running.contender.name:18} on {cores:.2f} cores met {run['met_pct']:5.1f} %")

    def _plain(self, running: Running, model: str) -> None:
        rate_rps, per_core_s = running.throughput()
        self.others["plain"][running.contender.name].append({model: rate_rps, f"{model}_per_core_s": per_core_s})

    def _faults(self, contender: Contender) -> None:
        """Lone requests; and eight at once of which one is poisonous: with batching on, whatever tuning chose."""
        batching = {} if contender.is_sponge or contender.settings.get("batch") == 1 else BATCHING
        with self.started(contender, "detector", **batching) as running:
            alone = running.replay(np.arange(21) * 0.25, [10.0] * 21)["requests"][1:]
            found = self.others["faults"][contender.name]
            found.append({"lone_ms": 1000 * float(np.median([response_s for _, _, response_s in alone]))})
            for _ in range(3):
                sent = running.replay(np.zeros(8), [10.0] * 8, poison=[3], patience_s=15.0)["requests"]
                hurt = sum(ended != OK for index, (_, ended, _) in enumerate(sent) if index != 3)
                found.append({"hurt": float(hurt)})

    def _race_small(self, contender: Contender) -> None:
        """The small model: how many answers, and one poisonous input in a thousand."""
        with self.started(contender, "small") as running:
            for repeat in range(min(SMALL_REPEATS, self.options.repeats)):
                if "plain" in self.options.sections:
                    self._plain(running, "small")
                if "poison" in self.options.sections:
                    self._poison(running, repeat)

    def _poison(self, running: Running, repeat: int) -> None:
        rng = np.random.default_rng([TRACE_SEED, repeat])
        at_s = np.cumsum(rng.exponential(1 / POISON_RATE_RPS, POISON_EVERY))
        budget_s = np.full(POISON_EVERY, POISON_BUDGET_S)
        poison = int(rng.integers(POISON_EVERY))
        reply = running.replay(at_s, budget_s, poison=[poison])
        failed = sum(ended == "failed" for index, (_, ended, _) in enumerate(reply["requests"]) if index != poison)
        run = figures.judge(reply, budget_s) | {"innocent_failed_permille": 1000 * failed / POISON_EVERY}
        self.others["poison"][running.contender.name].append(run)
        say(f"{running.contender.name:18} one poisonous: {failed} others failed, met {run['met_pct']:.1f} %")

    def result(self) -> dict[str, Any]:
        """Return everything, as JSON values."""
        apart = [one.name for one in self.contenders if one.lane == HTTP]
        every = [run for name in apart for at_load in self.runs.get(name, {}).values() for run in at_load]
        return {
            "machine": _machine(),
            "duration_s": self.options.duration_s,
            "repeats": self.options.repeats,
            "capacity_rps": self.capacity_rps,
            "budgets_s": {name: float(value) for name, value in self.budgets_s.items()},
            "client_cores_most": max((run["client_cores"] for run in every), default=0.0),
            "tuned": self.tuned,
            "failed": self.failed,
            "runs": self.runs,
            **self.others,
        }


def _machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return f"{CORES} CPUs ({cpu}), Python {sys.version.split()[0]}"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="race.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [one.name for one in CONTENDERS]
    parser.add_argument("--peers", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    parser.add_argument("--loads", nargs="+", type=float, default=LOADS, help="shares of the capacity")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duration-s", type=float, default=2.6, help="of each run")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--markdown", type=Path, help="write the tables, too")
    parser.add_argument("--quick", action="store_true", help="short, to see that it works; the figures say nothing")
    parser.add_argument("--tune", action="store_true", help="find the peers' settings and freeze them in tuned.json")
    parser.add_argument("--folder", type=Path, default=environments.FOLDER, help="of environments, models and logs")
    parser.add_argument("--from-json", type=Path, help="only print the tables of an earlier race")
    options = parser.parse_args()
    options.sections = set(options.sections)
    if options.quick:
        options.repeats, options.duration_s, options.loads = 1, 1.5, [0.6, 1.2]
    return options


def main() -> int:
    """Prepare, tune or race, and print."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if options.from_json:
        print(figures.markdown(json.loads(options.from_json.read_text())))
        return 0
    for venv in sorted({one.venv for one in CONTENDERS if options.peers is None or one.name in options.peers}):
        environments.make(options.folder, venv)
    make_models(options.folder / "models")
    if not options.quick:
        shutil.rmtree(options.folder / "cache", ignore_errors=True)  # sponge profiles the machine as it is now
    group.sweep()
    shutil.rmtree(options.folder / "scratch", ignore_errors=True)
    race = Race(options)
    race.measure_capacity()
    if options.tune:
        TUNED.write_text(json.dumps(tune.tune(race), indent=1) + "\n")
        return 0
    race.run()
    result = race.result()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    text = figures.markdown(result)
    if options.markdown:
        options.markdown.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
