"""How a scheduler ends: closed again and again, dropped, forked, pickled, or left to the interpreter's exit."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import SchedulerClosed, SchedulerForked
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models
from tests.live.cgroup_here import groups_of, needs_quota

ROOT = Path(__file__).parents[2]

LATENCY = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)

PREAMBLE = """
import os, sys, threading
import numpy as np
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.live.scheduler import Scheduler
def solver(**changes):
    return Solver(LatencyModel(1e-5, 0, 0, 1e-4), **{"max_cores": 1, "max_batch_size": 1, **changes})
def slow(turns):
    return {"x": np.zeros(1, dtype=np.float32), "rounds": np.array([turns])}
"""


def solver(**changes: Any) -> Solver:
    return Solver(LATENCY, **{"max_cores": 2, "max_batch_size": 16, "max_lanes": 2, **changes})


def row(value: float) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.full((1, 4), value, dtype=np.float32)}


def slow(turns: int) -> dict[str, np.ndarray[Any, Any]]:
    """Input of the ``loop`` model; 10,000 turns take some 0.3 s."""
    return {"x": np.zeros(1, dtype=np.float32), "rounds": np.array([turns])}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.loop(), tmp_path_factory.mktemp("models") / "loop.onnx")


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script after the preamble in another process, with ONNX Runtime's own background thread switched off."""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "default", "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def threads_with(prefix: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


def join_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), thread.name


# -- garbage -----------------------------------------------------------------------------------------------------------


def test_dropped_scheduler_warns_and_ends() -> None:
    """Its threads must not keep it alive: they end, and the session that it made is closed with it."""
    scheduler = Scheduler(models.identity(), solver(), name="dropped")
    assert scheduler.submit(row(1), budget_s=60).result(60)
    threads = threads_with("dropped-")
    assert len(threads) == 3
    session = weakref.ref(scheduler.session)
    with pytest.warns(ResourceWarning, match="'dropped' was not closed"):
        del scheduler
    join_all(threads)
    join_all(threads_with("dropped-end"))
    gc.collect()
    assert session() is None


def test_dropped_scheduler_serves_what_it_has_accepted(loop: Path) -> None:
    """Clients hold futures, not the scheduler."""
    scheduler = Scheduler(loop, solver(max_lanes=1, max_batch_size=1), name="accepting")
    futures = [scheduler.submit(slow(2_000), budget_s=600) for _ in range(5)]
    threads = threads_with("accepting-")
    with pytest.warns(ResourceWarning):
        del scheduler
    assert not wait(futures, 60).not_done
    assert [future.exception() for future in futures] == [None] * 5
    join_all(threads)


def test_scheduler_dropped_on_its_own_lane_ends(loop: Path) -> None:
    """The last reference may be a callback's, which runs on a lane: the end must not wait there for itself."""
    held = [Scheduler(loop, solver(max_lanes=1, max_batch_size=1), name="selfish")]
    threads = threads_with("selfish-")
    dropped = threading.Event()

    def drop(_: Future[Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held.clear()
            gc.collect()
        dropped.set()

    held[0].submit(slow(2_000), budget_s=600).add_done_callback(drop)
    assert dropped.wait(60)
    join_all(threads)


def test_closed_scheduler_is_dropped_silently() -> None:
    """The warning is for those who forgot."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = Scheduler(models.identity(), solver(), name="tidy")
        assert scheduler.close()
        dropped = weakref.ref(scheduler)
        del scheduler
        gc.collect()
    assert dropped() is None
    assert not threads_with("tidy-")


@needs_quota
def test_dropped_scheduler_leaves_no_group() -> None:
    """Nobody holds the scaler but the scheduler: the group goes with it, and with it the limit."""
    from sponge.live.cgroup import CgroupScaler

    before = groups_of(os.getpid())
    scheduler = Scheduler(models.identity(), solver(), CgroupScaler(), name="grouped")
    assert len(groups_of(os.getpid()) - before) == 1
    with pytest.warns(ResourceWarning):
        del scheduler
    join_all(threads_with("grouped-"))
    gc.collect()
    assert groups_of(os.getpid()) == before


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copying_is_refused(copied: Callable[[Any], Any]) -> None:
    """Threads and a model's memory cannot be sent to another process; the message says what to do instead."""
    with (
        Scheduler(models.identity(), solver()) as scheduler,
        pytest.raises(TypeError, match=r"a Scheduler .* in each process"),
    ):
        copied(scheduler)
    with (
        ElasticSession(models.identity(), max_threads=1) as session,
        pytest.raises(TypeError, match=r"an ElasticSession .* in each process"),
    ):
        copied(session)


# -- fork --------------------------------------------------------------------------------------------------------------

IN_CHILD = """
import gc, pickle, traceback
from concurrent.futures import wait
from sponge.errors import SchedulerForked
from sponge.live.cgroup import CgroupScaler
quota = CgroupScaler.probe().quota_allowed
scaler = CgroupScaler() if quota else None
scheduler = Scheduler(sys.argv[1], solver(max_cores=4), scaler, slo_s=600)
calls = []
running = scheduler.submit(slow(10_000))
waiting = [scheduler.submit(slow(1)) for _ in range(3)]
waiting[0].add_done_callback(calls.append)

def refused(act):
    try:
        act()
    except SchedulerForked as error:
        assert error.owner_pid == os.getppid() and error.pid == os.getpid()
        assert "Make the scheduler in each worker, after the fork" in str(error)
    else:
        raise AssertionError("not refused")

sys.stdout.flush()
child = os.fork()
if child == 0:
    try:
        import asyncio
        assert not wait([running, *waiting], 60).not_done
        for future in (running, *waiting):
            refused(future.result)
            assert not future.cancel()
        assert not calls, "callbacks belong to the parent"
        refused(lambda: scheduler.submit(slow(1)))
        refused(lambda: asyncio.run(scheduler.infer(slow(1))))
        refused(scheduler.statistics)
        with scheduler:
            pass
        assert scheduler.close()
        del running, waiting, scheduler, scaler
        gc.collect()
        fresh = Scheduler(sys.argv[1], solver(), slo_s=600)
        fresh.submit(slow(1)).result(60)
        print("child is done", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
running.result(60)
for future in waiting:
    future.result(60)
assert len(calls) == 1
assert scheduler.submit(slow(1)).result(60)
statistics = scheduler.statistics()
assert (statistics.met, statistics.rejected) == (5, {}), statistics
if quota:
    assert os.path.isdir(scaler.directory) and scaler.thread_ids(), "the child has touched the parent's group"
    assert statistics.cpu_control_errors == 0
assert scheduler.close()
if quota:
    scaler.close()
print("the child left with", code)
"""


def test_forked_child_is_told_and_touches_nothing(loop: Path) -> None:
    """Inherited futures end, each call is refused at once, a new scheduler works, and the parent notices nothing."""
    done = run_script(IN_CHILD, loop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child is done", "the child left with 7"], done.stderr
    assert "Traceback" not in done.stderr


def test_session_in_a_forked_child_refuses_to_run(loop: Path, tmp_path: Path) -> None:
    """Its pools have no threads there; and a directory that it made for its files stays the parent's."""
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    script = """
from pathlib import Path
from sponge.live.session import ElasticSession
session = ElasticSession(sys.argv[1], max_threads=4, cache_dir=sys.argv[2])
directory = session._factory._cache.path
assert directory != Path(sys.argv[2]), "a temporary one stands in"
sys.stdout.flush()
child = os.fork()
if child == 0:
    for threads in (1, 4):
        try:
            session.run(slow(1), threads=threads)
        except RuntimeError as error:
            assert str(error).startswith(f"the ElasticSession belongs to process {os.getppid()}: make one in each")
        else:
            sys.exit(1)
    session.close()
    del session
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert directory.is_dir()
session.run(slow(1), threads=4)
session.close()
assert not directory.exists()
print(code)
"""
    done = run_script(script, loop, open_to_all)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"


def test_fork_while_threads_are_at_work(loop: Path) -> None:
    """Whatever lock another thread holds at the fork, the child is not caught by it."""
    script = """
from sponge.errors import SchedulerForked
scheduler = Scheduler(sys.argv[1], solver(), slo_s=600)
end = threading.Event()
def client():
    while not end.is_set():
        scheduler.submit(slow(1)).result(60)
clients = [threading.Thread(target=client) for _ in range(4)]
for thread in clients:
    thread.start()
codes = []
for _ in range(50):
    future = scheduler.submit(slow(1))
    child = os.fork()
    if child == 0:
        try:
            try:
                future.result(60)
            except SchedulerForked:
                pass
            scheduler.submit(slow(1))
        except SchedulerForked:
            scheduler.close()
            os._exit(0)
        os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
end.set()
for thread in clients:
    thread.join()
statistics = scheduler.statistics()
assert scheduler.close()
assert statistics.submitted == statistics.met + statistics.waiting + statistics.running, statistics
print(set(codes))
"""
    done = run_script(script, loop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{0}"


def test_error_after_a_fork_is_one_of_a_closed_scheduler() -> None:
    """Services that handle the one handle the other."""
    error = SchedulerForked(10, 11, request_id=3)
    assert isinstance(error, SchedulerClosed)
    assert (error.owner_pid, error.pid, error.request_id) == (10, 11, 3)
    assert "belongs to process 10" in str(error)
    assert "request 3" in str(error)


def test_spawned_process_makes_its_own(loop: Path, tmp_path: Path) -> None:
    """What multiprocessing offers instead of a fork works; sending a scheduler along is refused where it is tried."""
    program = tmp_path / "program.py"
    program.write_text(
        PREAMBLE
        + """
import multiprocessing
def work(path):
    with Scheduler(path, solver(), slo_s=600) as scheduler:
        scheduler.submit(slow(1)).result(60)
if __name__ == "__main__":
    with Scheduler(sys.argv[1], solver(), slo_s=600) as scheduler:
        context = multiprocessing.get_context("spawn")
        try:
            context.Process(target=print, args=(scheduler,)).start()
        except TypeError as error:
            print(error)
        worker = context.Process(target=work, args=(sys.argv[1],))
        worker.start()
        worker.join()
        print(worker.exitcode)
"""
    )
    command = [sys.executable, str(program), str(loop)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    refusal, code = done.stdout.splitlines()
    assert "a Scheduler cannot be pickled" in refusal
    assert code == "0"


# -- the interpreter's end ---------------------------------------------------------------------------------------------

LEAVING: dict[str, tuple[str, int]] = {
    "at the end of the script": ("", 0),
    "with an exit code": ("sys.exit(3)", 3),
    "by an error": ("raise LookupError('on purpose')", 1),
    "by an interrupt": ("import signal; signal.raise_signal(signal.SIGINT)", -2),
    "inside a with statement": ("with scheduler: sys.exit(5)", 5),
    "with a client still waiting on a daemon thread": (
        "threading.Thread(target=lambda: [future.exception() for future in futures], daemon=True).start(); sys.exit(6)",
        6,
    ),
    "with a daemon thread that goes on submitting": (
        """
from sponge.errors import SchedulerClosed
def go_on():
    try:
        while True:
            scheduler.submit(slow(1), budget_s=600).result()
    except SchedulerClosed:
        pass
for _ in range(4):
    threading.Thread(target=go_on, daemon=True).start()
sys.exit(7)
""",
        7,
    ),
    "from a thread that is waited for": (
        "threading.Thread(target=lambda: [future.exception() for future in futures]).start(); sys.exit(8)",
        8,
    ),
    "after a dropped scheduler": ("del scheduler; sys.exit(9)", 9),
}


@pytest.mark.parametrize("how", LEAVING)
def test_interpreter_ends_with_requests_in_flight(loop: Path, how: str) -> None:
    """Without close, with batches still to run: its own exit code, and nothing said but what was asked."""
    leave, code = LEAVING[how]
    script = """
scheduler = Scheduler(sys.argv[1], solver())
futures = [scheduler.submit(slow(2_000), budget_s=600) for _ in range(20)]
futures[0].result()
print("leaving", flush=True)
"""
    done = run_script(script + leave, loop)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == "leaving"
    said = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line and "was not closed" not in line]
    if how in ("by an error", "by an interrupt"):
        assert said[-1] in ("LookupError: on purpose", "KeyboardInterrupt")
    else:
        assert not any("Traceback" in line or "Exception" in line or "Fatal" in line for line in said), done.stderr


def test_interpreter_ends_though_the_model_hangs(loop: Path) -> None:
    """A batch that takes minutes is given seconds; then the process ends all the same, with its code."""
    script = """
scheduler = Scheduler(sys.argv[1], solver())
hanging = scheduler.submit(slow(10_000_000), budget_s=6000)
waiting = scheduler.submit(slow(1), budget_s=6000)
def tell(future):
    print(type(future.exception()).__name__, flush=True)
waiting.add_done_callback(tell)
sys.exit(4)
"""
    done = run_script(script, loop)
    assert done.returncode == 4, done.stderr
    assert done.stdout.strip() == "SchedulerClosed"
    assert "Fatal" not in done.stderr


@needs_quota
def test_interpreter_ends_without_leaving_a_group(loop: Path) -> None:
    """Even where nobody closed scheduler or scaler, and a batch runs."""
    script = """
from sponge.live.cgroup import CgroupScaler
scheduler = Scheduler(sys.argv[1], solver(), CgroupScaler())
future = scheduler.submit(slow(5_000), budget_s=600)
print(scheduler.scaler.directory)
"""
    done = run_script(script, loop)
    assert done.returncode == 0, done.stderr
    directory = done.stdout.strip()
    assert directory
    assert not os.path.exists(directory)


# -- again and again ---------------------------------------------------------------------------------------------------


def test_starting_and_closing_leaves_nothing() -> None:
    """No thread, descriptor or control group more after fifty; `make stress` has a thousand, and the memory."""
    held = run_cycles(50)
    for what in ("threads", "descriptors", "groups"):
        assert {one[what] for one in held[1:]} == {held[1][what]}, what
    assert held[1]["groups"] == 0


def run_cycles(times: int) -> list[dict[str, float]]:
    """Start and close as many schedulers in another process; return what it held before, and after each."""
    # ONNX Runtime's telemetry starts threads and opens sockets now and then.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "tests.live.cycles", str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    held: list[dict[str, float]] = json.loads(done.stdout)
    assert len(held) == times + 1
    return held
