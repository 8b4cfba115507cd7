"""Time as the world has it: suspended processes, numbers that are none, clocks that jump."""

from __future__ import annotations

import ast
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import wait
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sponge
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models

SOURCE = Path(sponge.__file__).parent
X = {"x": np.ones((1, 4), dtype=np.float32)}
PLAN = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=1, max_batch_size=4)

SYSTEM_CLOCK = {f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime", "ctime")}
SYSTEM_CLOCK |= {f"datetime.{name}" for name in ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")}
NO_NUMBERS: list[Any] = ["1", b"1", True, False, np.True_, [], [1.0], {}, object(), 1j, np.ones(2)]
SERVED: list[Any] = [30, 30.0, np.float32(30), np.int64(30), np.array(30.0), Decimal(30), Fraction(60, 2), 1e308]
SERVED += [math.inf, 10**400, np.inf]
TURNED_AWAY: list[Any] = [0, -0.0, -1, -1e308, -math.inf, -(10**400), Decimal("-0.5"), np.float64(-3)]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    with ElasticSession(models.identity(), max_threads=1, cache_dir=cache) as session, Scheduler(session, PLAN) as made:
        yield made


@pytest.mark.parametrize("how", ["budget_s", "deadline"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(scheduler: Scheduler, how: str, value: Any) -> None:
    """At once, naming argument and value."""
    with pytest.raises(TypeError, match=f"{how} must be a number of seconds, got"):
        scheduler.submit(X, **{how: value})


@pytest.mark.parametrize("how", ["budget_s", "deadline"])
@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), Decimal("nan")], ids=repr)
def test_not_a_number_is_refused(scheduler: Scheduler, how: str, value: Any) -> None:
    """It would have no place in any order."""
    with pytest.raises(ValueError, match=f"{how} must be a number of seconds, got"):
        scheduler.submit(X, **{how: value})


@pytest.mark.parametrize("value", SERVED, ids=lambda value: repr(value)[:20])
def test_budget_of_any_kind_and_size(scheduler: Scheduler, value: Any) -> None:
    """Whatever Python takes for a number; beyond all time means no deadline."""
    assert scheduler.submit(X, budget_s=value).result(60)
    if value > 100:
        assert scheduler.submit(X, deadline=value).result(60)


def test_request_without_any_budget_is_told_what_to_give(scheduler: Scheduler) -> None:
    """The first thing that everybody forgets."""
    with pytest.raises(ValueError, match=r"budget_s is the time left for this request \[s\], slo_s"):
        scheduler.submit(X)


@pytest.mark.parametrize("unit", [1, 1000], ids=["seconds", "milliseconds"])
def test_deadline_by_the_clock_on_the_wall_is_refused(scheduler: Scheduler, unit: int) -> None:
    """On the scheduler's clock it lies decades ahead: nothing would ever be late, and nobody would notice."""
    with pytest.raises(ValueError, match=r"deadline must be an instant on the scheduler's clock.*budget_s"):
        scheduler.submit(X, deadline=unit * 1_790_000_000.0)


@pytest.mark.parametrize("value", TURNED_AWAY, ids=lambda value: repr(value)[:20])
def test_budget_that_is_used_up(scheduler: Scheduler, value: Any) -> None:
    """Turned away at once, as any other that is too late; and so is a deadline in the past."""
    for more in ({"budget_s": value}, {"deadline": value}):
        with pytest.raises(DeadlineExceeded, match="cannot meet its deadline"):
            scheduler.submit(X, **more).result(60)


def test_strange_deadlines_side_by_side(scheduler: Scheduler) -> None:
    """Finite, far and no deadlines in one queue: all are served, and nothing overflows."""
    futures = [scheduler.submit(X, budget_s=budget_s) for budget_s in (60.0, 1e14, 1e308, math.inf, 1e-9 + 60) * 20]
    assert not wait(futures, 60).not_done
    assert all(future.exception() is None for future in futures)


def test_nothing_depends_on_the_system_s_clock() -> None:
    """It jumps when it is set. Only the date in a profile and the age of left files are read from it."""
    read = set()
    for part in ("core", "live", "optimize", "sim", "workload"):
        for path in (SOURCE / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in SYSTEM_CLOCK:
                    read.add((str(path.relative_to(SOURCE)), ast.unparse(node)))
                assert not (isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")), path
    assert read == {("live/model_file.py", "time.time"), ("live/profiler.py", "datetime.datetime.now")}


def test_suspended_process_goes_on(tmp_path: Path) -> None:
    """SIGSTOP for three seconds: who is overdue is told or answered late, others are served, and the counts agree."""
    path = models.save(models.loop(), tmp_path / "loop.onnx")
    script = f"""
import sys
import numpy as np
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import DeadlineExceeded
from sponge.live.scheduler import Scheduler
solver = Solver(LatencyModel(1e-5, 0, 0, 1e-4), max_cores=1, max_batch_size=1)
x = lambda turns: {{"x": np.zeros(1, dtype=np.float32), "rounds": np.array([turns])}}
with Scheduler({str(path)!r}, solver) as scheduler:
    futures = [scheduler.submit(x(10_000), budget_s=1.0)]
    futures += [scheduler.submit(x(1), budget_s=2.0) for _ in range(5)]
    futures += [scheduler.submit(x(1), budget_s=600.0) for _ in range(5)]
    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = [future.exception(60) for future in futures]
    assert all(error is None or isinstance(error, DeadlineExceeded) for error in outcomes), outcomes
    assert outcomes[6:] == [None] * 5, outcomes
    assert scheduler.submit(x(1), budget_s=60.0).result(60)
    found = scheduler.statistics()
assert found.met + found.late + sum(found.rejected.values()) == found.submitted == 12, found
assert found.met >= 6 and found.waiting == found.running == 0, found
print("served")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            # The three seconds are the case itself.
            subprocess.run(["sleep", "3"], check=True)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    assert out == "served\n"
