"""What it takes to change the size of a running model.

* ``change``: under load, a model's threads and CPU quota are changed at every fifth batch, growing and shrinking. Given
  are the change itself (from the decision until the quota is in force; the threads change with the next run and cost
  nothing), and the first batch at the new size, from the decision to its end, beside the batches that follow at that
  size. Reach: the change at most 1 ms at the 99th percentile, no request lost.
* ``contended``: the change by itself, while two threads compute in Python, beside the same two calls as Python makes
  them, which give the interpreter's lock away and then wait for it. Only with a quota. Reach: at most 1 ms at the 99th
  percentile.
* ``memory``: private memory for each further thread level, after loading (``loaded``) and after a run on each (``run``,
  which adds what the shared arena has grown by), beside that of plain sessions that share nothing. Reach: at most 2 MB
  after loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sponge.commands.detector import INPUT_NAME, detector_path, pages
from sponge.core.actions import Action, SetCpu, StartBatch
from sponge.core.events import Arrived, BatchFinished, CpuApplied, Event
from sponge.core.values import Batch, intra_op_threads
from sponge.live.cgroup import CgroupScaler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession

REACH_CHANGE_US = 1000.0
REACH_LEVEL_MB = 2.0
EVERY = 5
"""Batches between two changes."""


class Alternating:
    """A controller that changes the size of its one lane at every `EVERY`-th batch, whatever the load."""

    max_lanes = 1
    max_batch_size = 1
    max_queue = 1 << 30

    def __init__(self, sizes: tuple[float, ...]) -> None:
        self._sizes = sizes
        self._waiting: deque[int] = deque()
        self._running = False
        self._batches = 0
        self._cores = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing runs."""
        return not self._waiting and not self._running

    def next_wakeup(self) -> float | None:
        """Nothing is ever due."""
        return None

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Start the next request when the lane is free."""
        if isinstance(event, Arrived):
            self._waiting.append(event.request.request_id)
        elif isinstance(event, BatchFinished):
            self._running = False
        if self._running or not self._waiting:
            return []
        cores = self._sizes[self._batches // EVERY % len(self._sizes)]
        actions: list[Action] = [] if cores == self._cores else [SetCpu(cores)]
        self._cores = cores
        batch = Batch(
            batch_id=self._batches,
            request_ids=(self._waiting.popleft(),),
            rows=1,
            group=0,
            lane=0,
            cores=cores,
            threads=intra_op_threads(cores),
            expected_s=0.0,
        )
        self._batches += 1
        self._running = True
        return [*actions, StartBatch(batch)]


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 10th, 90th and 99th percentile, and how many there are."""
    found = np.percentile(values, [50, 10, 90, 99])
    return {"median": found[0], "p10": found[1], "p90": found[2], "p99": found[3], "count": len(values)}


def change(path: Path, cpu_control: Any, sizes: tuple[float, ...], requests: int) -> dict[str, Any]:
    """Keep the lane busy and change its size at every fifth batch."""
    log: list[tuple[float, Event, list[Action]]] = []
    page = {INPUT_NAME: pages(1, np.random.default_rng(0))[0]}
    with (
        best_scaler(cpu_control) as scaler,  # type: ignore[attr-defined]
        ElasticSession(path, max_threads=max(map(intra_op_threads, sizes))) as session,
    ):
        session.warm_up([1], shapes={INPUT_NAME: page[INPUT_NAME].shape})
        with Scheduler(
            session,
            controller=Alternating(sizes),
            scaler=scaler,
            recorder=lambda now, event, actions: log.append((now, event, actions)),
        ) as scheduler:
            room = threading.Semaphore(4)
            for _ in range(requests):
                room.acquire()
                scheduler.submit(page, budget_s=600.0).add_done_callback(lambda _: room.release())
        found = scheduler.statistics()
        how = scaler.how
    changes_us: list[float] = []
    batches: dict[str, list[float]] = {"growing": [], "shrinking": [], "steady_large": [], "steady_small": []}
    decided_at, asked_at, cores, started = 0.0, 0.0, 0.0, None
    for now, event, actions in log:
        if isinstance(event, CpuApplied):
            changes_us.append((now - asked_at) * 1e6)
        if isinstance(event, BatchFinished) and started is not None:
            batches[started].append((now - decided_at) * 1e3)
        for action in actions:
            if isinstance(action, SetCpu):
                asked_at = now
            elif isinstance(action, StartBatch):
                decided_at, before, cores = now, cores, action.batch.cores
                size = "large" if cores == max(sizes) else "small"
                started = f"steady_{size}" if cores == before else "growing" if cores > before else "shrinking"
    p99 = float(np.percentile(changes_us, 99))
    return {
        "cpu_control": how,
        "sizes_cores": list(sizes),
        "change_us": percentiles(changes_us),
        "first_batch_ms": {name: percentiles(values) for name, values in batches.items() if values},
        "submitted": found.submitted,
        "answered": found.met + found.late,
        "reach_change_us_p99": REACH_CHANGE_US,
        "met": p99 <= REACH_CHANGE_US and found.submitted == found.met + found.late == requests,
    }


def contended(changes: int) -> dict[str, Any]:
    """How long a change of the quota takes while others want the interpreter [µs]."""
    with CgroupScaler(check_every_s=60.0) as scaler:
        path = Path(scaler.directory) / ("cpu.max" if "v2" in scaler.how else "cpu.cfs_quota_us")
        period = " 10000" if "v2" in scaler.how else ""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        over = threading.Event()
        taken: dict[str, list[float]] = {"sponge_us": [], "plain_us": []}

        def plainly(cores: float) -> None:
            os.pwrite(descriptor, f"{round(cores * 10_000)}{period}".encode(), 0)
            os.pread(descriptor, 64, 0)

        def compute() -> None:
            while not over.is_set():
                sum(range(200))

        def timed(change: Callable[[float], object], cores: float) -> float:
            started = time.perf_counter()
            change(cores)
            return 1e6 * (time.perf_counter() - started)

        others = [threading.Thread(target=compute) for _ in range(2)]
        for other in others:
            other.start()
        for change in range(changes):
            for name, way in (("sponge_us", scaler.scale), ("plain_us", plainly)):
                scaler.scale(3.0)  # so that it finds what it wrote last
                time.sleep(0.002)
                taken[name].append(timed(way, 1.0 + change % 2))
                if name == "plain_us":
                    plainly(3.2)
        over.set()
        for other in others:
            other.join()
        os.close(descriptor)
    found = {name: percentiles(values) for name, values in taken.items()}
    p99_us = float(np.percentile(taken["sponge_us"], 99))
    return {**found, "sponge_us_p99": p99_us, "reach_us_p99": REACH_CHANGE_US, "met": p99_us <= REACH_CHANGE_US}


def private_mb() -> float:
    """Memory of this process that is not shared with a file [MB]."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        found = {line.split(":")[0]: line.split() for line in file if ":" in line}
    return int(found["Anonymous"][1]) / 1024


def measure_levels(path: str, shared: bool, levels: int, batch_size: int) -> dict[str, float]:
    """In this process: memory with that many thread levels, after loading and after a run on each [MB]."""
    example = {INPUT_NAME: np.repeat(pages(1, np.random.default_rng(0))[0], batch_size, axis=0)}
    before = private_mb()
    if shared:
        session = ElasticSession(path, max_threads=levels, widths=range(1, levels + 1))
        loaded = private_mb() - before
        for threads in session.widths:
            session.run(example, threads=threads)
    else:
        sessions = []
        for threads in range(1, levels + 1):
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        loaded = private_mb() - before
        for plain in sessions:
            plain.run(None, example)
    return {"loaded_mb": loaded, "run_mb": private_mb() - before}


def heavy_model(folder: Path) -> Path:
    """Convolutions with 64 MB of weights on the detector's input."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, last, depth = [], [], INPUT_NAME, 3
    for layer in range(8):
        kernel = rng.standard_normal((480, depth, 3, 3), dtype=np.float32) / np.float32(9 * depth) ** 0.5
        weights.append(numpy_helper.from_array(kernel, f"k{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"k{layer}"], [f"c{layer}"], strides=[2, 2], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last, depth = f"r{layer}", 480
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", 3, 320, 320])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 480, "height", "width"])],
        weights,
    )
    path = folder / "heavy.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def memory(path: Path, levels: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Memory for each further level: the difference between many levels and one, each in a process of its own."""

    def measured(name: str, count: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--measure", name, str(path), str(count), str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return dict(json.loads(done.stdout))

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "SPONGE_CACHE_DIR": cache}
        measured("sponge", 1)  # the first start also saves the optimised model
        for _ in range(repeats):
            for name in ("sponge", "plain"):
                one, many = measured(name, 1), measured(name, levels)
                for when in ("loaded_mb", "run_mb"):
                    found.setdefault(f"{name}_{when}", []).append((many[when] - one[when]) / (levels - 1))
    return {
        "levels": levels,
        "batch_size": batch_size,
        "per_further_level": {key: percentiles(values) for key, values in found.items()},
        "reach_mb": REACH_LEVEL_MB,
        "met": float(np.median(found["sponge_loaded_mb"])) <= REACH_LEVEL_MB,
    }


def main() -> int:
    """Run and print; exit 0 whatever was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-control", default="auto", choices=["auto", "quota", "affinity", "threads"])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--levels", type=int, default=8, help="thread levels whose memory is measured")
    parser.add_argument("--repeats", type=int, default=3, help="of the memory measurement")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, path, levels, batch_size = options.measure
        print(json.dumps(measure_levels(path, name == "sponge", int(levels), int(batch_size))))
        return 0
    cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "change": change(detector_path(), options.cpu_control, (1.0, float(min(cpus, 2))), options.requests),
            **(
                {}
                if options.cpu_control in ("affinity", "threads")
                else {"contended": contended(options.requests // 10)}
            ),
            "memory_detector": memory(detector_path(), options.levels, 1, options.repeats),
            "memory_heavy": memory(heavy_model(Path(folder)), options.levels, 1, options.repeats),
        }
        if options.cpu_control in ("auto", "quota"):
            results["contended"] = contended(options.requests // 10)
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
        return 0
    for name, result in results.items():
        print(f"{name}: {'reached' if result['met'] else 'missed'}")
        for key, value in result.items():
            if key in ("first_batch_ms", "per_further_level"):
                for which, of in value.items():
                    print(f"  {which:30} {of['median']:9.2f} ({of['p10']:.2f} to {of['p90']:.2f}), n={of['count']}")
            elif isinstance(value, dict):
                print(f"  {key:30} {', '.join(f'{k} {v:.1f}' for k, v in value.items())}")
            elif key != "met":
                print(f"  {key:30} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
