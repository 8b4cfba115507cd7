"""The middleware and its helper under a real uvicorn, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request

import sponge
from sponge.core.events import Arrived
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.deadlines import DeadlineRule
from sponge.integrations.asgi import DeadlineMiddleware, arrival_of, infer
from sponge.integrations.outcomes import ClientGone
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.servers import RawClient, busy, serving, until
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)
SLOW = LatencyModel(1e-6, 0.0, 0.0, 0.9)
"""Every batch is said to take 0.9 s."""
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Service:
    """A scheduler of one lane whose requests are recorded, and a FastAPI application in front of it."""

    def __init__(self, model: bytes, latency: LatencyModel = FAST, *, rule: DeadlineRule, **settings: Any) -> None:
        self.arrived: list[Arrived] = []
        self.session = ElasticSession(model, max_threads=1)
        self.scheduler = Scheduler(
            self.session,
            Solver(latency, max_cores=1, max_batch_size=1),
            settings=Settings(**settings),
            recorder=lambda now, event, actions: self.arrived.append(event) if isinstance(event, Arrived) else None,
        )
        self.app = FastAPI()
        self.app.add_middleware(DeadlineMiddleware, rule=rule)
        self.app.post("/double")(self.double)
        self.app.get("/wait")(self.wait)
        self.app.post("/wait")(self.wait)
        self.traceparents: list[str | None] = []

    async def double(self, request: Request) -> dict[str, Any]:
        self.traceparents.append(request.headers.get("traceparent"))
        body = await request.body()
        x = np.frombuffer(body, dtype=np.float32)[None]
        (y,) = await infer(request, self.scheduler, {"x": x})
        arrival = arrival_of(request)
        return {"y": y[0].tolist(), "upload_s": arrival.upload_s, "source": arrival.due.source}

    async def wait(self, request: Request) -> dict[str, Any]:
        await infer(request, self.scheduler, {"x": np.zeros((1, 4), dtype=np.float32)})
        return {}

    @property
    def budgets_s(self) -> list[float]:
        return [event.request.deadline - event.request.arrived_at for event in self.arrived]

    def close(self) -> None:
        self.scheduler.close(drain=False)
        self.session.close()


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Make a service and serve it; gives it and its port."""
    made: list[Any] = []

    def make(model: bytes, *arguments: Any, **options: Any) -> tuple[Service, int]:
        service = Service(model, *arguments, **options)
        context = serving(service.app)
        made.extend([context, service])
        return service, context.__enter__()

    yield make
    while made:
        made.pop().close()
        made.pop().__exit__(None, None, None)


ROW = {"x": np.zeros((1, 4), dtype=np.float32)}
BODY = np.arange(4, dtype=np.float32).tobytes()


def test_a_slow_upload_is_gone_from_the_budget(service: Any) -> None:
    """The body trickles in behind the head; the scheduler gets exactly what is left of the second, not a second.

    Both bounds are certain whatever the machine does: the client's clock readings enclose the server's.
    """
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=20.0, rtt_s=0.05))
    for pause_s in (0.0, 0.05, 0.2):
        before = time.monotonic()
        client = RawClient(port, "/double", length=len(BODY), expect="100-continue")
        client.wait_for_continue()
        head_seen = time.monotonic()
        for offset in range(0, len(BODY), 4):
            time.sleep(pause_s)  # this is the slow link
            last_sent = time.monotonic()
            client.send(BODY[offset : offset + 4])
        answer = client.answer()
        after = time.monotonic()
        assert answer.status == 200, answer.body
        assert answer.json()["y"] == [0.0, 1.0, 2.0, 3.0]
        assert last_sent - head_seen <= answer.json()["upload_s"] <= after - before
        assert 19.95 - (after - before) <= fixture.budgets_s[-1] <= 19.95 - (last_sent - head_seen)


def test_an_upload_that_used_the_second_up_is_told_so(service: Any) -> None:
    """504, and the model was not run for it."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=0.05))
    client = RawClient(port, "/double", length=len(BODY), expect="100-continue")
    client.wait_for_continue()
    time.sleep(0.06)  # the link stalls for longer than the SLO
    client.send(BODY)
    answer = client.answer()
    assert answer.status == 504
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["title"] == "Deadline cannot be met"
    assert fixture.scheduler.statistics().batches == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-request-timeout-seconds", "9.5"),
        ("request-timeout-ms", "9500"),
        ("x-envoy-expected-rq-timeout-ms", "9500"),
        ("connect-timeout-ms", "9500"),
        ("grpc-timeout", "9500m"),
        ("x-request-deadline", None),
    ],
)
def test_headers_reach_the_scheduler(service: Any, name: str, value: str | None) -> None:
    """Each form over the wire; traceparent arrives as it was sent."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=30.0))
    value = value or f"{time.time() + 9.5:.6f}"
    before = time.monotonic()
    client = RawClient(port, "/double", length=len(BODY), traceparent=TRACEPARENT, **{name: value})
    client.send(BODY)
    answer = client.answer()
    assert answer.json()["source"] == name
    assert 9.5 - (time.monotonic() - before) - 0.01 <= fixture.budgets_s[0] <= 9.5 + 0.01  # two clocks, for the last
    assert fixture.traceparents == [TRACEPARENT]


def test_nonsense_in_headers_leaves_the_slo(service: Any) -> None:
    """Raw bytes and all: the request is served by the service's own SLO."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=30.0))
    for value in ("nan", "-1", "\xff\xfe", "9" * 500, "1e9"):
        client = RawClient(port, "/double", length=len(BODY), request_timeout_ms=value, grpc_timeout=value)
        client.send(BODY)
        assert client.answer().json()["source"] == "slo"
    assert len(fixture.budgets_s) == 5


def test_a_client_that_hangs_up_cancels_its_request(service: Any) -> None:
    """One that waits is taken out of the queue; its neighbour is served."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=60.0))
    scheduler = fixture.scheduler
    with busy(scheduler, ROW):
        leaving = [RawClient(port, "/wait"), RawClient(port, "/wait", method="GET")]
        staying = RawClient(port, "/wait")
        until(lambda: scheduler.statistics().waiting == 3)
        for client in leaving:
            client.close()
        until(lambda: scheduler.statistics().cancelled == 2)
        assert scheduler.statistics().waiting == 1
    assert staying.answer().status == 200


def test_a_handler_that_waits_no_longer_cancels_its_request(service: Any) -> None:
    """Its own timeout is not mistaken for a client that is gone; and once gone, nothing more is queued for it."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=60.0))
    ends: list[str] = []

    @fixture.app.post("/impatient")
    async def impatient(request: Request) -> dict[str, bool]:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(infer(request, fixture.scheduler, ROW), 0.05)
        for _ in range(2):
            try:
                await infer(request, fixture.scheduler, ROW)
            except ClientGone:
                ends.append("gone")
        return {}

    with busy(fixture.scheduler, ROW):
        client = RawClient(port, "/impatient")
        until(lambda: fixture.scheduler.statistics().cancelled == 1)
        until(lambda: fixture.scheduler.statistics().waiting == 1)
        client.close()
        until(lambda: len(ends) == 2)
        until(lambda: fixture.scheduler.statistics().cancelled == 3)
        assert fixture.scheduler.statistics().waiting == 0


def test_overload_is_429_with_retry_after(service: Any) -> None:
    """Three may wait, each said to take 0.9 s: whoever comes next is told when to come back."""
    fixture, port = service(models.identity(), SLOW, rule=DeadlineRule(slo_s=60.0), max_queue=3)
    with busy(fixture.scheduler, ROW):
        waiting = [RawClient(port, "/wait") for _ in range(3)]
        until(lambda: fixture.scheduler.statistics().waiting == 3)
        refused = RawClient(port, "/wait").answer()
    assert refused.status == 429
    assert refused.headers["retry-after"] == "3"
    assert "3 requests (max_queue) are already waiting" in refused.json()["detail"]
    assert [client.answer().status for client in waiting] == [200, 200, 200]


def test_errors_have_their_statuses(service: Any) -> None:
    """What does not fit the model is the client's fault, what the model raises is not, and closing is temporary."""
    fixture, port = service(models.identity(), rule=DeadlineRule(slo_s=30.0))
    wrong = RawClient(port, "/double", length=8)
    wrong.send(BODY[:8])
    answer = wrong.answer()
    assert answer.status == 422
    assert "axis 1 of input 'x' must be 4" in answer.json()["detail"]
    fixture.scheduler.close()
    late = RawClient(port, "/double", length=len(BODY))
    late.send(BODY)
    assert late.answer().status == 503

    app = FastAPI()
    app.add_middleware(DeadlineMiddleware, rule=DeadlineRule(slo_s=30.0))
    session = ElasticSession(models.lookup(), max_threads=1)
    with Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=4)) as scheduler, session:

        @app.post("/look")
        async def look(request: Request, i: int) -> list[float]:
            (y,) = await infer(request, scheduler, {"i": np.array([i])})
            return [float(value) for value in y]

        with serving(app) as port:
            assert RawClient(port, "/look?i=7").answer().json() == [70.0]
            poisonous = RawClient(port, "/look?i=999").answer()
            assert poisonous.status == 500
            assert poisonous.json()["title"] == "The model failed on this request"


def test_the_body_is_still_the_applications() -> None:
    """A service that asks the model before it has read the body finds the body complete afterwards."""
    received: list[bytes] = []
    session = ElasticSession(models.identity(), max_threads=1)
    with Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=1)) as scheduler, session:
        app = FastAPI()
        app.add_middleware(DeadlineMiddleware, rule=DeadlineRule(slo_s=30.0))

        @app.post("/")
        async def handler(request: Request) -> dict[str, bool]:
            x = np.zeros((1, 4), dtype=np.float32)
            await asyncio.gather(*(infer(request, scheduler, {"x": x}) for _ in range(8)))
            received.append(await request.body())
            await infer(request, scheduler, {"x": x})
            return {"gone": arrival_of(request).gone}

        with serving(app) as port:
            data = bytes(range(256)) * 4096  # a megabyte, in many messages
            client = RawClient(port, "/", length=len(data))
            client.send(data)
            assert client.answer().json() == {"gone": False}
    assert received == [data]


def test_without_the_middleware_it_says_what_is_missing() -> None:
    """A deadline that was never measured must not silently become none."""
    with pytest.raises(RuntimeError, match="add_middleware"):
        arrival_of({"type": "http"})


def test_no_deadline_at_all_is_refused(service: Any) -> None:
    """Neither the client nor the service says by when: the answer names what to give."""
    _, port = service(models.identity(), rule=DeadlineRule())
    client = RawClient(port, "/double", length=len(BODY))
    client.send(BODY)
    answer = client.answer()
    assert answer.status == 422
    assert "budget_s or deadline must be given" in answer.json()["detail"]
    assert sponge.SpongeError  # the base of all that the middleware answers for
