"""Simulate: requests per second of wall time, against the same loop in SimPy, and against queueing theory.

Scenario
    Poisson arrivals at 70 % of what one core serves with the static controller: first come first served in batches of
    one, and earliest deadline first in batches of up to 8. Then the adaptive controller (16 cores, 16 lanes, batch 8)
    on the latency of a YOLOv5s detector with 20 requests in the first fifth of every second. Then a million requests
    in a process of their own, for the memory.
Peer
    SimPy (if it is installed), driving the very same controller with the very same service times: one process for the
    arrivals, a timeout with a callback for each batch. It keeps no record but the ends, and knows no allocation; what
    it leaves out can only help it. Both must give the same ends, or the run fails.
Final number
    Requests per second of wall time, static controller, first come first served in batches of one; median over
    repeats, p10 and p90. Contenders take turns.
Theory
    Mean waits of M/D/1, M/M/1, M/M/3 and M/G/1 over independent runs, with the standard error of their mean.
Out of scope
    How well any policy does; that is for other programs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sponge
from sponge import Controller, LatencyModel, Service, Solver, simulate
from sponge.core.actions import StartBatch
from sponge.core.events import Arrived, BatchFinished, CpuApplied
from sponge.core.protocol import ControllerProtocol
from sponge.core.values import Request
from sponge.sim.baselines import StaticController
from sponge.workload import Workload

SEED = 20_240_917
REACH_RPS = 100_000.0
SERVICE_S = 0.01
SINGLE = LatencyModel(gamma_s=0.0, epsilon_s=0.0, delta_s=0.0, eta_s=SERVICE_S)
BATCHED = LatencyModel(gamma_s=0.0, epsilon_s=0.0, delta_s=SERVICE_S / 5, eta_s=5 * SERVICE_S)
DETECTOR = LatencyModel(gamma_s=0.1404, epsilon_s=-0.0508, delta_s=0.0252, eta_s=0.0221)
THEORY_RUNS = 16
THEORY_REQUESTS = 20_000
WARM_UP = 2_000


def poisson(rate_rps: float, requests: int, *seed: int) -> Workload:
    arrived = np.cumsum(np.random.default_rng([SEED, *seed]).exponential(1 / rate_rps, requests))
    return Workload(sent_at_s=arrived, arrived_at_s=arrived, deadline_s=arrived + 1.0)


def bursts(seconds: int) -> Workload:
    rng = np.random.default_rng(SEED)
    sent = np.sort(np.concatenate([second + rng.uniform(0, 0.2, 20) for second in range(seconds)]))
    return Workload(sent_at_s=sent, arrived_at_s=sent + 0.2, deadline_s=sent + 1.0)


def fifo(requests: int) -> StaticController:
    return StaticController(1.0, order="fifo", max_batch_size=1, max_queue=requests)


def edf(requests: int) -> StaticController:
    return StaticController(1.0, order="edf", max_batch_size=8, max_queue=requests)


def adaptive(_: int) -> Controller:
    return Controller(Solver(DETECTOR, max_cores=16, max_batch_size=8, max_lanes=16))


def by_simpy(workload: Workload, controller: ControllerProtocol, latency: LatencyModel) -> list[float]:
    """The same loop as processes and timeouts; for controllers that never ask to be woken."""
    import simpy

    env = simpy.Environment()
    ends = [math.nan] * len(workload)
    latencies: dict[tuple[int, float], float] = {}

    def handle(event: Any) -> None:
        for action in controller.handle(event, now=env.now):
            if isinstance(action, StartBatch):
                batch = action.batch
                key = (batch.rows, batch.cores)
                if key not in latencies:
                    latencies[key] = latency.latency_s(*key)
                timeout = env.timeout(latencies[key], (batch, env.now))
                timeout.callbacks.append(finish)
            else:
                handle(CpuApplied(action.cores))

    def finish(timeout: Any) -> None:
        batch, started_at = timeout.value
        for request_id in batch.request_ids:
            ends[request_id] = env.now
        handle(BatchFinished(batch.lane, True, env.now - started_at))

    def source() -> Any:
        pairs = zip(workload.arrived_at_s.tolist(), workload.deadline_s.tolist(), strict=True)
        for request_id, (arrived_at, deadline) in enumerate(pairs):
            yield env.timeout(arrived_at - env.now)
            handle(Arrived(Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline)))

    env.process(source())
    env.run()
    return ends


def controller_alone(log: Sequence[tuple[float, Any, Any]], controller: ControllerProtocol) -> None:
    for now, event, _ in log:
        controller.handle(event, now=now)
        controller.next_wakeup()


def timed_s(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    p10, p90 = np.percentile(values, [10, 90])
    return {"median": float(statistics.median(values)), "p10": float(p10), "p90": float(p90)}


def speed(requests: int, repeats: int) -> dict[str, Any]:
    """Time the contenders in turn on the same requests."""
    single, batched = poisson(0.7 / SERVICE_S, requests), poisson(0.7 * 8 / BATCHED.latency_s(8, 1.0), requests)
    burst = bursts(max(1, requests // 200))
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "static, FIFO, batch 1": (requests, lambda: simulate(single, fifo(requests), SINGLE)),
        "static, EDF, batch 8": (requests, lambda: simulate(batched, edf(requests), BATCHED)),
        "adaptive, 16 lanes": (len(burst), lambda: simulate(burst, adaptive(0), DETECTOR)),
    }
    recorded = simulate(single, fifo(requests), SINGLE, record=True)
    assert recorded.log is not None
    log = recorded.log
    calls["the controller alone, FIFO, batch 1"] = (requests, lambda: controller_alone(log, fifo(requests)))
    try:
        import simpy
    except ImportError:
        peer = None
    else:
        peer = simpy.__version__
        ends = np.array(by_simpy(single, fifo(requests), SINGLE))
        # SimPy waits for differences of instants, so its clock is off by rounding.
        if not np.allclose(ends, recorded.finished_at_s, rtol=0, atol=1e-6):
            raise AssertionError("SimPy and sponge disagree about the ends")
        calls["SimPy, FIFO, batch 1"] = (requests, lambda: by_simpy(single, fifo(requests), SINGLE))
    gc.freeze()  # the log, else the collector would look through it again and again on everybody's time
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (_, call) in calls.items():
            times_s[name].append(timed_s(call))
    result: dict[str, Any] = {
        "requests": requests,
        "repeats": repeats,
        "rps": {name: spread([calls[name][0] / t for t in times]) for name, times in times_s.items()},
    }
    if peer is not None:
        ours, theirs, alone = (
            np.array(times_s[name])
            for name in ("static, FIFO, batch 1", "SimPy, FIFO, batch 1", "the controller alone, FIFO, batch 1")
        )
        result["simpy"] = peer
        result["simpy_over_ours"] = spread((theirs / ours).tolist())
        result["own_us_per_request"] = {
            "ours": spread(((ours - alone) / requests * 1e6).tolist()),
            "simpy": spread(((theirs - alone) / requests * 1e6).tolist()),
        }
    return result


def million(requests: int) -> dict[str, float]:
    """Simulate in a process of its own, and see how far its memory rises over that of the workload."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_million, (requests,))


def _million(requests: int) -> dict[str, float]:
    workload = poisson(0.7 / SERVICE_S, requests)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed_s(lambda: simulate(workload, fifo(requests), SINGLE))
    risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"requests": requests, "rps": requests / seconds, "bytes_per_request": risen / requests}


def theory() -> list[dict[str, Any]]:
    """Mean waits over independent runs beside the formulas."""
    erlang = 2.1**3 / 6 / 0.3 / (1 + 2.1 + 2.1**2 / 2 + 2.1**3 / 6 / 0.3)
    exponential = Service(SINGLE, noise="gamma", noise_cv=1.0)
    rows = []
    for number, (name, service, lanes, expected_s) in enumerate(
        (
            ("M/D/1, ρ = 0.7", Service(SINGLE), 1, 0.7 / 0.3 / 2 * SERVICE_S),
            ("M/M/1, ρ = 0.7", exponential, 1, 0.7 / 0.3 * SERVICE_S),
            ("M/G/1, ρ = 0.7, cv 0.5", Service(SINGLE, noise_cv=0.5), 1, 0.7 / 0.3 * 1.25 / 2 * SERVICE_S),
            ("M/M/3, ρ = 0.7", exponential, 3, erlang * SERVICE_S / 0.9),
        )
    ):
        waits = []
        for seed in range(THEORY_RUNS):
            workload = poisson(0.7 * lanes / SERVICE_S, THEORY_REQUESTS, number, seed)
            controller = StaticController(
                float(lanes), order="fifo", max_batch_size=1, lanes=lanes, max_queue=THEORY_REQUESTS
            )
            waits.append(float(simulate(workload, controller, service, seed=seed).queue_delay_s[WARM_UP:].mean()))
        rows.append(
            {
                "name": name,
                "theory_ms": expected_s * 1e3,
                "simulated_ms": statistics.mean(waits) * 1e3,
                "standard_error_ms": statistics.stdev(waits) / math.sqrt(THEORY_RUNS) * 1e3,
            }
        )
    return rows


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (default 7)")
    parser.add_argument("--requests", type=int, default=100_000, help="of each run (default 100,000)")
    parser.add_argument("--most", type=int, default=1_000_000, help="of the run for the memory (default 1,000,000)")
    options = parser.parse_args(arguments)
    measured = speed(options.requests, options.repeats)
    result = {
        "benchmark": "simulator",
        "machine": {"cpu": cpu_model(), "python": platform.python_version(), "numpy": np.__version__},
        "sponge": sponge.__version__,
        **measured,
        "million": million(options.most),
        "theory": theory(),
        "reach_rps": REACH_RPS,
        "reached": measured["rps"]["static, FIFO, batch 1"]["median"] >= REACH_RPS,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        report(result)
    return 0


def report(result: dict[str, Any]) -> None:
    print(f"requests per second of wall time, {result['requests']:,} requests, {result['repeats']} repeats")
    for name, values in result["rps"].items():
        print(f"  {name:40}{values['median']:12,.0f}   p10 {values['p10']:,.0f}, p90 {values['p90']:,.0f}")
    if "simpy" in result:
        ratio = result["simpy_over_ours"]
        own = result["own_us_per_request"]
        print(f"  SimPy {result['simpy']} takes {ratio['median']:.2f} × as long", end="")
        print(f" (p10 {ratio['p10']:.2f}, p90 {ratio['p90']:.2f});", end=" ")
        print(f"without the controller {own['simpy']['median']:.1f} against {own['ours']['median']:.1f} µs a request")
    else:
        print("  SimPy is not installed: no peer")
    most = result["million"]
    print(f"  {most['requests']:,} requests: {most['rps']:,.0f}/s, {most['bytes_per_request']:.0f} bytes a request")
    print(f"reach: {result['reach_rps']:,.0f}/s: {'reached' if result['reached'] else 'MISSED'}")
    print(f"mean wait [ms] over {THEORY_RUNS} runs of {THEORY_REQUESTS:,} requests")
    for row in result["theory"]:
        error = row["simulated_ms"] / row["theory_ms"] - 1
        print(f"  {row['name']:30}{row['theory_ms']:8.3f} in theory, {row['simulated_ms']:8.3f}", end=" ")
        print(f"± {row['standard_error_ms']:.3f} simulated ({error:+.1%})")


if __name__ == "__main__":
    sys.exit(main())
