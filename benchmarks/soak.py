"""Ten minutes of everything: trace-driven load with random faults, and is anything lost, wrong or growing?

Scenario: requests from phones on a generated 4G-like network (``--trace FILE``: on a log) at 0.4 of what the machine
can serve, in calm and busy spells; each brings the budget that the network has left it. Every few seconds one of the
faults of ``faults.py`` strikes, in random order: inputs that make the model raise, malformed ones, cancels, clients
that never read, a slower model, a burst, a neighbour, a thread that hogs the interpreter, the process stopped for a
second, and, where a quota is allowed, the quota cut or lifted and the control group removed by somebody else. Besides,
some of the requests are not numbers all the time.

Constraint: every request has exactly one outcome; every answer is that of its own request; the model's failures are
those of the requests that make it raise; `Statistics` accounts for all.

Final number: PASS or FAIL on these, and on flatness after the first quarter: resident memory (slope and growth, against
``--most-mb-per-min`` and ``--most-mb``), file descriptors and threads (the same at the end of each minute, while no
fault is under way). The control group must be gone at the end. Exit 1 on FAIL.

Left out: hours and days; faults that come together (one ends before the next begins).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnxruntime as ort
from faults import BROKEN_SHARE, FAULTS, MALFORMED_SHARE, Target, malformed_inputs, poisoned_inputs
from load_models import Inputs, broken_inputs, work, work_answer, work_inputs
from openloop import CANCELLED, FAILED, PENDING, UNREAD, UNSENT, OpenLoop, Schedule, Sent, resident_mb, say

from sponge.commands.demo import DemoSettings, make_workload
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import ModelError
from sponge.live.profiler import Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.workload import load_bandwidth

LOAD = 0.4
FAULT_S = (0.5, 4.0)
"""Lengths of faults, uniform [s]."""
CALM_S = (1.0, 6.0)
"""And of the time between two."""
SETTLED_S = 1.0
"""Requests that came within this time before a report are reported in the next one."""
MAX_BATCH_SIZE = 8
SLO_S = 0.8
POISONED = 17
"""Every so manieth request's numbers are not numbers."""


class Clients:
    """Hands in the requests, hit by the faults of the moment, and holds every answer to its request."""

    def __init__(self, scheduler: Scheduler, scaler: Any, seed: int) -> None:
        self.target = Target(scheduler, scaler, self._extra)
        self.refused = self.unrefused = self.unread = self.extras = 0
        self.wrong: list[str] = []
        self.extra_told: Counter[str] = Counter()
        self.broken_failed = 0
        self._scheduler = scheduler
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def inputs(self, k: int) -> Inputs:
        """The k-th request of the load."""
        target = self.target
        with self._lock:
            chance = self._rng.random()
        if target.broken and chance < BROKEN_SHARE:
            return broken_inputs(target.turns())
        if target.malformed and chance < MALFORMED_SHARE:
            return malformed_inputs(k)
        return (poisoned_inputs if k % POISONED == 0 else work_inputs)(k, target.turns())

    def submit(self, inputs: Inputs, deadline: float) -> Future[Any] | None:
        """Hand in one request; None if nobody reads what comes."""
        try:
            future = self._scheduler.submit(inputs, deadline=deadline)
        except (ValueError, TypeError):
            with self._lock:
                self.refused += 1
            return None
        if self.target.unread:
            with self._lock:
                self.unread += 1
            return None
        if self.target.cancelled:
            self.target.in_flight.append(future)
        future.add_done_callback(lambda done: self._check(inputs, done))
        return future

    def _extra(self, inputs: Inputs) -> None:
        self.extras += 1
        future = self._scheduler.submit(inputs, budget_s=SLO_S / 2)
        future.add_done_callback(lambda done: self._check(inputs, done, self.extra_told))

    def _check(self, inputs: Inputs, future: Future[Any], told: Counter[str] | None = None) -> None:
        error = None if future.cancelled() else future.exception()
        k = int(inputs["k"][0])
        broken = k >= 1000
        with self._lock:
            if told is not None:
                told["cancelled" if future.cancelled() else type(error).__name__] += 1
            if isinstance(error, ModelError):
                self.broken_failed += broken
                if not broken:
                    self.wrong.append(f"request {k} was told that the model failed on it: {error}")
            elif error is None and not future.cancelled():
                features, answer = future.result()
                if broken or answer.tolist() != [work_answer(k)]:
                    self.wrong.append(f"request {k} was answered {answer.tolist()}")
                if np.isnan(inputs["image"]).any() != np.isnan(features).any():
                    self.wrong.append(f"request {k} has the numbers of another one")


@attrs.define
class Chaos:
    """One fault after the other, until told to end."""

    target: Target
    names: list[str]
    rng: np.random.Generator
    done: Counter[str] = attrs.field(factory=Counter)
    struck: list[tuple[float, float, str]] = attrs.field(factory=list)
    """Start, end [s on the monotonic clock], name."""
    active: bool = False
    errors: list[str] = attrs.field(factory=list)
    _end: threading.Event = attrs.field(factory=threading.Event)

    def run(self) -> None:
        """Strike; the thread's work. Every fault has its turn before any has its second."""
        waiting: list[str] = []
        while not self._end.wait(self.rng.uniform(*CALM_S)):
            waiting = waiting or list(self.rng.permutation(self.names))
            name = waiting.pop()
            started = time.monotonic()
            self.active = True
            try:
                possible = FAULTS[name](self.target, self.rng.uniform(*FAULT_S))
            except Exception as error:  # what the faults do must not end the soak silently
                self.errors.append(f"{name}: {error!r}")
                possible = False
            self.active = False
            if possible:
                self.done[name] += 1
                self.struck.append((started, time.monotonic(), name))

    def end(self) -> None:
        """Strike no more."""
        self._end.set()


def counts_now() -> dict[str, float]:
    """What must not grow."""
    return {
        "memory_mb": resident_mb(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def report(
    sent: Sent, chaos: Chaos, scheduler: Scheduler, zero: float, first_s: float, last_s: float
) -> dict[str, Any]:
    """What one minute came to."""
    arrives_s = sent.schedule.arrives_s
    here = (arrives_s >= first_s) & (arrives_s < last_s) & ~np.isin(sent.fate, [UNREAD, UNSENT, CANCELLED, PENDING])
    response_ms = 1000 * sent.response_s[here]
    response_ms = response_ms[np.isfinite(response_ms)]
    struck = Counter(name for start, _, name in chaos.struck if first_s <= start - zero < last_s)
    statistics = scheduler.statistics()
    return {
        "minute_s": [first_s, last_s],
        **counts_now(),
        "requests": int(np.count_nonzero(here)),
        "missed_pct": 100 * float(np.mean(~sent.met[here])) if here.any() else 0.0,
        "response_ms_p99": float(np.percentile(response_ms, 99)) if len(response_ms) else None,
        "cpu_control_errors": statistics.cpu_control_errors,
        "faults": dict(struck),
    }


def show_line(line: dict[str, Any]) -> None:
    """Print one minute."""
    faults = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in line["faults"].items())
    print(
        f"{line['minute_s'][1]:6.0f} s  {line['memory_mb']:7.1f} MB  {line['descriptors']:3} fds  {line['threads']:3} "
        f"threads  {line['requests']:6} requests  {line['missed_pct']:6.2f} % missed  "
        f"p99 {line['response_ms_p99'] or 0:6.0f} ms  {line['cpu_control_errors']:3} quota faults  {faults}",
        flush=True,
    )


def soak(clients: Clients, schedule: Schedule, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run all of it."""
    chaos = Chaos(clients.target, names, np.random.default_rng([options.seed, 1]))
    striking = threading.Thread(target=chaos.run, name="chaos", daemon=True)
    loop = OpenLoop(schedule, clients.inputs, clients.submit)
    striking.start()
    memory: list[tuple[float, float]] = []
    minutes: list[dict[str, Any]] = []
    reported_s = 0.0
    scheduler = clients.target.scheduler
    while loop.sending:
        time.sleep(0.5)
        now_s = time.monotonic() - loop.zero
        memory.append((now_s, resident_mb()))
        # A report waits for a moment at rest: a fault's own threads and descriptors are not the service's.
        if now_s >= reported_s + options.report_s + SETTLED_S and not chaos.active:
            line = report(loop.so_far(), chaos, scheduler, loop.zero, reported_s, now_s - SETTLED_S)
            minutes.append(line)
            show_line(line)
            reported_s = now_s - SETTLED_S
    chaos.end()
    striking.join()
    sent = loop.wait(patience_s=10.0)
    scheduler.close()
    return {
        "minutes": minutes,
        "memory_mb": memory,
        "faults": dict(chaos.done),
        "struck_s": [(start - loop.zero, end - loop.zero, name) for start, end, name in chaos.struck],
        "checks": {**accounted(sent, clients, scheduler), **flat(memory, minutes, options), **intact(clients, chaos)},
    }


def accounted(sent: Sent, clients: Clients, scheduler: Scheduler) -> dict[str, tuple[bool, str]]:
    """Whether every request had exactly one outcome."""
    read = ~np.isin(sent.fate, [UNSENT, UNREAD])
    once = int(np.count_nonzero(sent.times_told[read] == 1))
    statistics = scheduler.statistics()
    ended = statistics.met + statistics.late + statistics.failed + statistics.cancelled
    ended += sum(statistics.rejected.values())
    handed_in = int(np.count_nonzero(read)) + clients.unread + clients.extras
    extras = sum(clients.extra_told.values())
    return {
        "each request told once": (
            once == np.count_nonzero(read) and extras == clients.extras,
            f"{once + extras:,} of {int(np.count_nonzero(read)) + clients.extras:,} that were read",
        ),
        "statistics account for all": (
            statistics.submitted == ended == handed_in and not statistics.waiting and not statistics.running,
            f"{ended:,} ended of {statistics.submitted:,} submitted, {handed_in:,} handed in",
        ),
        "failures are of the broken": (
            sent.count(FAILED) == clients.broken_failed,
            f"{sent.count(FAILED)} failed, {clients.broken_failed} of them broken",
        ),
    }


def intact(clients: Clients, chaos: Chaos) -> dict[str, tuple[bool, str]]:
    """Whether every answer was right, and everything could be done and was cleaned up."""
    directory = getattr(clients.target.scaler, "directory", None)
    clients.target.scaler.close()
    left = directory is not None and os.path.exists(directory)
    return {
        "answers of their own requests": (not clients.wrong, "; ".join(clients.wrong[:3]) or "all"),
        "faults did what they should": (not chaos.errors, "; ".join(chaos.errors[:3]) or f"{sum(chaos.done.values())}"),
        "control group gone": (not left, directory if left else "nothing left"),
    }


def flat(
    memory: list[tuple[float, float]], minutes: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, tuple[bool, str]]:
    """Whether nothing grows after the first quarter."""
    times_s, megabytes = np.array(memory).T
    later = times_s >= options.duration_s / 4
    slope = 60 * float(np.polyfit(times_s[later], megabytes[later], 1)[0])
    edge = max(1, np.count_nonzero(later) // 10)
    growth = float(np.median(megabytes[later][-edge:]) - np.median(megabytes[later][:edge]))
    found = {
        "memory": (
            slope <= options.most_mb_per_min and growth <= options.most_mb,
            f"{slope:+.2f} MB a minute, {growth:+.2f} MB in all",
        )
    }
    for name in ("descriptors", "threads"):
        seen = sorted({line[name] for line in minutes})
        found[name] = (len(seen) <= 1, ", ".join(map(str, seen)))
    return found


def draw(path: str, results: dict[str, Any]) -> None:
    """Memory, misses and faults over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    memory, misses, faults = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1, 1.6]})
    memory.plot(*np.array(results["memory_mb"]).T, lw=1)
    memory.set(ylabel="resident memory [MB]", ylim=(0, None))
    for line in results["minutes"]:
        first_s, last_s = line["minute_s"]
        misses.bar((first_s + last_s) / 2, line["missed_pct"], width=0.9 * (last_s - first_s), color="C3", alpha=0.8)
    misses.set_ylabel("missed [%]")
    names = list(FAULTS)
    for start_s, end_s, name in results["struck_s"]:
        faults.barh(names.index(name), end_s - start_s, left=start_s, color="C1")
    faults.set_yticks(range(len(names)), names, fontsize="small")
    faults.set_xlabel("time [s]")
    for axes in (memory, misses, faults):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run and print; exit 1 if anything was lost, wrong or growing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration-s", type=float, default=600.0)
    parser.add_argument("--report-s", type=float, default=60.0, help="between two lines")
    parser.add_argument("--trace", type=Path, help="bandwidth log; by default a generated network")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME")
    parser.add_argument("--load", type=float, default=LOAD, help="share of what the machine can serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile-s", type=float, default=15.0)
    parser.add_argument("--most-mb-per-min", type=float, default=1.0)
    parser.add_argument("--most-mb", type=float, default=8.0)
    parser.add_argument("--cpu-control", default="auto", choices=["auto", "quota", "affinity", "threads"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", help="picture to draw")
    options = parser.parse_args()
    ort.set_default_logger_severity(4)  # it would tell of every input that makes the model raise
    with tempfile.TemporaryDirectory() as folder:
        results = prepare_and_soak(Path(folder), options)
    passed = all(good for good, _ in results["checks"].values())
    if options.out:
        draw(options.out, results)
    if options.json:
        json.dump(results | {"passed": passed}, sys.stdout)
        print()
    else:
        for name, (good, what) in results["checks"].items():
            print(f"{'pass' if good else 'FAIL'}  {name}: {what}")
        print("faults:", ", ".join(f"{name} ×{count}" for name, count in results["faults"].items()))
        print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def prepare_and_soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Profile the model, make the requests, run."""
    cores = min(available_cpus(), 4)
    model = work(folder)
    with ElasticSession(model.path, max_threads=cores, max_lanes=cores) as session:
        profile = Profiler(
            session, batch_sizes=(1, 2, 4, MAX_BATCH_SIZE), inputs=model.inputs[0], budget_s=options.profile_s
        ).run()
        latency = LatencyModel.fit(profile, 99)
        rate_rps = options.load * cores * LatencyModel.fit(profile, 50).throughput_rps(1, 1.0, cores)
        trace = None if options.trace is None else load_bandwidth(options.trace)
        settings = DemoSettings(duration_s=options.duration_s, slo_s=SLO_S, arrivals="markov", seed=options.seed)
        workload = make_workload(settings, trace, rate_rps)
        schedule = Schedule(arrives_s=workload.arrived_at_s, deadline_s=workload.deadline_s)
        say(f"{len(workload):,} requests in {options.duration_s:g} s, {rate_rps:.1f} a second")
        session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=model.shapes)
        solver = Solver(latency, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores)
        scaler = best_scaler(options.cpu_control)
        with Scheduler(session, solver, scaler) as scheduler:
            return soak(Clients(scheduler, scaler, options.seed), schedule, options.faults, options)


if __name__ == "__main__":
    sys.exit(main())
