"""A photo service in FastAPI, and phones that upload to it over 4G.

Covers: `DeadlineMiddleware`, `DeadlineRule`, `infer` of `sponge.integrations.asgi`; `sponge.workload.lte_like`.
Scenario: photos come over links that are never equally fast, and every phone wants its answer ten seconds after the
button was pressed. The service asks nobody how fast the link was: the middleware measures how long the body took to
arrive behind its head, and the scheduler is told what that has left. One phone says by a header that it waits for 0.3 s
only, over a link that needs longer: it is told at once that it is too late, and the model does not run for it.

Needs: pip install "sponge-serving[demo,asgi]" fastapi
What was measured is printed to stderr, since it differs from run to run; what is certain, to stdout.
"""

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import uvicorn
from fastapi import FastAPI, Request

import sponge
from sponge.commands.detector import detector_path, pages
from sponge.deadlines import DeadlineRule
from sponge.integrations.asgi import DeadlineMiddleware, arrival_of, infer
from sponge.workload import lte_like

SEED = 7
PHONES = 10
SLO_S = 10.0
RTT_S = 0.06
"""Round trip of a 4G link, allowed for on the answer's way [s]."""
NEAR_BYTES_PER_S, FAR_BYTES_PER_S = 2e6, 1.5e5
"""Uplinks in the middle and at the edge of a cell: a photo takes some 0.15 s and 2 s."""


def service(scheduler: sponge.Scheduler) -> FastAPI:
    """Return the application; this is all that a service needs."""
    app = FastAPI()
    app.add_middleware(DeadlineMiddleware, rule=DeadlineRule(slo_s=SLO_S, rtt_s=RTT_S))

    @app.post("/photo")
    async def photo(request: Request) -> dict[str, float | None]:
        pixels = np.frombuffer(await request.body(), np.uint8).reshape(1, 320, 320, 3)
        left_s = arrival_of(request).budget_s
        x = ((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).astype(np.float32)
        (probability,) = await infer(request, scheduler, {"x": x})
        return {"text_share": float((probability > 0.3).mean()), "budget_s": left_s}

    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """Run uvicorn in a thread; your service is started as ever: ``uvicorn photos:app``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@attrs.frozen
class Phone:
    """Uploads one photo over a link of its own, piece by piece as the link lets it."""

    port: int
    photo: bytes
    seed: int
    mean_bytes_per_s: float
    timeout_s: float | None = None

    def upload(self) -> tuple[int, float, float, dict[str, Any]]:
        """Return status, seconds of upload and of response, and what the service answered."""
        link = lte_like(30.0, np.random.default_rng(self.seed), mean_bytes_per_s=self.mean_bytes_per_s)
        pieces = [self.photo[start : start + 16384] for start in range(0, len(self.photo), 16384)]
        sent_bytes = np.cumsum([len(piece) for piece in pieces])
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        pressed_at = time.monotonic()
        connection.putrequest("POST", "/photo")
        connection.putheader("Content-Length", str(len(self.photo)))
        if self.timeout_s is not None:
            connection.putheader("X-Request-Timeout-Seconds", str(self.timeout_s))
        connection.endheaders()
        for piece, arrives_s in zip(pieces, link.upload_time_s(0.0, sent_bytes), strict=True):
            time.sleep(max(0.0, pressed_at + arrives_s - time.monotonic()))
            connection.send(piece)
        upload_s = time.monotonic() - pressed_at
        answer = connection.getresponse()
        said = json.loads(answer.read())
        connection.close()
        return answer.status, upload_s, time.monotonic() - pressed_at, said


def main() -> None:
    pages_rgb = [((page[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8).tobytes() for page in photos()]
    with sponge.wrap(detector_path(), shapes={"x": (3, 320, 320)}, max_cores=1, profile_budget_s=5.0) as scheduler:
        with serving(service(scheduler)) as port, ThreadPoolExecutor(PHONES + 1) as pool:
            near = [Phone(port, photo, seed, NEAR_BYTES_PER_S) for seed, photo in enumerate(pages_rgb[: PHONES // 2])]
            far = [Phone(port, photo, seed, FAR_BYTES_PER_S) for seed, photo in enumerate(pages_rgb[PHONES // 2 :])]
            hurried = pool.submit(Phone(port, pages_rgb[0], 0, FAR_BYTES_PER_S, timeout_s=0.3).upload)
            answers = list(pool.map(Phone.upload, near + far))
            status, _, _, problem = hurried.result()
        ran = scheduler.statistics().met

    for _, upload_s, response_s, said in answers:
        left = f"upload {upload_s:.2f} s, then {said['budget_s']:.2f} s left, answered after {response_s:.2f} s"
        print(left, file=sys.stderr)
    in_time = sum(status == 200 and response_s <= SLO_S for status, _, response_s, _ in answers)
    left_s = [said["budget_s"] for _, _, _, said in answers]
    print(f"{in_time} of {PHONES} photos answered within {SLO_S:g} s of the button")
    less = max(left_s[PHONES // 2 :]) < min(left_s[: PHONES // 2])
    print(f"each photo from the edge of the cell had less time left than any from its middle: {less}")
    print(f"the phone that waits 0.3 s got {status}: {problem['title']}")
    print(f"the model ran for {ran} photos")


def photos() -> list[np.ndarray]:
    """Return a page for each phone."""
    return pages(PHONES, np.random.default_rng(SEED))


if __name__ == "__main__":
    main()
