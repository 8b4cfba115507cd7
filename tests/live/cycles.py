"""Starts and closes schedulers again and again, and prints as JSON what this process held after each: a script.

    python -m tests.live.cycles TIMES

Each cycle makes everything anew (session, scaler with its control group where one is allowed, scheduler), serves some
requests, one of which fails, and closes. In every fifth nobody closes the scheduler: it is dropped.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import warnings

import numpy as np

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.live.cgroup import CgroupScaler
from sponge.live.scalers import CpuScaler, ThreadScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models
from tests.live.cgroup_here import PROBE, groups_of

SOLVER = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=2, max_batch_size=4, max_lanes=2)


def cycle(model: bytes, cache: str, *, close: bool) -> None:
    """Make, use and end one scheduler with all its parts."""
    session = ElasticSession(model, max_threads=2, max_lanes=2, cache_dir=cache)
    scaler: CpuScaler = CgroupScaler() if PROBE.quota_allowed else ThreadScaler()
    scheduler = Scheduler(session, SOLVER, scaler, slo_s=60, name="cycle")
    scheduler.own(session, scaler)
    futures = [scheduler.submit({"i": np.array([i])}) for i in range(8)]
    bad = scheduler.submit({"i": np.array([999])})
    assert [future.result(60)[0].tolist() for future in futures] == [[10.0 * i] for i in range(8)]
    assert bad.exception(60) is not None
    if close:
        assert scheduler.close()
        return
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("cycle-")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del scheduler
    threads += [thread for thread in threading.enumerate() if thread.name == "cycle-end"]
    for thread in threads:
        thread.join(60)


def held() -> dict[str, float]:
    """Return what this process holds now."""
    with open("/proc/self/statm") as file:
        resident_pages = int(file.read().split()[1])
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "groups": len(groups_of(os.getpid())),
        "resident_mib": resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def main() -> None:
    """Run the cycles and print what was held before, and after each."""
    times = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as cache:
        seen = [held()]
        for i in range(times):
            cycle(models.lookup(), cache, close=i % 5 != 4)
            gc.collect()
            seen.append(held())
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
