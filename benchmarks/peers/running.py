"""One contender, started, warmed, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from contenders import IN_PROCESS, Contender
from environments import HERE, SOURCE
from group import Group
from replay import OK

START_PATIENCE_S = 90.0
REPLY_PATIENCE_S = 60.0
MOST_UNANSWERED = 4
"""Of the sixteen requests that tell whether a contender is up."""
END_PATIENCE_S = 8.0
IN_FLIGHT = 16
PLAIN_S = 2.0
CLIENT_NICE = -5
"""The client shares the cores with the server: it goes first, as if it were another machine."""


class ContenderFailed(Exception):
    """A contender did not start, stopped, or gave wrong answers; says which and why."""


class Running:
    """A contender that serves; a context manager that ends all of its processes.

    Raises
    ------
    ContenderFailed
        If it does not serve in time.
    """

    def __init__(self, contender: Contender, settings: dict[str, Any], venvs: Path, log: Path) -> None:
        self.contender = contender
        self._log = log
        self._settings = {**settings, "port": _free_port(), "protocol": contender.protocol}
        self._scratch = venvs / "scratch"
        self._scratch.mkdir(exist_ok=True)
        self._python = venvs / contender.venv / "bin" / "python"
        self._client_python = venvs / "sponge" / "bin" / "python"
        self._group = Group(contender.name)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._group.close)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def _start(self) -> None:
        log = self._stack.enter_context(self._log.open("ab"))
        inside = self.contender.lane == IN_PROCESS
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        server = subprocess.Popen(
            [self._python, HERE / self.contender.script],
            env=self._environment(),
            stderr=log,
            preexec_fn=self._enter,
            start_new_session=True,
            cwd=self._log.parent,
            **(pipes if inside else {"stdin": subprocess.DEVNULL, "stdout": log}),
        )
        self._stack.callback(_end, server)
        self._server = server
        if inside:
            self._client = server
        else:
            self._client = subprocess.Popen(
                [self._client_python, HERE / self.contender.client],
                env=self._environment(),
                stderr=log,
                preexec_fn=_go_first,
                **pipes,
            )
            self._stack.callback(_end, self._client)
        self._read(START_PATIENCE_S)
        self._await_answers()

    def _enter(self) -> None:
        self._group.enter()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a race in the background of a shell ignores it

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RACE_CONTENDER": json.dumps(self._settings),
            "PYTHONPATH": f"{HERE}:{SOURCE}",
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._scratch),
            "PYTRITON_HOME": str(self._scratch),
            "BENTOML_HOME": str(self._scratch),
            "BENTOML_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1",
            "PYTRITON_NO_TELEMETRY": "1",
        }

    def _await_answers(self) -> None:
        """Wait until pictures are answered, and rightly; some servers turn requests away while they learn."""
        end, why = time.monotonic() + START_PATIENCE_S, ["it does not listen"]
        while True:
            if self._server.poll() is not None:
                raise ContenderFailed(f"{self.contender.name} ended with {self._server.returncode}, see {self._log}")
            if self.contender.lane == IN_PROCESS or _listens(self._settings["port"]):
                seen = self.ask({"do": "check"}, REPLY_PATIENCE_S)
                why = seen["wrong"] or seen["unanswered"]
                if not seen["wrong"] and len(seen["unanswered"]) <= MOST_UNANSWERED:
                    return
            if time.monotonic() > end:
                raise ContenderFailed(f"{self.contender.name} does not answer: {'; '.join(why[:3])}, see {self._log}")
            time.sleep(0.2)

    def ask(self, command: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """Have the client do something, and return what it says.

        Raises
        ------
        ContenderFailed
            If it says nothing in time.
        """
        try:
            self._client.stdin.write(json.dumps(command).encode() + b"\n")
            self._client.stdin.flush()
        except OSError as error:
            raise ContenderFailed(f"the client of {self.contender.name} has ended, see {self._log}") from error
        return self._read(patience_s)

    def _read(self, patience_s: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._client.stdout, selectors.EVENT_READ)
            while selector.select(patience_s):
                line = self._client.stdout.readline()
                if not line:
                    break
                if line.startswith(b"{"):
                    return json.loads(line)
        raise ContenderFailed(f"the client of {self.contender.name} says nothing, see {self._log}")

    def replay(self, at_s: Any, budget_s: Any, *, poison: Any = (), patience_s: float = 5.0) -> dict[str, Any]:
        """Send requests when they are due; adds the CPU time of all server processes."""
        command = {
            "do": "replay",
            "at_s": list(map(float, at_s)),
            "budget_s": list(map(float, budget_s)),
            "poison": [int(index) for index in poison],
            "patience_s": patience_s,
        }
        before_s = self._group.cpu_s()
        reply = self.ask(command, float(np.max(at_s)) + patience_s + REPLY_PATIENCE_S)
        return reply | {"cpu_s": self._group.cpu_s() - before_s}

    def throughput(self, duration_s: float = PLAIN_S) -> tuple[float, float]:
        """Return answers per second with so many requests in flight, without deadlines, and per core-second."""
        before_s = self._group.cpu_s()
        reply = self.ask({"do": "closed_loop", "in_flight": IN_FLIGHT, "duration_s": duration_s}, duration_s + 60)
        answers = float(reply["counts"][OK])
        return answers / reply["took_s"], answers / (self._group.cpu_s() - before_s)

    def warm_up(self, largest: int) -> None:
        """Bursts of every size, twice, and then a while at random: adaptive batchers learn from mixed sizes."""
        at_s, start = [], 0.0
        for size in [*range(1, largest + 1), *range(1, largest + 1)]:
            at_s += [start] * size
            start += 0.02 + 0.015 * size
        at_s += list(start + np.cumsum(np.random.default_rng(7).exponential(0.05, 15)))
        self.replay(at_s, [30.0] * len(at_s), patience_s=30.0)

    def limit(self, cores: float | None) -> None:
        """Allow the server so many cores; None: all."""
        self._group.limit(cores)

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _go_first() -> None:
    with contextlib.suppress(PermissionError):
        os.nice(CLIENT_NICE)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, so that it takes away what it made (shared memory, above all), and make it."""
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
