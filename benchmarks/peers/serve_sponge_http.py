"""sponge behind uvicorn: a plain ASGI application in the middleware that finds deadlines and tells how requests end."""

from __future__ import annotations

from typing import Any

import uvicorn
from contender import ONE, picture

import sponge
from sponge.integrations.asgi import DeadlineMiddleware, infer, send_bytes


async def answer(scope: Any, receive: Any, send: Any) -> None:
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    answers, *_ = await infer(scope, scheduler, {"picture": picture(b"".join(chunks))[None]})
    await send_bytes(send, 200, answers.tobytes(), kind="application/octet-stream")


if __name__ == "__main__":
    with sponge.wrap(
        ONE["model"],
        max_cores=ONE["cores"],
        max_batch_size=ONE["batch"],
        shapes={"picture": ONE["shape"]},
        cache_dir=ONE["cache"],
    ) as scheduler:
        app = DeadlineMiddleware(answer)
        uvicorn.run(app, host="127.0.0.1", port=ONE["port"], log_level="warning", access_log=False, lifespan="off")
