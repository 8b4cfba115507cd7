"""Very many requests from threads and asyncio at once, cancelled, refused and failed at random: none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.core.actions import Action, StartBatch
from sponge.core.controller import Controller
from sponge.core.events import Arrived, Cancelled, Event
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded, ModelError, QueueFull, SchedulerClosed
from sponge.live.scalers import ThreadScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

COST_PER_BATCH = LatencyModel(1e-6, 0.0, 0.0, 1e-3)
THREADS, COROUTINES = 16, 64
GOOD_ROWS = 100


class Fickle(ThreadScaler):
    """Gives what was asked for, or half, or raises; at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def scale(self, cores: float) -> float:
        fate = self._rng.random()
        if fate < 0.02:
            raise OSError("the quota is gone")
        return super().scale(cores) * (0.5 if fate < 0.2 else 1.0)


class Clients:
    """Counts what became of each request, exactly once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.accepted = 0
        self.lock = threading.Lock()

    def request(self, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], float, bool]:
        """Indices (one of three shapes; one in a hundred poisonous), budget, and whether it will be cancelled."""
        rows = rng.integers(0, GOOD_ROWS, size=(1, int(rng.integers(1, 4))))
        if rng.random() < 0.01:
            rows[0, 0] = 10_000
        budget_s = float(rng.choice([30.0, 0.5, 0.02, 0.003, -1.0], p=[0.5, 0.2, 0.1, 0.1, 0.1]))
        return rows, budget_s, rng.random() < 0.05

    def submit(self, rows: np.ndarray[Any, Any], budget_s: float, done: Any) -> Future[Any]:
        future = self.scheduler.submit({"i": rows}, budget_s=budget_s)
        with self.lock:
            self.accepted += 1
        future.add_done_callback(lambda future: self.ended(future, rows))
        future.add_done_callback(done)
        return future

    def ended(self, future: Future[Any], rows: np.ndarray[Any, Any]) -> None:
        try:
            answer = future.result()
            how = "answered"
            if not np.array_equal(answer[0], rows * 10.0):
                self.wrong.append(f"{rows} gave {answer}")
        except (CancelledError, DeadlineExceeded, QueueFull, SchedulerClosed, ModelError) as error:
            how = type(error).__name__
            if isinstance(error, ModelError) and rows[0, 0] < GOOD_ROWS:
                self.wrong.append(f"{rows} failed for another one's fault: {error}")
        with self.lock:
            self.outcomes[how] += 1

    def thread(self, seed: int, count: int) -> None:
        """Submit with up to 64 in flight; some by a callback."""
        rng = np.random.default_rng(seed)
        room = threading.Semaphore(64)
        for _ in range(count):
            rows, budget_s, cancels = self.request(rng)
            room.acquire()
            try:
                future = self.submit(rows, budget_s, lambda _: room.release())
            except SchedulerClosed:
                return
            if cancels:
                future.cancel()

    async def coroutine(self, seed: int, count: int) -> None:
        """One request at a time; some are given up while they are awaited."""
        rng = np.random.default_rng(seed)
        for _ in range(count):
            rows, budget_s, cancels = self.request(rng)
            try:
                future = self.submit(rows, budget_s, lambda _: None)
            except SchedulerClosed:
                return
            waiting = asyncio.wrap_future(future)
            if cancels:
                waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def in_deadline_order(log: list[tuple[Event, list[Action]]]) -> int:
    """Check every batch of a recorded run against all that waited then in its group; return how many were checked."""
    waiting: dict[int, dict[int, tuple[float, int]]] = {}
    group_of: dict[int, int] = {}
    checked = 0
    for event, actions in log:
        if isinstance(event, Arrived):
            request = event.request
            group_of[request.request_id] = request.group
            waiting.setdefault(request.group, {})[request.request_id] = (request.deadline, request.request_id)
        elif isinstance(event, Cancelled) and event.request_id in group_of:
            waiting[group_of[event.request_id]].pop(event.request_id, None)
        for action in actions:
            if isinstance(action, StartBatch):
                queue = waiting[action.batch.group]
                last = max(queue.pop(request_id) for request_id in action.batch.request_ids)
                if queue:
                    assert last < min(queue.values()), f"{action.batch} overtook"
                checked += 1
            elif hasattr(action, "reason") and group_of[action.request_id] in waiting:
                waiting[group_of[action.request_id]].pop(action.request_id, None)
    return checked


def run(requests: int, folder: Path, *, close: bool | None, replay: bool) -> None:
    """Serve so many requests; *close*: drain (True) or abort (False) in the middle instead of at the end."""
    plan = Solver(COST_PER_BATCH, max_cores=2, max_batch_size=16, max_lanes=2)
    log: list[tuple[float, Event, list[Action]]] = []
    recorder = (lambda now, event, actions: log.append((now, event, list(actions)))) if replay else None
    with (
        ElasticSession(models.gather(GOOD_ROWS), max_threads=2, max_lanes=2, cache_dir=folder) as session,
        Scheduler(session, plan, Fickle(0), recorder=recorder) as scheduler,
    ):
        clients = Clients(scheduler)
        each, per_coroutine = requests * 3 // 4 // THREADS, requests // 4 // COROUTINES
        threads = [threading.Thread(target=clients.thread, args=(seed, each)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()

        async def coroutines() -> None:
            await asyncio.gather(*(clients.coroutine(100 + seed, per_coroutine) for seed in range(COROUTINES)))

        loop = threading.Thread(target=asyncio.run, args=(coroutines(),))
        loop.start()
        if close is not None:
            while clients.accepted < requests // 2:
                threads[0].join(0.001)
            assert scheduler.close(drain=close)
        for thread in (*threads, loop):
            thread.join()
        assert scheduler.close()
        found = scheduler.statistics()
    assert not clients.wrong, clients.wrong[:3]
    assert sum(clients.outcomes.values()) == clients.accepted, "lost, or answered twice"
    assert found.submitted == clients.accepted
    assert found.waiting == found.running == 0
    assert found.met + found.late == clients.outcomes["answered"]
    assert found.failed == clients.outcomes["ModelError"]
    # Who gives up between being turned away and being told hears of the one, and is counted under the other.
    told = ("DeadlineExceeded", "QueueFull", "SchedulerClosed", "CancelledError")
    assert sum(found.rejected.values()) + found.cancelled == sum(clients.outcomes[how] for how in told)
    assert found.failure is None
    if close is None:
        assert clients.accepted == each * THREADS + per_coroutine * COROUTINES
        assert not clients.outcomes["SchedulerClosed"]
    if replay:
        again = Controller(plan)
        assert all(again.handle(event, now=now) == actions for now, event, actions in log)
        assert in_deadline_order([(event, actions) for _, event, actions in log]) > 10


@pytest.mark.parametrize("close", [None, True, False], ids=["to the end", "drained midway", "aborted midway"])
def test_no_request_is_lost_in_the_crowd(tmp_path: Path, close: bool | None) -> None:
    """Results match inputs, each has one outcome, earlier deadlines of a shape go first, and the run replays."""
    run(20_000 if close is None else 6_000, tmp_path, close=close, replay=True)


@pytest.mark.stress
def test_no_request_in_a_million_is_lost(tmp_path: Path) -> None:
    """The same, a million times."""
    run(1_000_000, tmp_path, close=None, replay=False)
