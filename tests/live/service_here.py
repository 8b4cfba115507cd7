"""A real model served under a real quota, for the tests of what goes wrong with control groups.

The scripts of other processes import it too: what serves there is the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.live.cgroup import CgroupScaler
from sponge.live.scalers import CpuScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from sponge.live.statistics import Statistics
from tests.live import models

COLUMNS = 64


class Service:
    """A scheduler over a chain of matrix products, whose allocation stays at two cores once a batch has run.

    Parameters
    ----------
    cache_dir
        For the optimised model.
    scaler
        By default a new `CgroupScaler`, closed with the scheduler.
    offset_s
        Returns what is added to the clock [s].
    """

    def __init__(
        self, cache_dir: Any, scaler: CpuScaler | None = None, *, offset_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.session = ElasticSession(models.matmul_chain(2, COLUMNS), max_threads=2, max_lanes=1, cache_dir=cache_dir)
        self.scaler: Any = scaler or CgroupScaler()
        # Made up so that one batch takes both cores: wide and cheap, in one lane.
        solver = Solver(LatencyModel(0.1, 0.0, 0.0, 1e-3), max_cores=2, min_cores=2, max_batch_size=1, max_lanes=1)
        self.scheduler = Scheduler(
            self.session,
            solver,
            self.scaler,
            settings=Settings(linger_s=1e6),
            slo_s=60.0,
            clock=lambda: time.monotonic() + offset_s(),
        )
        self.scheduler.own(self.scaler, self.session)
        self.ones = np.ones((1, COLUMNS), np.float32)
        (self.expected,) = self.scheduler.submit({"x": self.ones}).result(60)

    @property
    def thread_ids(self) -> set[int]:
        """Native ids of the threads that run the model."""
        lanes = {one.native_id for one in threading.enumerate() if one.name.startswith("sponge-lane")}
        return {one for one in lanes if one is not None} | set(self.session.thread_ids())

    def serve(self, requests: int = 20) -> Statistics:
        """Serve requests, one after the other; each answer must be right."""
        for _ in range(requests):
            (answer,) = self.scheduler.submit({"x": self.ones}).result(60)
            assert np.array_equal(answer, self.expected)
        return self.scheduler.statistics()

    def serve_until(self, condition: Callable[[Statistics], bool], within_s: float = 60.0) -> Statistics:
        """Serve until the statistics are as wanted."""
        end = time.monotonic() + within_s
        statistics = self.serve(1)
        while not condition(statistics):
            assert time.monotonic() < end, statistics
            statistics = self.serve(1)
        return statistics

    def close(self) -> None:
        """Close everything; nothing may have failed."""
        statistics = self.scheduler.statistics()
        assert (statistics.failed, statistics.rejected) == (0, {}), statistics
        assert self.scheduler.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
