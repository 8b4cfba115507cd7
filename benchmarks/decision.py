"""What a decision costs as the queue and the machine grow.

Scenario
    The controller that serves, by itself: no threads, no model, a made-up clock. A queue is kept at its length by new
    arrivals with random deadlines, far enough off that all can be met; all cores are at work. Lengths of queue and
    numbers of cores take turns within each repeat, so that all see the same machine.
Constraint
    Every event is counted that a request brings about: its arrival, its share of the end of a batch and of the change
    of the allocation, the decision for the free lane, the wake-up times.
Final number
    Microseconds of ``handle`` and ``next_wakeup`` for each request served, and their ratio to the shortest queue at
    the same number of cores. It should grow with the logarithm of the queue at most, and not with the cores.
Out of scope
    The threads of the live shell (``overhead.py``), and the first decision for a queue of twice the length seen before,
    which lays out what to read (once; 1 to 10 ms at 10,000).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import count
from typing import Any

import numpy as np

from sponge.core.actions import SetCpu, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import Arrived, BatchFinished, CpuApplied, Event
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.core.values import Batch, Request

MODEL = LatencyModel(gamma_s=0.1404, epsilon_s=-0.0508, delta_s=0.0252, eta_s=0.0221)
"""Least-squares fit of the published p99 profile of YOLOv5s."""
MAX_BATCH_SIZE = 8
QUEUES = (10, 100, 1_000, 10_000)
CORES = (16, 64, 128)


class Loaded:
    """A controller with a queue of a certain length and all cores at work."""

    def __init__(self, queue: int, cores: int, resize_delay_s: float) -> None:
        solver = Solver(MODEL, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores)
        self.controller = Controller(solver, Settings(max_queue=10**6, resize_delay_s=resize_delay_s))
        self.queue = queue
        self._step_s = MODEL.latency_s(1, 1.0) / cores
        self._span_s = 2.0 * queue * self._step_s + 1.0
        self._rng = np.random.default_rng(0)
        self._ids = count()
        self._now = 0.0
        self._running: dict[int, Batch] = {}
        self._spent_s = 0.0
        if resize_delay_s:
            self._handle(CpuApplied(float(cores)))
        self._fill()

    def us_per_request(self, batches: int) -> float:
        """Let so many batches end, keep the queue at its length, and return the time for each request [us]."""
        self._spent_s, served = 0.0, 0
        for _ in range(batches):
            lane = next(iter(self._running))
            served += len(self._running.pop(lane).request_ids)
            self._now += self._step_s
            self._handle(BatchFinished(lane))
            self._fill()
        return 1e6 * self._spent_s / served

    def _fill(self) -> None:
        while self.controller.queue_length < self.queue or not self._running:
            deadline = self._now + 0.5 + self._rng.uniform(0.0, self._span_s)
            request = Request(request_id=next(self._ids), arrived_at=self._now, deadline=deadline)
            self._handle(Arrived(request))

    def _handle(self, event: Event) -> None:
        start = time.perf_counter()
        actions = self.controller.handle(event, now=self._now)
        self.controller.next_wakeup()
        self._spent_s += time.perf_counter() - start
        for action in actions:
            if isinstance(action, StartBatch):
                self._running[action.batch.lane] = action.batch
            elif isinstance(action, SetCpu):
                self._handle(CpuApplied(action.cores))


def measure(repeats: int, batches: int, resize_delay_s: float) -> list[dict[str, Any]]:
    """Return a row for each queue length and number of cores."""
    loaded = {(queue, cores): Loaded(queue, cores, resize_delay_s) for cores in CORES for queue in QUEUES}
    times: dict[tuple[int, int], list[float]] = {key: [] for key in loaded}
    for repeat in range(repeats + 1):
        for key, each in loaded.items():
            taken = each.us_per_request(batches)
            if repeat:  # the first lays out what to read
                times[key].append(taken)
        print(f"{repeat} of {repeats} repeats", file=sys.stderr, flush=True)
    rows = []
    for (queue, cores), taken in times.items():
        over = [a / b for a, b in zip(taken, times[QUEUES[0], cores], strict=True)]
        rows.append({"queue": queue, "cores": cores, "us": spread(taken), "over_shortest_queue": spread(over)})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Return median, p10 and p90."""
    low, high = np.percentile(values, [10, 90])
    return {"median": statistics.median(values), "p10": float(low), "p90": float(high)}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=300, help="that end in each repeat")
    parser.add_argument("--resize-delay", type=float, default=0.0, help="of a pod instead of a quota [s]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.repeats, options.batches, options.resize_delay)
    if options.json:
        json.dump({"benchmark": "decision", "resize_delay_s": options.resize_delay, "rows": rows}, sys.stdout, indent=1)
        print()
        return 0
    print(f"{'cores':>6}{'queue':>8}{'µs a request':>24}{'over the shortest queue':>28}")
    for row in rows:
        us, over = row["us"], row["over_shortest_queue"]
        said = f"{us['median']:.1f} ({us['p10']:.1f}-{us['p90']:.1f})"
        grown = f"{over['median']:.2f} ({over['p10']:.2f}-{over['p90']:.2f})"
        print(f"{row['cores']:6}{row['queue']:8}{said:>24}{grown:>28}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
