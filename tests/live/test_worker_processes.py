"""Real gunicorn, uvicorn and pytest-xdist, each with two worker processes, over loopback."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.live import models
from tests.live.cgroup_here import groups_of

SERVICE = """
import os
import numpy as np
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.errors import SpongeError
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler

def start():
    solver = Solver(LatencyModel(1e-5, 0, 0, 1e-4), max_cores=2, max_batch_size=4, max_lanes=2)
    scaler = best_scaler()
    scheduler = Scheduler("model.onnx", solver, scaler, slo_s=60)
    scheduler.own(scaler)
    return scheduler

def row(query):
    return {"i": np.array([int(query or 0)])}

def text(outputs):
    return f"{os.getpid()} {outputs[0][0]:g}".encode()
"""

WSGI = """
def app(environ, start_response):
    try:
        body, status = text(scheduler.submit(row(environ["QUERY_STRING"])).result()), "200 OK"
    except SpongeError as error:
        body, status = str(error).encode(), "503 Service Unavailable"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""

ASGI = """
async def app(scope, receive, send):
    global scheduler
    if scope["type"] == "lifespan":
        await receive()
        scheduler = start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        scheduler.close()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = text(await scheduler.infer(row(scope["query_string"])))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})
"""

AT_IMPORT = "scheduler = start()\n"
AFTER_THE_FORK = "def post_fork(server, worker):\n    import service\n    service.scheduler = service.start()\n"


class Server:
    """A server process, and a client of it."""

    def __init__(self, process: subprocess.Popen[str], address: tuple[str, int]) -> None:
        self.process = process
        self._address = address

    def get(self, query: int) -> tuple[int, str]:
        """Return status and body of one request, on a connection of its own."""
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            connection.request("GET", f"/?{query}", headers={"Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def workers_that_answer(self) -> set[int]:
        """Ask until two processes have answered, each rightly; return their ids."""
        pids: set[int] = set()
        for i in range(10_000):
            status, body = self.get(i % 100)
            assert status == 200, body
            pid, answer = body.split()
            assert float(answer) == 10 * (i % 100)
            pids.add(int(pid))
            if len(pids) == 2:
                return pids
        raise AssertionError(f"only {pids} answered")


@contextmanager
def serving(folder: Path, command: Sequence[str], pass_socket: Callable[[int], Sequence[str]]) -> Iterator[Server]:
    """Run a server on a socket that listens already, so that nobody has to wait for it; it must end well."""
    models.save(models.lookup(), folder / "model.onnx")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "SPONGE_CACHE_DIR": str(folder / "cache")}
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *pass_socket(listening.fileno())],
            cwd=folder,
            env=environment,
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Server(process, listening.getsockname())
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGTERM), said
            for trouble in ("Traceback", "SIGKILL", "SIGSEGV", "SIGABRT", "terminate called"):
                assert trouble not in said, said
        finally:
            process.kill()
            process.communicate()


GUNICORN = ["gunicorn", "service:app", "--workers", "2"]


def over_gunicorn(descriptor: int) -> list[str]:
    return ["--bind", f"fd://{descriptor}"]


def test_gunicorn_workers(tmp_path: Path) -> None:
    """Each worker imports the service and has a scheduler of its own; they end with the server, groups and all."""
    (tmp_path / "service.py").write_text(SERVICE + AT_IMPORT + WSGI)
    with serving(tmp_path, GUNICORN, over_gunicorn) as server:
        pids = server.workers_that_answer()
        assert server.process.pid not in pids
    assert not set().union(*(groups_of(pid) for pid in pids))


def test_gunicorn_workers_of_a_preloaded_service(tmp_path: Path) -> None:
    """The service is imported once and forked: each worker makes its scheduler in the hook after the fork."""
    (tmp_path / "service.py").write_text(SERVICE + WSGI)
    (tmp_path / "gunicorn.conf.py").write_text(AFTER_THE_FORK)
    with serving(tmp_path, [*GUNICORN, "--preload"], over_gunicorn) as server:
        pids = server.workers_that_answer()
    assert not set().union(*(groups_of(pid) for pid in pids))


def test_gunicorn_workers_with_a_scheduler_from_before_the_fork(tmp_path: Path) -> None:
    """The mistake that preloading invites: every request is answered at once, with what to do about it."""
    (tmp_path / "service.py").write_text(SERVICE + AT_IMPORT + WSGI)
    with serving(tmp_path, [*GUNICORN, "--preload"], over_gunicorn) as server:
        for i in range(20):
            status, body = server.get(i)
            assert status == 503
            assert body.startswith(f"the scheduler belongs to process {server.process.pid}")
            assert body.endswith("Make the scheduler in each worker, after the fork")
    assert not groups_of(server.process.pid)


def test_uvicorn_workers(tmp_path: Path) -> None:
    """A scheduler for each worker, made and closed in the application's lifespan."""
    (tmp_path / "service.py").write_text(SERVICE + ASGI)
    command = ["uvicorn", "service:app", "--workers", "2", "--log-level", "warning"]
    with serving(tmp_path, command, lambda descriptor: ["--fd", str(descriptor)]) as server:
        pids = server.workers_that_answer()
    assert not set().union(*(groups_of(pid) for pid in pids))


def test_pytest_xdist_workers(tmp_path: Path) -> None:
    """Tests of a user's service, in parallel: closed, dropped, or left open by each."""
    models.save(models.lookup(), tmp_path / "model.onnx")
    (tmp_path / "test_service.py").write_text(
        SERVICE
        + """
import pytest
kept = []
@pytest.mark.parametrize("i", range(12))
def test_answer(i):
    scheduler = start()
    assert scheduler.submit(row(i)).result(60)[0][0] == 10 * i
    if i % 3 == 0:
        scheduler.close()
    elif i % 3 == 1:
        kept.append(scheduler)
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "SPONGE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
    assert "crashed" not in done.stdout
