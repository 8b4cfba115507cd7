"""What looking at a scheduler costs: each way to observe it, beside nobody watching.

Scenario: a model that does nothing, on one lane, so that everything is overhead. Every way has a scheduler of its own
on the same session; blocks of all ways alternate, so that a slow minute of the machine falls on all. Ways: nobody; an
observer that does nothing; `record` (the report); `serve_status` (``sponge top``, with nobody asking); Prometheus, with
nobody scraping; OpenTelemetry without an SDK, and with the SDK's spans thrown away.

Final numbers: what each adds to the median of a lone request [µs], and requests/s with the queue kept full, as a share
of nobody's, block by block. Reach: at most 5 µs and at least 0.97 for all but OpenTelemetry, whose spans are made on a
thread that competes for the interpreter.

Out of scope: scraping, exporting, and the peers' own metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from overhead import COST_PER_BATCH, Inputs, keep_busy, spread, times_us, trivial_model
from prometheus_client import CollectorRegistry

from sponge.core.solver import Solver
from sponge.integrations import opentelemetry, prometheus
from sponge.live.observing import Observer
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession

REACH_ADDED_US = 5.0
REACH_SHARE = 0.97


def ways(folder: Path) -> dict[str, Callable[[Scheduler], object]]:
    """Each way to look at a scheduler."""
    thrown_away = TracerProvider()
    thrown_away.add_span_processor(SpanProcessor())
    return {
        "nobody": lambda scheduler: None,
        "observer that does nothing": lambda scheduler: scheduler.observe(Observer()),
        "record": lambda scheduler: scheduler.record(),
        "status": lambda scheduler: scheduler.serve_status(folder / "status"),
        "prometheus": lambda scheduler: prometheus.collect(scheduler, CollectorRegistry()),
        "opentelemetry, no SDK": lambda scheduler: opentelemetry.instrument(scheduler),
        "opentelemetry, SDK": lambda scheduler: opentelemetry.instrument(scheduler, tracer_provider=thrown_away),
    }


def measure(folder: Path, blocks: int, lone: int, requests: int) -> dict[str, Any]:
    """Measure all ways in turn, block by block."""
    example: Inputs = {"x": np.zeros((1, 4), dtype=np.float32)}
    solver = Solver(COST_PER_BATCH, max_cores=1, max_batch_size=64, max_lanes=1)
    alone_us: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with ElasticSession(trivial_model(folder), max_threads=1) as session:
        for block in range(blocks + 1):  # the first warms up
            for way, watch in ways(folder).items():
                with ExitStack() as stack:
                    scheduler = stack.enter_context(Scheduler(session, solver))
                    watch(scheduler)
                    call = lambda: scheduler.submit(example, budget_s=60.0).result()  # noqa: B023, E731 - used at once
                    times_us(call, max(3, lone // 10), 0.0)
                    median_us = statistics.median(times_us(call, lone, 0.0))
                    rate = keep_busy(scheduler, example, requests, 512)
                if block:
                    alone_us.setdefault(way, []).append(median_us)
                    rates.setdefault(way, []).append(rate)
    found = {}
    for way in alone_us:
        added = [with_it - without for with_it, without in zip(alone_us[way], alone_us["nobody"], strict=True)]
        share = [with_it / without for with_it, without in zip(rates[way], rates["nobody"], strict=True)]
        found[way] = {
            "lone_us": spread(alone_us[way]),
            "added_us": spread(added),
            "requests_per_s": spread(rates[way]),
            "share": spread(share),
            "met": statistics.median(added) <= REACH_ADDED_US and statistics.median(share) >= REACH_SHARE,
        }
    return found


def main() -> int:
    """Run and print; exit 0 whatever was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="alternating blocks of each way")
    parser.add_argument("--scale", type=float, default=1.0, help="of the work in each block; 0.02 for a smoke run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder), options.blocks, max(10, int(2000 * options.scale)), max(600, int(20_000 * options.scale))
        )
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return 0
    print(f"{'':28} {'lone request [µs]':>26} {'added [µs]':>24} {'requests/s':>28} {'share of nobody’s':>22}")
    for way, result in found.items():
        cells = [
            f"{value['median']:,.{digits}f} ({value['p10']:,.{digits}f}–{value['p90']:,.{digits}f})"
            for value, digits in ((result[name], d) for name, d in COLUMNS.items())
        ]
        print(f"{way:28} {cells[0]:>26} {cells[1]:>24} {cells[2]:>28} {cells[3]:>22}")
    return 0


COLUMNS = {"lone_us": 1, "added_us": 1, "requests_per_s": 0, "share": 2}

if __name__ == "__main__":
    sys.exit(main())
