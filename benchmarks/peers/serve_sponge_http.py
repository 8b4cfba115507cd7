"""sponge behind uvicorn, as its documentation says: the middleware finds the deadline and tells how requests end."""

from __future__ import annotations

import uvicorn
from contender import ONE, picture
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import sponge
from sponge.integrations.asgi import DeadlineMiddleware, infer


async def answer(request: Request) -> Response:
    answers, *_ = await infer(request, scheduler, {"picture": picture(await request.body())[None]})
    return Response(answers.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    app = Starlette(routes=[Route("/infer", answer, methods=["POST"])])
    app.add_middleware(DeadlineMiddleware)
    with sponge.wrap(
        ONE["model"],
        max_cores=ONE["cores"],
        max_batch_size=ONE["batch"],
        shapes={"picture": ONE["shape"]},
        cache_dir=ONE["cache"],
    ) as scheduler:
        uvicorn.run(app, host="127.0.0.1", port=ONE["port"], log_level="warning", access_log=False)
