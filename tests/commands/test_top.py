"""``sponge top``: looking at a scheduler of another process, over a real socket and in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from fcntl import ioctl
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sponge.commands.top import rates
from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from sponge.live.status import is_served, runtime_directory
from tests.live import models
from tests.live.cgroup_here import needs_root

SOLVER = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=2, max_batch_size=16, max_lanes=2)
SPONGE = [sys.executable, "-m", "sponge"]


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    with ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as made:
        yield made


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of sockets of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "sponge"


def busy(scheduler: Scheduler, requests: int = 50) -> None:
    futures = [scheduler.submit({"i": np.array([i % 100])}, budget_s=60) for i in range(requests)]
    wait([*futures, scheduler.submit({"i": np.array([1])}, budget_s=-1)])


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SPONGE, "top", *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_json_tells_what_the_scheduler_counts(session: ElasticSession) -> None:
    """From another process, found without being told where."""
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        path = scheduler.serve_status()
        busy(scheduler)
        result = top("--once", "--json", "--interval", "0.1")
        found = scheduler.statistics()
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    status = json.loads(line)
    assert (status["pid"], status["name"]) == (os.getpid(), "detector")
    assert status["statistics"]["met"] == found.met == 50
    assert status["statistics"]["rejected"] == {"deadline": 1}
    assert status["recent"]["requests"] == 51
    assert status["recent"]["missed"] == 1
    assert status["recent"]["response_s"]["p50"] > 0
    assert status["rates"]["submitted"] == 0
    assert status["condition"]["max_cores"] == 2
    assert not path.exists()


def test_environment_variable_asks_for_it(
    session: ElasticSession, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of the service has to change; with two schedulers one has to be named."""
    monkeypatch.setenv("SPONGE_STATUS", "1")
    with Scheduler(session, SOLVER, name="one"), Scheduler(session, SOLVER, name="two"):
        sockets = sorted(directory.glob("*.sock"))
        assert len(sockets) == 2
        refused = top("--once", "--interval", "0.1")
        assert refused.returncode == 1
        assert "several schedulers serve their status" in refused.stderr
        assert str(sockets[0]) in refused.stderr
        shown = top(str(sockets[1]), "--once", "--interval", "0.1")
        assert shown.returncode == 0, shown.stderr
        assert f"'two' of process {os.getpid()}" in shown.stdout
    assert not list(directory.iterdir())
    monkeypatch.setenv("SPONGE_STATUS", "0")
    with Scheduler(session, SOLVER):
        assert not list(directory.iterdir())


def test_nothing_is_served_unasked(session: ElasticSession, directory: Path) -> None:
    """And then top says how to ask."""
    with Scheduler(session, SOLVER):
        result = top("--once")
    assert result.returncode == 1
    assert f"no scheduler serves its status in {directory}" in result.stderr
    assert "SPONGE_STATUS=1" in result.stderr
    assert not directory.exists()


def test_only_the_owner_can_open_it(session: ElasticSession, directory: Path) -> None:
    """Counts of requests are nobody else's business."""
    with Scheduler(session, SOLVER) as scheduler:
        path = scheduler.serve_status()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        with pytest.raises(FileExistsError, match="another process serves its status there"):
            scheduler.serve_status(path)
    directory.chmod(0o777)
    with Scheduler(session, SOLVER) as scheduler, pytest.raises(PermissionError, match="other users may write to it"):
        scheduler.serve_status()


@needs_root
def test_the_kernel_says_who_asks(session: ElasticSession) -> None:
    """Even if the file has been opened up to everybody, another user is told nothing."""
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); "
        "s.connect(sys.argv[1]); print(len(s.recv(65536)) > 0)"
    )
    with tempfile.TemporaryDirectory() as shared, Scheduler(session, SOLVER) as scheduler:
        os.chmod(shared, 0o755)
        path = scheduler.serve_status(Path(shared) / "status")
        path.chmod(0o666)
        for user, told in (("0", "True"), ("65534", "False")):
            command = [sys.executable, "-c", script, str(path), user]
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (asked.returncode, asked.stdout.strip()) == (0, told), asked.stderr


def test_what_a_killed_process_left_is_cleared_away(session: ElasticSession, directory: Path) -> None:
    """A socket without a listener is neither offered nor in the way."""
    directory.mkdir(mode=0o700)
    left = directory / "1234567-0.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    assert not is_served(left)
    with Scheduler(session, SOLVER) as scheduler:
        path = scheduler.serve_status()
        assert not left.exists()
        assert top("--once", "--interval", "0.1").returncode == 0
        assert path.exists()


def test_a_forked_child_does_not_answer_for_its_parent(directory: Path) -> None:
    """Workers are forked with the sockets of their master: they must not keep the socket of a dead one open."""
    script = """if True:
        import os, signal, sys
        import sponge
        from sponge.live.session import ElasticSession
        from tests.live import models

        session = ElasticSession(models.lookup(), max_threads=1)
        solver = sponge.Solver(sponge.LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=1, max_batch_size=4)
        scheduler = sponge.Scheduler(session, solver)
        print(scheduler.serve_status(), flush=True)
        if not os.fork():
            print(os.getpid(), flush=True)
        signal.pause()
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        path, child = Path(parent.stdout.readline().strip()), int(parent.stdout.readline())
        try:
            assert is_served(path)
            parent.kill()
            parent.wait(60)
            assert path.is_socket()
            assert not is_served(path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_clients_that_hang_or_crowd_do_no_harm(session: ElasticSession) -> None:
    """Somebody connects and goes away at once, again and again, while others ask and requests are served."""
    with Scheduler(session, SOLVER) as scheduler:
        path = scheduler.serve_status()

        def crowd() -> None:
            for _ in range(50):
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(path))

        crowds = [threading.Thread(target=crowd) for _ in range(4)]
        for thread in crowds:
            thread.start()
        busy(scheduler, 200)
        for thread in crowds:
            thread.join()
        assert top("--once", "--interval", "0.1").returncode == 0
        assert scheduler.statistics().met == 200


def test_a_path_that_cannot_be_is_told(session: ElasticSession, tmp_path: Path) -> None:
    """Socket paths are short on every system."""
    with Scheduler(session, SOLVER) as scheduler, pytest.raises(OSError, match="at most 107 bytes"):
        scheduler.serve_status(tmp_path / ("x" * 120))


def test_directory_without_a_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, there is none."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_directory().name == f"sponge-{os.getuid()}"


def test_rates_are_differences() -> None:
    """By hand: two answers half a second apart."""

    def answer(now: float, **changes: Any) -> dict[str, Any]:
        counts = dict.fromkeys(("submitted", "met", "late", "failed", "cancelled", "batches", "resizes"), 0)
        rest = {"allocated_core_s": 1.0, "cpu_s": 1.0, "rejected": {}, **changes}
        return {"now": now, "statistics": counts | rest, "condition": {"throttled_s": None}}

    after = answer(10.5, met=3, late=1, allocated_core_s=1.75, cpu_s=1.25, rejected={"deadline": 2})
    found = rates(answer(10.0), after)
    assert (found["met"], found["late"], found["rejected"], found["missed"]) == (6, 2, 4, 6)
    assert (found["allocated_cores"], found["used_cores"], found["throttled"]) == (1.5, 0.5, 0.0)
    assert set(rates(after, after).values()) == {0.0}


class Terminal:
    """A command in a pseudo-terminal of the usual 80 columns."""

    def __init__(self, *command: str) -> None:
        self._end, other = pty.openpty()
        ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
        os.close(other)
        self.text = ""

    def read_until(self, pattern: str) -> None:
        """Read what is shown until it matches."""
        until = time.monotonic() + 60
        while not re.search(pattern, self.text, re.DOTALL):
            left_s = until - time.monotonic()
            assert left_s > 0, self.text
            if select.select([self._end], [], [], left_s)[0]:
                try:
                    self.text += os.read(self._end, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.text, re.DOTALL), self.text
                    return

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            os.close(self._end)


def test_terminal_shows_it_live_until_it_ends(session: ElasticSession) -> None:
    """In a real terminal: the picture comes again, and the end of the scheduler is the end of the command."""
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        scheduler.serve_status()
        terminal = Terminal(*SPONGE, "top", "--interval", "0.2")
        terminal.read_until(r"cores allocated.*nothing has ended yet.*measured / predicted")
        busy(scheduler)
        terminal.read_until(
            r"failed[^-]{0,40} cancelled\x1b.*98\.04 % of the deadlines met.*1 deadline.*last 51 requests"
        )
        assert "\x1b[?1049h" in terminal.text  # a screen of its own, which leaves the user's as it was
    terminal.read_until(r"\x1b\[\?1049l.*has ended")
    assert terminal.close() == 0


def test_control_c_leaves_the_terminal_as_it_was(session: ElasticSession) -> None:
    """The usual way out; the service does not notice."""
    with Scheduler(session, SOLVER) as scheduler:
        scheduler.serve_status()
        terminal = Terminal(*SPONGE, "top", "--interval", "0.2")
        terminal.read_until("cores allocated")
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(r"\x1b\[\?1049l")
        assert terminal.close() == 130
        busy(scheduler)
