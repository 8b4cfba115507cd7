"""Streams of requests over gRPC: Triton's own clients, unchanged, on both kinds of servers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2_grpc

from sponge.core.solver import Solver
from sponge.deadlines import DeadlineRule
from sponge.integrations.oip.service import add_inference_service
from sponge.integrations.oip.streams import MAX_STREAMS
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.grpc_servers import KINDS, grpc_serving
from tests.integrations.servers import busy, until
from tests.integrations.test_oip_grpc import FAST, ROW, Served, message, served, tensor
from tests.live import models

__all__ = ["served"]

TWO_ROWS = np.zeros((2, 4), dtype=np.float32)
"""A whole batch of the server's: it shares none."""


class Stream:
    """A stream of Triton's client and what came back by it, in this order."""

    def __init__(self, client: Any, **arguments: Any) -> None:
        self._client = client
        self._came: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        client.start_stream(lambda result, error: self._came.put((result, error)), **arguments)

    def ask(self, array: np.ndarray[Any, Any] = ROW, id: str = "", *, name: str = "x", **arguments: Any) -> None:
        model = arguments.pop("model", "model")
        self._client.async_stream_infer(model, [tensor(array, name)], request_id=id, **arguments)

    def answer(self) -> Any:
        result, error = self._came.get(timeout=30)
        assert error is None, error
        return result

    def error(self) -> str:
        result, error = self._came.get(timeout=30)
        assert result is None
        return str(error)

    def end(self, *, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)


@contextmanager
def raw_stream(served: Served) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """A stream as Triton's stubs make it: what sends a message (None: no more), and the call."""
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = served.stub.ModelStreamInfer(iter(sent.get, None))
    try:
        yield sent.put, call
    finally:
        sent.put(None)
        call.cancel()


@pytest.mark.parametrize("algorithm", [None, "gzip"])
def test_every_request_of_a_stream_is_answered(served: Served, algorithm: str | None) -> None:
    """Once each, marked as final, until the client's end; and another stream can follow."""
    served.start(models.identity(), slo_s=60.0)
    for count in (100, 0, 1):
        stream = Stream(served.client, compression_algorithm=algorithm)
        for i in range(count):
            stream.ask(ROW + i, str(i))
        stream.end()
        answers = {}
        for _ in range(count):
            result = stream.answer()
            assert result.get_response().parameters["triton_final_response"].bool_param
            answers[result.get_response().id] = result.as_numpy("y").tolist()
        assert answers == {str(i): (ROW + i).tolist() for i in range(count)}
        assert stream._came.empty()
    assert served.scheduler.statistics().met == 101


def test_the_tighter_deadline_is_answered_first(served: Served) -> None:
    """Each request has its own: who came later overtakes; ids tell the answers apart."""
    served.start(models.identity())
    stream = Stream(served.client)
    with busy(served.scheduler, {"x": ROW}):
        for id, timeout_s in (("patient", 200), ("hasty", 50), ("between", 100)):
            stream.ask(TWO_ROWS, id, timeout=timeout_s * 1_000_000)
        until(lambda: served.scheduler.statistics().waiting == 3)
    assert [stream.answer().get_response().id for _ in range(3)] == ["hasty", "between", "patient"]
    stream.end()


def test_deadlines_within_a_stream(served: Served) -> None:
    """A request's own timeout within the rule, from when it was read; the stream's end bounds all."""
    served.start(models.identity(), rule=DeadlineRule(slo_s=20.0, max_slo_s=200.0))
    stream = Stream(served.client)
    for timeout_s, most in ((3, 3.0), (90, 20.0), (None, 20.0)):
        stream.ask(timeout=None if timeout_s is None else timeout_s * 1_000_000)
        stream.answer()
        assert 0 < served.budgets_s[-1] <= most
    assert max(served.budgets_s) > 3.0
    stream.end()
    bounded = Stream(served.client, stream_timeout=9.0)
    bounded.ask()
    bounded.answer()
    assert served.budgets_s[-1] <= 9.05  # gRPC keeps its deadline on another clock
    bounded.end()


def test_an_error_is_its_request_s_alone(served: Served) -> None:
    """Told by code, id and reason; requests before and after it are served on the same stream."""
    served.start(models.lookup(), slo_s=60.0)
    stream = Stream(served.client)

    def good() -> None:
        stream.ask(np.array([3]), "good", name="i")
        assert stream.answer().as_numpy("y") == [30.0]

    good()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"array": np.array([999]), "id": "poison"}, "[request id: poison] INTERNAL: the model failed"),
        ({"array": np.array([3]), "model": "other"}, "NOT_FOUND: no model 'other'"),
        ({"array": np.array([3]), "model_version": "9"}, "NOT_FOUND: no model 'model' of version '9'"),
        ({"array": ROW, "id": "wrong"}, "[request id: wrong] INVALID_ARGUMENT: "),
        (
            {"array": np.array([3]), "sequence_id": 7, "id": "7"},
            "[request id: 7] INVALID_ARGUMENT: parameter 'sequence_id'",
        ),
    ]
    for arguments, text in cases:
        stream.ask(name="i", **arguments)
        assert stream.error().startswith(text), text
        good()
    with busy(served.scheduler, {"i": np.array([1])}):
        stream.ask(np.array([3]), "late", name="i", timeout=1000)
        assert stream.error().startswith("[request id: late] DEADLINE_EXCEEDED: ")
    good()
    served.scheduler.close()
    stream.ask(np.array([3]), name="i")
    assert stream.error().startswith("UNAVAILABLE: the scheduler is closed")
    stream.end()
    assert served.client.is_server_live()


def test_an_error_names_its_request(served: Served) -> None:
    """Also for clients that read the message: its answer is empty but for id and model."""
    served.start(models.identity(), slo_s=60.0)
    with raw_stream(served) as (send, call):
        send(message(id="seven", model_version="9"))
        answer = next(call)
        assert answer.error_message
        assert (answer.infer_response.id, answer.infer_response.model_name) == ("seven", "model")
        assert not answer.infer_response.outputs


@pytest.mark.parametrize("how", ["cancel", "hang up", "time out"])
def test_a_client_that_goes_away_cancels(served: Served, how: str) -> None:
    """What waits leaves the queue, also what was sent when the rest had left; a neighbour is served."""
    served.start(models.identity(), slo_s=60.0, late="serve")
    with busy(served.scheduler, {"x": ROW}), ExitStack() as stack:
        client = stack.enter_context(triton.InferenceServerClient(served.address))
        stream = Stream(client, stream_timeout=2.0 if how == "time out" else None)
        for _ in range(5):
            stream.ask()
        staying = served.stub.ModelInfer.future(message())
        until(lambda: served.scheduler.statistics().waiting == 6)
        if how == "cancel":
            stream.end(cancel=True)
        elif how == "hang up":
            client._channel.close()
        until(lambda: served.scheduler.statistics().cancelled == 5)
        assert served.scheduler.statistics().waiting == 1
        stream.end(cancel=True)
    assert staying.result(30).raw_output_contents


def test_requests_in_flight_are_bounded(served: Served) -> None:
    """The queue takes three, and so many may be in flight: none of fifty is turned away."""
    served.start(models.identity(), slo_s=60.0, max_queue=3, max_in_flight=3)
    stream = Stream(served.client)
    with busy(served.scheduler, {"x": ROW}):
        for i in range(50):
            stream.ask(ROW + i, str(i))
        until(lambda: served.scheduler.statistics().waiting == 3)
        assert all(served.client.is_server_live() for _ in range(20))
        assert served.scheduler.statistics().submitted == 4
    stream.end()
    assert {stream.answer().get_response().id for _ in range(50)} == {str(i) for i in range(50)}


def test_clients_that_do_not_read_hold_up_themselves_alone(served: Served) -> None:
    """Their answers fill what the network takes; others are served meanwhile, and nothing is lost."""
    served.start(models.identity(columns=250_000), slo_s=60.0, max_in_flight=2, workers=1)
    row = np.zeros((1, 250_000), dtype=np.float32)
    with ExitStack() as stack:
        streams = [stack.enter_context(raw_stream(served)) for _ in range(3)]
        for send, _ in streams:
            for i in range(40):
                send(message(row, id=str(i)))
        until(lambda: served.scheduler.statistics().met >= 6)
        for _ in range(3):
            assert served.client.infer("model", [tensor(row)]).as_numpy("y") is not None
        for send, call in streams:
            send(None)
            assert sorted(int(answer.infer_response.id) for answer in call) == list(range(40))


def test_a_client_may_leave_in_the_middle_of_an_answer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """It happens every day, on a phone in a tunnel: no line in a service's log."""
    served.start(models.identity(columns=250_000), slo_s=60.0, max_in_flight=4)
    row = np.zeros((1, 250_000), dtype=np.float32)
    for _ in range(10):
        before = served.scheduler.statistics().met
        with raw_stream(served) as (send, call):
            for _ in range(40):
                send(message(row))
            until(lambda least=before + 4: served.scheduler.statistics().met > least)
            next(call)
        assert served.client.is_server_live()
    until(lambda: served.scheduler.statistics().waiting == 0)
    assert served.client.infer("model", [tensor(row)]).as_numpy("y") is not None
    assert caplog.records == []


def test_open_streams_hold_no_thread_of_the_pool(served: Served) -> None:
    """A pool of one serves calls beside them, and each of them."""
    served.start(models.identity(), slo_s=60.0, workers=1)
    with ExitStack() as stack:
        streams = [stack.enter_context(raw_stream(served)) for _ in range(5)]
        for send, call in streams:
            send(message())
            assert next(call).infer_response.outputs
        assert served.client.infer("model", [tensor(ROW)]).as_numpy("y") is not None
        for send, call in reversed(streams):
            send(message(id="again"))
            assert next(call).infer_response.id == "again"


@pytest.mark.parametrize("served", ["blocking"], indirect=True)
def test_streams_of_a_blocking_server_are_limited(served: Served) -> None:
    """Each has threads: one too many is refused until another has ended; all threads end with their streams."""
    served.start(models.identity(), slo_s=60.0)

    def threads() -> int:
        return sum(thread.name.startswith("sponge-grpc-") for thread in threading.enumerate())

    def accepted() -> bool:
        with raw_stream(served) as (send, call):
            send(message())
            try:
                return bool(next(call).infer_response.outputs)
            except grpc.RpcError:
                refusals.append((call.code(), call.details()))
                return False

    refusals: list[tuple[grpc.StatusCode, str]] = []
    before = threads()
    with ExitStack() as stack:
        for _ in range(MAX_STREAMS):
            send, call = stack.enter_context(raw_stream(served))
            send(message())
            assert next(call).infer_response.outputs
        assert not accepted()
        [(code, details)] = refusals
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "64 streams are open" in details
        send(None)
        assert list(call) == []
        until(accepted)
    until(accepted)
    until(lambda: threads() <= before)


def test_the_asyncio_client(served: Served) -> None:
    """Its streams are iterators; and the task that reads one may be cancelled."""
    served.start(models.identity(), slo_s=60.0)

    async def requests(count: int) -> AsyncIterator[dict[str, Any]]:
        for i in range(count):
            yield {"model_name": "model", "inputs": [tensor(ROW + i, module=triton_aio)], "request_id": str(i)}

    async def forever() -> AsyncIterator[dict[str, Any]]:
        async for request in requests(4):
            yield request
        await asyncio.Event().wait()

    async def run() -> None:
        async with triton_aio.InferenceServerClient(served.address) as client:
            answers = {}
            async for result, error in client.stream_infer(requests(40)):
                assert error is None
                answers[result.get_response().id] = result.as_numpy("y")[0, 0]
            assert answers == {str(i): i for i in range(40)}
            with busy(served.scheduler, {"x": ROW}):
                stream = client.stream_infer(forever())
                reading = asyncio.ensure_future(stream.__anext__())
                await asyncio.to_thread(until, lambda: served.scheduler.statistics().waiting == 4)
                stream.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await asyncio.to_thread(until, lambda: served.scheduler.statistics().cancelled == 4)

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_answers_what_waits(kind: str) -> None:
    """With a grace period the requests of a stream that was ended are served before the server ends."""
    with ExitStack() as stack:
        session = stack.enter_context(ElasticSession(models.identity(), max_threads=1))
        scheduler = Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=2), slo_s=60.0)
        stack.callback(scheduler.close)
        with ExitStack() as serving:
            address = serving.enter_context(
                grpc_serving(kind, lambda server: add_inference_service(server, {"model": scheduler}), grace_s=30.0)
            )
            channel = stack.enter_context(grpc.insecure_channel(address))
            with busy(scheduler, {"x": ROW}):
                call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message()] * 5))
                until(lambda: scheduler.statistics().waiting == 5)
                stopping = threading.Thread(target=serving.close)
                stopping.start()
            answers = list(call)
            stopping.join()
        assert len(answers) == 5
        assert all(answer.infer_response.raw_output_contents for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_is_none_ends_its_stream(kind: str) -> None:
    """Bytes that are no message: nobody could be answered. What waits leaves the queue, and the server lives on."""
    with ExitStack() as stack:
        served = Served(stack, kind).start(models.identity(), slo_s=60.0)
        path = "/inference.GRPCInferenceService/ModelStreamInfer"
        with busy(served.scheduler, {"x": ROW}):
            sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            call = served.channel.stream_stream(path)(iter(sent.get, None))
            sent.put(message().SerializeToString())
            until(lambda: served.scheduler.statistics().waiting == 1)
            sent.put(b"\xff\xff\xff")
            with pytest.raises(grpc.RpcError):
                next(call)
            until(lambda: served.scheduler.statistics().cancelled == 1)
            sent.put(None)
        assert served.client.infer("model", [tensor(ROW)]).as_numpy("y") is not None


def test_the_bound_must_be_positive() -> None:
    """A stream of which nothing is read would wait for ever."""
    with pytest.raises(ValueError, match="max_in_flight must be at least 1, got 0"):
        add_inference_service(None, {}, max_in_flight=0)
