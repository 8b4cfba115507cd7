"""Real gRPC servers of both kinds on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

KINDS = ("blocking", "asyncio")


@contextmanager
def grpc_serving(
    kind: str, register: Callable[[Any], None], *, max_workers: int = 4, grace_s: float | None = None, **options: Any
) -> Iterator[str]:
    """Serve what *register* adds to a server; gives its address."""
    if kind == "blocking":
        pool = ThreadPoolExecutor(max_workers)
        server = grpc.server(pool, **options)
        register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(grace_s).wait()
            pool.shutdown()
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(**options)
        register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace_s), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
