"""What the scheduler adds to a bare ``session.run``.

Three numbers, each beside its peer in the same run, measured in alternating blocks so that a slow minute of the machine
falls on both:

* ``lone``: a single request at a time, from the call to its result, against ``session.run`` in the same thread and
  against handing it to a ``ThreadPoolExecutor``. Reach: at most 100 µs added at the median. *Paced*: with a pause of
  2 ms before each, after which caches are cold and the CPU has to wake up, for all three.
* ``saturated``: requests that always fill their batches, in rows per second, against a loop of ``session.run`` on a
  ready batch of the same size and threads. Reach: at least 97 %.
* ``requests``: requests per second through the scheduler with a model that does nothing. Reach: at least 20,000.

The allocation is enforced as ``--cpu-control`` says; the model's threads are the same on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sponge.commands.detector import detector_path, pages
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession

REACH_LONE_US = 100.0
REACH_SATURATED = 0.97
REACH_REQUESTS_RPS = 20_000.0
COST_PER_BATCH = LatencyModel(1e-7, 0.0, 0.0, 1e-4)
"""Makes the controller prefer full batches, whatever the model."""

Inputs = dict[str, np.ndarray[Any, Any]]


def trivial_model(folder: Path) -> Path:
    """An identity on four floats a row."""
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
    path = folder / "identity.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def bare_session(path: Path, threads: int) -> ort.InferenceSession:
    """The peer: one session with the same threads, spinning off as in the scheduler's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile."""
    return {
        "median": statistics.median(values),
        "p10": float(np.percentile(values, 10)),
        "p90": float(np.percentile(values, 90)),
    }


def times_us(call: Callable[[], object], count: int, gap_s: float) -> list[float]:
    """Durations of single calls with a pause between them [µs]."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e6)
        if gap_s:
            time.sleep(gap_s)
    return found


def lone(path: Path, example: Inputs, cpu_control: Any, blocks: int, count: int, gap_s: float) -> dict[str, Any]:
    """Latency of one request at a time; the added time is the difference of medians, block by block."""
    bare = bare_session(path, 1)
    solver = Solver(COST_PER_BATCH, max_cores=1, max_batch_size=16, max_lanes=1)
    with (
        ThreadPoolExecutor(1) as pool,
        best_scaler(cpu_control) as scaler,  # type: ignore[attr-defined]
        ElasticSession(path, max_threads=1) as session,
        Scheduler(session, solver, scaler) as scheduler,
    ):
        ways: dict[str, Callable[[], object]] = {
            "bare": lambda: bare.run(None, example),
            "executor": lambda: pool.submit(bare.run, None, example).result(),
            "scheduler": lambda: scheduler.submit(example, budget_s=60.0).result(),
        }
        medians: dict[str, list[float]] = {way: [] for way in ways}
        for call in ways.values():
            times_us(call, max(3, count // 10), gap_s)
        for _ in range(blocks):
            for way, call in ways.items():
                medians[way].append(statistics.median(times_us(call, count, gap_s)))
    added = [ours - peer for ours, peer in zip(medians["scheduler"], medians["bare"], strict=True)]
    return {
        "bare_us": spread(medians["bare"]),
        "executor_us": spread(medians["executor"]),
        "scheduler_us": spread(medians["scheduler"]),
        "added_us": spread(added),
        "reach_added_us": REACH_LONE_US,
        "met": statistics.median(added) <= REACH_LONE_US,
    }


def keep_busy(scheduler: Scheduler, example: Inputs, requests: int, in_flight: int) -> float:
    """Submit with a bounded number in flight; return requests per second."""
    room = threading.Semaphore(in_flight)
    failures: list[BaseException] = []

    def done(future: Any) -> None:
        error = future.exception()
        if error is not None:
            failures.append(error)
        room.release()

    started = time.perf_counter()
    for _ in range(requests):
        room.acquire()
        scheduler.submit(example, budget_s=600.0).add_done_callback(done)
    for _ in range(in_flight):
        room.acquire()
    elapsed = time.perf_counter() - started
    if failures:
        raise failures[0]
    return requests / elapsed


def saturated(
    path: Path, example: Inputs, cpu_control: Any, blocks: int, batch_size: int, threads: int, batches: int
) -> dict[str, Any]:
    """Rows per second with full batches, as a share of the bare session's."""
    bare = bare_session(path, threads)
    full = {name: np.repeat(array, batch_size, axis=0) for name, array in example.items()}
    solver = Solver(COST_PER_BATCH, max_cores=threads, min_cores=threads, max_batch_size=batch_size, max_lanes=1)
    rates: dict[str, list[float]] = {"bare": [], "scheduler": []}
    with (
        best_scaler(cpu_control) as scaler,  # type: ignore[attr-defined]
        ElasticSession(path, max_threads=threads) as session,
        Scheduler(session, solver, scaler) as scheduler,
    ):
        for block in range(blocks + 1):  # the first warms up
            started = time.perf_counter()
            for _ in range(batches):
                bare.run(None, full)
            bare_rate = batches * batch_size / (time.perf_counter() - started)
            our_rate = keep_busy(scheduler, example, batches * batch_size, 3 * batch_size)
            if block:
                rates["bare"].append(bare_rate)
                rates["scheduler"].append(our_rate)
        found = scheduler.statistics()
    share = [ours / peer for ours, peer in zip(rates["scheduler"], rates["bare"], strict=True)]
    return {
        "batch_size": batch_size,
        "threads": threads,
        "mean_batch_size": found.mean_batch_size,
        "bare_rows_per_s": spread(rates["bare"]),
        "scheduler_rows_per_s": spread(rates["scheduler"]),
        "share": spread(share),
        "reach_share": REACH_SATURATED,
        "met": statistics.median(share) >= REACH_SATURATED,
    }


def requests_per_s(path: Path, example: Inputs, cpu_control: Any, blocks: int, requests: int) -> dict[str, Any]:
    """Requests per second with a model that does nothing, against an executor running the bare session for each."""
    bare = bare_session(path, 1)
    solver = Solver(COST_PER_BATCH, max_cores=1, max_batch_size=64, max_lanes=1)
    ours: list[float] = []
    peer: list[float] = []
    with (
        ThreadPoolExecutor(1) as pool,
        best_scaler(cpu_control) as scaler,  # type: ignore[attr-defined]
        ElasticSession(path, max_threads=1) as session,
        Scheduler(session, solver, scaler) as scheduler,
    ):
        for block in range(blocks + 1):
            started = time.perf_counter()
            futures = [pool.submit(bare.run, None, example) for _ in range(requests // 4)]
            for future in futures:
                future.result()
            executor_rate = len(futures) / (time.perf_counter() - started)
            our_rate = keep_busy(scheduler, example, requests, 512)
            if block:
                peer.append(executor_rate)
                ours.append(our_rate)
        mean_batch_size = scheduler.statistics().mean_batch_size
    return {
        "executor_rps": spread(peer),
        "scheduler_rps": spread(ours),
        "mean_batch_size": mean_batch_size,
        "reach_rps": REACH_REQUESTS_RPS,
        "met": statistics.median(ours) >= REACH_REQUESTS_RPS,
    }


def main() -> int:
    """Run and print; exit 0 whatever was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-control", default="auto", choices=["auto", "quota", "affinity", "threads"])
    parser.add_argument("--blocks", type=int, default=7, help="alternating blocks of each measurement")
    parser.add_argument("--scale", type=float, default=1.0, help="of the work in each block; 0.02 for a smoke run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    scale = options.scale

    def count(full: int) -> int:
        return max(2, round(full * scale))

    small: Inputs = {"x": np.zeros((1, 4), dtype=np.float32)}
    page: Inputs = {"x": pages(1, np.random.default_rng(0))[0]}
    how, blocks = options.cpu_control, options.blocks
    with tempfile.TemporaryDirectory() as folder:
        trivial, real = trivial_model(Path(folder)), detector_path()
        results = {
            "lone_trivial": lone(trivial, small, how, blocks, count(2000), 0.0),
            "lone_trivial_paced": lone(trivial, small, how, blocks, count(500), 0.002),
            "lone_real": lone(real, page, how, blocks, count(40), 0.0),
            "saturated_trivial": saturated(trivial, small, how, blocks, 64, 1, count(400)),
            "saturated_real": saturated(real, page, how, blocks, 8, 1, count(12)),
            "requests": requests_per_s(trivial, small, how, blocks, count(40_000)),
        }
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
        return 0
    for name, result in results.items():
        print(f"{name}: {'reached' if result['met'] else 'missed'}")
        for key, value in result.items():
            if isinstance(value, dict):
                print(f"  {key:22} {value['median']:12,.2f}   ({value['p10']:,.2f} to {value['p90']:,.2f})")
            elif key != "met":
                print(f"  {key:22} {value:12,.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
