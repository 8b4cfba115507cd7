"""The client over HTTP/1.1, kept-alive connections, as thin as asyncio allows: bytes in, bytes out.

A connection of its own for each request in flight: nobody waits behind another in the client.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket

from replay import FAILED, OK, REJECTED, obey, stem_of

ONE = json.loads(os.environ["RACE_CONTENDER"])
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
KSERVE_JSON = re.compile(rb"(?i)\r\ninference-header-content-length: *(\d+)")
BUFFER_BYTES = 1 << 20
TURNED_AWAY = {408, 429, 503, 504}


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport):
        self._transport = transport
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[tuple[int, bytes, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines([head, body])
        return self._answer

    def data_received(self, data):
        self._received += data
        if (parsed := _parse(self._received)) is not None:
            self._received = bytearray()
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(parsed)

    def connection_lost(self, error):
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed by the server"))

    @property
    def open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()


def _parse(received: bytearray) -> tuple[int, bytes, bytes] | None:
    """Return status, head and body once they are there."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end])
    length = LENGTH.search(head)
    if length is not None:
        whole = end + 4 + int(length[1])
        return None if len(received) < whole else (int(head[9:12]), head, bytes(received[end + 4 : whole]))
    if not received.endswith(b"0\r\n\r\n"):
        return None
    return int(head[9:12]), head, _unchunked(bytes(received[end + 4 :]))


def _unchunked(chunks: bytes) -> bytes:
    whole, at = bytearray(), 0
    while size := int(chunks[at : (line := chunks.index(b"\r\n", at))].split(b";")[0], 16):
        whole += chunks[line + 2 : line + 2 + size]
        at = line + size + 4
    return bytes(whole)


class Client:
    """Kept connections, the last used first."""

    def __init__(self) -> None:
        self._idle: list[Connection] = []
        self._request = _kserve if ONE["protocol"] == "kserve" else _plain

    async def send(self, body: bytes, left_s: float) -> tuple[str, bytes]:
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            connection = connection if connection.open else None
        if connection is None:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, "127.0.0.1", ONE["port"])
        try:
            status, head, answer = await connection.ask(self._request(body, left_s), body)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if status == 200:
            skip = KSERVE_JSON.search(head)
            return OK, answer[int(skip[1]) :] if skip else answer
        return (REJECTED if status in TURNED_AWAY or _timed_out(answer) else FAILED), answer


def _timed_out(answer: bytes) -> bool:
    return b"imeout" in answer[:200] or b"timed out" in answer[:200]


def _plain(body: bytes, left_s: float) -> bytes:
    return (
        "POST /infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
        f"X-Request-Timeout-Seconds: {max(left_s, 0.0):.6f}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()


def _kserve(body: bytes, left_s: float) -> bytes:
    """The Open Inference Protocol with binary tensors, as Triton speaks it."""
    parameters: dict[str, int | bool] = {"binary_data_output": True}
    if ONE.get("policy") == "timeouts":
        parameters["timeout"] = max(1, round((left_s - ONE["service_s"]) * 1e6))
    if ONE.get("policy") == "priorities":
        parameters["priority"] = 1 + sum(left_s > border_s for border_s in ONE["classes_s"])
    described = {"name": "picture", "datatype": "UINT8", "shape": [1, *ONE["shape"]]}
    header = json.dumps(
        {"parameters": parameters, "inputs": [described | {"parameters": {"binary_data_size": len(body)}}]}
    )
    return (
        "POST /v2/models/detector/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(body)}\r\n\r\n{header}"
    ).encode()


if __name__ == "__main__":
    asyncio.run(obey(Client().send, stem_of(ONE["model"])))
