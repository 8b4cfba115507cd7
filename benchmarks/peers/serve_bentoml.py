"""BentoML: an ASGI route for raw bytes in front of a service with adaptive batching, in processes of their own."""

from __future__ import annotations

import os
import sys

import bentoml
import numpy as np
from bentoml.exceptions import BentoMLException
from contender import ONE, Model, picture
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INSIDE = {"traffic": {"timeout": 60, "max_concurrency": 4096}, "logging": {"access": {"enabled": False}}}

BATCHING = {"batchable": True, "max_batch_size": ONE["batch"], "max_latency_ms": ONE["slo_ms"]}
if ONE["batch"] == 1:  # it refuses batches of one
    BATCHING = {}


@bentoml.service(workers=ONE["workers"], **INSIDE)
class Detector:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(**BATCHING)
    def detect(self, pictures: np.ndarray) -> np.ndarray:
        return self.model.run(np.ascontiguousarray(pictures))


async def infer(request: Request) -> Response:
    front = bentoml.get_current_service()
    try:
        answers = await front.detector.to_async.detect(pictures=picture(await request.body())[None])
    except BentoMLException as error:
        return Response(str(error), status_code=int(error.error_code))
    return Response(answers.tobytes(), media_type="application/octet-stream")


app = Starlette(routes=[Route("/infer", infer, methods=["POST"])])


@bentoml.asgi_app(app)
@bentoml.service(workers=1, http={"host": "127.0.0.1", "port": ONE["port"]}, **INSIDE)
class Front:
    detector = bentoml.depends(Detector)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    serve = [sys.executable, "-m", "bentoml", "serve", "serve_bentoml:Front", "--working-dir", here]
    os.execv(serve[0], [*serve, "--host", "127.0.0.1", "--port", str(ONE["port"])])
