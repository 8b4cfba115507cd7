"""Contenders that are called in the service's own process: the client is the event loop of that service.

``bare``: `session.run` on a pool of so many threads, first come first served. ``batched``: the package, asyncio form.
``sponge``: `Scheduler.infer`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from contender import ONE, Model, picture
from replay import FAILED, OK, REJECTED, Send, obey, stem_of


@contextlib.asynccontextmanager
async def bare() -> AsyncIterator[Send]:
    model = Model()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(ONE["workers"]) as pool:

        async def send(body: bytes, left_s: float) -> tuple[str, bytes]:
            try:
                return OK, (await loop.run_in_executor(pool, model.run_bytes, [body]))[0]
            except Exception:
                return FAILED, b""

        yield send


@contextlib.asynccontextmanager
async def batched() -> AsyncIterator[Send]:
    import batched

    model = Model()
    run = batched.aio.dynamically(model.run_bytes, batch_size=ONE["batch"], timeout_ms=ONE["window_ms"])

    async def send(body: bytes, left_s: float) -> tuple[str, bytes]:
        try:
            return OK, await run(body)
        except Exception:
            return FAILED, b""

    yield send


@contextlib.asynccontextmanager
async def sponge() -> AsyncIterator[Send]:
    import sponge

    with sponge.wrap(
        ONE["model"],
        max_cores=ONE["cores"],
        max_batch_size=ONE["batch"],
        shapes={"picture": ONE["shape"]},
        cache_dir=ONE["cache"],
    ) as scheduler:

        async def send(body: bytes, left_s: float) -> tuple[str, bytes]:
            try:
                answer, *_ = await scheduler.infer({"picture": picture(body)[None]}, budget_s=left_s)
            except (sponge.DeadlineExceeded, sponge.QueueFull):
                return REJECTED, b""
            except sponge.ModelError:
                return FAILED, b""
            return OK, answer.tobytes()

        yield send


async def main() -> None:
    async with {"bare": bare, "batched": batched, "sponge": sponge}[ONE["kind"]]() as send:
        await obey(send, stem_of(ONE["model"]))


if __name__ == "__main__":
    asyncio.run(main())
