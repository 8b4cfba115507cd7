"""The long forms of what `tests.live.test_life_cycle` and `tests.live.test_poison` try briefly."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded, ModelError
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models
from tests.live.test_life_cycle import run_cycles

pytestmark = pytest.mark.stress

SETTLED = 300
"""Cycles after which the allocator has found its size."""
GROWTH_MIB = 2.0
"""What seven hundred more may add [MiB]: three kilobytes each."""


def test_a_thousand_starts_leave_nothing() -> None:
    """No thread, no descriptor, no control group, no memory."""
    held = run_cycles(1000)
    for what in ("threads", "descriptors", "groups"):
        assert held[-1][what] == held[1][what], what
    assert held[-1]["resident_mib"] - held[SETTLED]["resident_mib"] < GROWTH_MIB


def test_model_that_hangs_for_long() -> None:
    """A hundred and more requests come while one lane hangs: none waits for it, all hear in time or are served."""
    solver = Solver(LatencyModel(1e-5, 0.0, 0.0, 1e-4), max_cores=2, max_batch_size=1, max_lanes=2)
    with ElasticSession(models.loop(), max_threads=2, max_lanes=2) as session, Scheduler(session, solver) as scheduler:
        hanging = [scheduler.submit(turns(350_000), budget_s=600)]
        served = [scheduler.submit(turns(1), budget_s=60).result(60) for _ in range(100)]
        hanging.append(scheduler.submit(turns(350_000), budget_s=600))
        late = [scheduler.submit(turns(1), budget_s=0.5) for _ in range(100)]
        assert all(isinstance(future.exception(60), DeadlineExceeded) for future in late)
        assert not any(future.done() for future in hanging)
        assert len(served) == 100
        assert all(future.result(600) for future in hanging)
        assert scheduler.submit(turns(1), budget_s=60).result(60)


def test_poison_among_many_clients() -> None:
    """Sixteen clients, one request in ten poisonous: each gets its own answer or its own error."""
    solver = Solver(LatencyModel(1e-6, 0.0, 0.0, 1e-3), max_cores=2, max_batch_size=16, max_lanes=2)
    wrong: list[str] = []
    with (
        ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as session,
        Scheduler(session, solver) as scheduler,
    ):

        def client(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(250):
                asked = [999 if rng.random() < 0.1 else int(rng.integers(100)) for _ in range(8)]
                futures: list[Future[Any]] = [scheduler.submit({"i": np.array([i])}, budget_s=600) for i in asked]
                wait(futures)
                for i, future in zip(asked, futures, strict=True):
                    error = future.exception()
                    if isinstance(error, ModelError) if i == 999 else error is None and future.result()[0] == [10 * i]:
                        continue
                    wrong.append(f"client {seed}: {i} got {error or future.result()}")

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        statistics = scheduler.statistics()
    assert not wrong
    assert statistics.submitted == 16 * 250 * 8 == statistics.met + statistics.late + statistics.failed
    assert statistics.batches < statistics.submitted


def turns(number: int) -> dict[str, np.ndarray[Any, Any]]:
    """Input of the ``loop`` model; 350,000 turns take some ten seconds."""
    return {"x": np.zeros(1, dtype=np.float32), "rounds": np.array([number])}
