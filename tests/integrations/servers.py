"""A real uvicorn on loopback, a raw client as slow as a test likes, and a way to keep a scheduler busy."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import uvicorn

from sponge.live.scheduler import Scheduler


@contextmanager
def serving(app: Any, **config: Any) -> Iterator[int]:
    """Serve an ASGI application in a thread; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", **{"http": "h11", "timeout_graceful_shutdown": 10, **config})
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@attrs.frozen
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """One HTTP/1.1 request over a bare socket: head and body are sent when the test says."""

    def __init__(self, port: int, path: str = "/", *, length: int = 0, method: str = "POST", **headers: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(30)
        self._file = self.socket.makefile("rb")
        lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {length}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def wait_for_continue(self) -> None:
        """Wait until the server asks for the body (``expect: 100-continue``): it has seen the head by then."""
        assert self._file.readline().startswith(b"HTTP/1.1 100")
        assert self._file.readline() == b"\r\n"

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        status = int(self._file.readline().split()[1])
        headers = {}
        while (line := self._file.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = self._file.read(int(headers.get("content-length", 0)))
        self.close()
        return Answer(status, headers, body)

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def busy(scheduler: Scheduler, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[None]:
    """Keep the only lane of a scheduler busy inside of the block: a client's callback does not come back."""
    held, release = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        held.set()
        release.wait()

    future = scheduler.submit(inputs, budget_s=float("inf"))
    future.add_done_callback(hold)
    assert held.wait(30)
    try:
        yield
    finally:
        release.set()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something has come to be."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "it never came to be"
        threading.Event().wait(0.002)
