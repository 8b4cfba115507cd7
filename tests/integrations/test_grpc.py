"""gRPC services of the user's own: the call's deadline, statuses and cancellation, on both kinds of servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from sponge.core.events import Arrived
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.deadlines import DeadlineRule
from sponge.integrations.grpc import infer, infer_blocking
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.grpc_servers import KINDS, grpc_serving
from tests.integrations.servers import busy, until
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)
ROW = np.arange(4, dtype=np.float32)[None]


class Doubler:
    """A service whose one method takes and gives the bytes of a row."""

    def __init__(self, stack: ExitStack, kind: str, latency: LatencyModel, **settings: Any) -> None:
        self.arrived: list[Arrived] = []
        session = stack.enter_context(ElasticSession(models.identity(), max_threads=1))
        self.scheduler = Scheduler(
            session,
            Solver(latency, max_cores=1, max_batch_size=1),
            settings=Settings(**settings),
            recorder=lambda now, event, actions: self.arrived.append(event) if isinstance(event, Arrived) else None,
        )
        stack.callback(self.scheduler.close, drain=False)
        handler = grpc.unary_unary_rpc_method_handler(self._asyncio if kind == "asyncio" else self._blocking)
        service = grpc.method_handlers_generic_handler("test.Doubler", {"Run": handler})
        address = stack.enter_context(
            grpc_serving(kind, lambda server: server.add_generic_rpc_handlers((service,)), max_workers=8)
        )
        self.call = stack.enter_context(grpc.insecure_channel(address)).unary_unary("/test.Doubler/Run")

    rule = DeadlineRule(slo_s=30.0)

    def _blocking(self, request: bytes, context: Any) -> bytes:
        x = np.frombuffer(request, np.float32)[None]
        return infer_blocking(context, self.scheduler, {"x": x}, rule=self.rule)[0].tobytes()

    async def _asyncio(self, request: bytes, context: Any) -> bytes:
        x = np.frombuffer(request, np.float32)[None]
        return (await infer(context, self.scheduler, {"x": x}, rule=self.rule))[0].tobytes()


@pytest.fixture(params=KINDS)
def doubler(request: pytest.FixtureRequest) -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda latency=FAST, **settings: Doubler(stack, request.param, latency, **settings)


def test_the_tightest_deadline_counts(doubler: Any) -> None:
    """Of the call, of its metadata and of the service."""
    service = doubler()
    for timeout_s, metadata, most in (
        (None, None, 30.0),
        (9.0, None, 9.0),
        (90.0, None, 30.0),
        (90.0, (("request-timeout-ms", "5000"),), 5.0),
    ):
        assert service.call(ROW.tobytes(), timeout=timeout_s, metadata=metadata) == ROW.tobytes()
        request = service.arrived[-1].request
        assert 0 < request.deadline - request.arrived_at <= most + 0.05  # gRPC's deadline is on another clock
        assert request.deadline - request.arrived_at > most - 4  # and no other source was taken


def test_statuses(doubler: Any) -> None:
    """What gRPC clients know how to handle: in time or not, too many, wrong, closed."""
    service = doubler(LatencyModel(1e-6, 0.0, 0.0, 0.9), max_queue=1)

    def refused(data: bytes, **arguments: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            service.call(data, **arguments)
        return caught.value.code(), caught.value.details()

    code, details = refused(ROW.tobytes(), timeout=0.5)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "cannot meet its deadline" in details
    code, details = refused(ROW.tobytes()[:8])
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "axis 1 of input 'x' must be 4" in details
    with busy(service.scheduler, {"x": ROW}):
        waiting = service.call.future(ROW.tobytes())
        until(lambda: service.scheduler.statistics().waiting == 1)
        code, _ = refused(ROW.tobytes())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert waiting.result(30) == ROW.tobytes()
    service.scheduler.close()
    code, _ = refused(ROW.tobytes())
    assert code is grpc.StatusCode.UNAVAILABLE


def test_cancelled_calls_leave_the_queue(doubler: Any) -> None:
    """And free the thread of the pool that waited for them."""
    service = doubler()
    with busy(service.scheduler, {"x": ROW}):
        leaving = [service.call.future(ROW.tobytes()) for _ in range(3)]
        until(lambda: service.scheduler.statistics().waiting == 3)
        for call in leaving:
            call.cancel()
        until(lambda: service.scheduler.statistics().cancelled == 3)
        assert service.scheduler.statistics().waiting == 0
    assert service.call(ROW.tobytes()) == ROW.tobytes()
