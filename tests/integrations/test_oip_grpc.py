"""Triton's own client, unchanged, against the gRPC service on both kinds of servers."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from onnx import TensorProto
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from sponge.core.events import Arrived
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.deadlines import DeadlineRule
from sponge.integrations.oip.service import SERVER_OPTIONS, add_inference_service
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.grpc_servers import KINDS, grpc_serving
from tests.integrations.servers import busy, until
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)
SLOW = LatencyModel(1e-6, 0.0, 0.0, 0.9)
ROW = np.arange(4, dtype=np.float32)[None]
PATH = "/inference.GRPCInferenceService/ModelInfer"


class Served:
    """One model, one lane, a server of either kind, and what the scheduler saw."""

    def __init__(self, stack: ExitStack, kind: str) -> None:
        self._stack = stack
        self._kind = kind
        self.arrived: list[Arrived] = []
        self.clock_reads: list[float] = []

    def start(self, model: bytes, latency: LatencyModel = FAST, *, workers: int = 4, **arguments: Any) -> Served:
        rule = arguments.pop("rule", None)
        slo_s = arguments.pop("slo_s", None)
        options = {name: arguments.pop(name) for name in ("max_in_flight",) if name in arguments}
        session = self._stack.enter_context(ElasticSession(model, max_threads=1))
        self.scheduler = Scheduler(
            session,
            Solver(latency, max_cores=1, max_batch_size=2),
            settings=Settings(**arguments),
            slo_s=slo_s,
            recorder=lambda now, event, actions: self.arrived.append(event) if isinstance(event, Arrived) else None,
        )
        self._stack.callback(self.scheduler.close, drain=False)
        self.address = self._stack.enter_context(
            grpc_serving(
                self._kind,
                lambda server: add_inference_service(
                    server, {"model": self.scheduler}, rule=rule, clock=self._clock, **options
                ),
                max_workers=workers,
                options=SERVER_OPTIONS,
            )
        )
        self.client = self._stack.enter_context(triton.InferenceServerClient(self.address))
        channel = grpc.insecure_channel(self.address, options=[("grpc.max_receive_message_length", -1)])
        self.channel = self._stack.enter_context(channel)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        return self

    def _clock(self) -> float:
        self.clock_reads.append(time.monotonic())
        return self.clock_reads[-1]

    @property
    def budgets_s(self) -> list[float]:
        return [event.request.deadline - event.request.arrived_at for event in self.arrived]


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack, request.param)


def tensor(array: np.ndarray[Any, Any], name: str = "x", module: Any = triton) -> Any:
    made = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def message(row: np.ndarray[Any, Any] = ROW, **changes: Any) -> Any:
    """A request as Triton's stubs send it."""
    request = service_pb2.ModelInferRequest(model_name="model", **changes)
    if not request.inputs:
        request.inputs.add(name="x", datatype="FP32", shape=row.shape)
        request.raw_input_contents.append(row.tobytes())
    return request


@pytest.mark.parametrize(
    ("onnx_type", "array"),
    [
        (TensorProto.BOOL, np.array([[True, False, True, True]])),
        *[
            (getattr(TensorProto, np.dtype(dtype).name.upper()), np.array([[1, 2, 3, 100]], dtype=dtype))
            for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
        ],
        (TensorProto.FLOAT16, np.array([[0.5, 1, -2, 60000]], dtype=np.float16)),
        (TensorProto.FLOAT, ROW),
        (TensorProto.DOUBLE, ROW.astype(np.float64)),
        (TensorProto.STRING, np.array([["a", "", "žluťoučký", "d"]], dtype=object)),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
@pytest.mark.parametrize("served", KINDS[:1], indirect=True)
def test_every_datatype_comes_back(served: Served, onnx_type: int, array: np.ndarray[Any, Any]) -> None:
    """Raw, by Triton's client; and as typed contents, where the protocol has a field for the type."""
    served.start(models.identity(dtype=onnx_type), slo_s=30.0)
    result = served.client.infer("model", [tensor(array)], request_id="seven")
    answer = result.as_numpy("y")
    if array.dtype == object:
        assert [[text.decode() for text in row] for row in answer.tolist()] == array.tolist()
    else:
        assert answer.dtype == array.dtype
        assert answer.tolist() == array.tolist()
    assert result.get_response().id == "seven"
    fields = {"b": "bool", "i": "int", "u": "uint", "f": "fp", "O": "bytes"}
    field = fields[array.dtype.kind]
    if array.dtype.kind == "f":
        field += str(8 * array.dtype.itemsize)
    elif array.dtype.itemsize == 8 and array.dtype.kind in "iu":
        field += "64"
    request = service_pb2.ModelInferRequest(model_name="model")
    made = request.inputs.add(name="x", datatype=tensor(array).datatype(), shape=array.shape)
    values = [value.encode() if isinstance(value, str) else value for value in array.reshape(-1).tolist()]
    if field == "fp16":
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "must be sent in raw_input_contents" in caught.value.details()
        return
    getattr(made.contents, f"{field}_contents").extend(values)
    typed = served.stub.ModelInfer(request)
    assert typed.raw_output_contents == result.get_response().raw_output_contents


def test_triton_client_learns_all_it_asks_for(served: Served) -> None:
    """Health, metadata, configuration and statistics; and that an unknown model is none."""
    served.start(models.several(), slo_s=30.0)
    client = served.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert not client.is_model_ready("model", "2")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "sponge"
    metadata = client.get_model_metadata("model", as_json=True)
    assert metadata["inputs"][0] == {"name": "image", "datatype": "FP32", "shape": ["-1", "3", "-1", "-1"]}
    assert [output["name"] for output in metadata["outputs"]] == ["scaled", "mean", "tag_plus_one"]
    config = client.get_model_config("model", as_json=True)["config"]
    assert config["max_batch_size"] == 2
    assert config["input"][2] == {"name": "tag", "data_type": "TYPE_INT64"}
    with pytest.raises(InferenceServerException, match="no model 'other' is served here"):
        client.get_model_metadata("other")

    image, scale = np.ones((2, 3, 4, 4), dtype=np.float32), np.full((2, 1), 2, dtype=np.float32)
    inputs = [tensor(np.array([5, 6]), "tag"), tensor(image, "image"), tensor(scale, "scale")]
    wanted = [triton.InferRequestedOutput("tag_plus_one"), triton.InferRequestedOutput("scaled")]
    result = client.infer("model", inputs, model_version="1", outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["tag_plus_one", "scaled"]
    assert result.as_numpy("tag_plus_one").tolist() == [6, 7]
    assert (result.as_numpy("scaled") == 2).all()
    assert result.as_numpy("mean") is None
    statistics = client.get_inference_statistics("model").model_stats[0]
    assert (statistics.inference_count, statistics.execution_count) == (1, 1)
    assert statistics.inference_stats.success.count == 1
    served.scheduler.close()
    assert not client.is_server_ready()
    assert not client.is_model_ready("model")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("model", inputs)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"


def test_the_repository_index(served: Served) -> None:
    """What is served and whether it takes requests; the filter; and that nothing is loaded or unloaded by request."""
    served.start(models.identity(), slo_s=30.0)
    request = service_pb2.RepositoryIndexRequest
    ready = {"name": "model", "version": "1", "state": "READY"}
    assert served.client.get_model_repository_index(as_json=True) == {"models": [ready]}
    assert len(served.stub.RepositoryIndex(request(ready=True)).models) == 1
    assert "model_repository" in served.client.get_server_metadata().extensions
    for change in (served.client.load_model, served.client.unload_model):
        with pytest.raises(InferenceServerException, match="neither loaded nor unloaded by request") as caught:
            change("model")
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(grpc.RpcError) as refused:
        served.stub.RepositoryIndex(request(repository_name="other"))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    served.scheduler.close()
    closed = {**ready, "state": "UNAVAILABLE", "reason": "the scheduler is closed"}
    assert served.client.get_model_repository_index(as_json=True) == {"models": [closed]}
    assert len(served.stub.RepositoryIndex(request(ready=True)).models) == 0


def test_client_timeout_becomes_the_deadline(served: Served) -> None:
    """Without a word in the service's code; the tighter of it and the SLO. Certain on any machine."""
    served.start(models.identity(), rule=DeadlineRule(slo_s=20.0))
    for timeout_s, most in ((9.0, 9.0), (90.0, 20.0), (None, 20.0)):
        before = time.time()
        served.client.infer("model", [tensor(ROW)], client_timeout=timeout_s)
        elapsed = time.time() - before
        assert most - elapsed - 0.05 <= served.budgets_s[-1] <= most + 0.05  # gRPC keeps its deadline on another clock
    served.client.infer("model", [tensor(ROW)], timeout=3_000_000)
    assert served.budgets_s[-1] <= 3.0
    served.client.infer("model", [tensor(ROW)], headers={"x-request-timeout-seconds": "2"})
    assert served.budgets_s[-1] <= 2.0


def test_the_upload_counts(served: Served) -> None:
    """The message comes after the head: what lies between is gone from the SLO."""
    served.start(models.identity(), rule=DeadlineRule(slo_s=20.0, rtt_s=0.1))
    call = served.channel.stream_unary(PATH)  # on the wire the same call, but its head goes out at once
    times: list[float] = []

    def slowly() -> Iterator[bytes]:
        until(lambda: len(served.clock_reads) > 0)
        times.append(time.monotonic())
        time.sleep(0.2)  # this is the slow link
        times.append(time.monotonic())
        yield message().SerializeToString()

    before = time.monotonic()
    answer = service_pb2.ModelInferResponse.FromString(call(slowly()))
    after = time.monotonic()
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == ROW[0].tolist()
    assert 19.9 - (after - before) <= served.budgets_s[0] <= 19.9 - (times[1] - times[0])


def test_what_cannot_be_in_time_is_told_at_once(served: Served) -> None:
    """The server's refusal, not the client's own timer: its text tells them apart."""
    served.start(models.identity(), SLOW)
    with pytest.raises(InferenceServerException, match="cannot meet its deadline") as caught:
        served.client.infer("model", [tensor(ROW)], client_timeout=0.5)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert served.scheduler.statistics().rejected == {"deadline": 1}


def test_a_full_queue_is_resource_exhausted(served: Served) -> None:
    """Whoever comes when as many wait as may wait is turned away."""
    served.start(models.identity(), slo_s=60.0, max_queue=2)
    with busy(served.scheduler, {"x": ROW}):
        waiting = [served.stub.ModelInfer.future(message()) for _ in range(2)]
        until(lambda: served.scheduler.statistics().waiting == 2)
        with pytest.raises(InferenceServerException, match="max_queue") as caught:
            served.client.infer("model", [tensor(ROW)])
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert all(call.result(30).raw_output_contents for call in waiting)


def test_a_cancelled_call_leaves_the_queue(served: Served) -> None:
    """By the client's word, or by its end; its neighbour is served."""
    served.start(models.identity(), slo_s=60.0)
    with busy(served.scheduler, {"x": ROW}):
        leaving = served.stub.ModelInfer.future(message())
        staying = served.stub.ModelInfer.future(message())
        with grpc.insecure_channel(served.address) as channel:
            hanging_up = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(message())
            until(lambda: served.scheduler.statistics().waiting == 3)
            leaving.cancel()
            until(lambda: served.scheduler.statistics().cancelled == 1)
        until(lambda: served.scheduler.statistics().cancelled == 2)
    assert staying.result(30).raw_output_contents
    assert hanging_up.done()


def test_a_call_that_its_client_gave_up_leaves_the_queue(served: Served) -> None:
    """Served best-effort, it would still be run; but nobody is there any more."""
    served.start(models.identity(), late="serve")
    with busy(served.scheduler, {"x": ROW}):
        call = served.stub.ModelInfer.future(message(), timeout=2.0)
        until(lambda: served.scheduler.statistics().waiting == 1)
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # waits until it has ended
        until(lambda: served.scheduler.statistics().cancelled == 1)
        assert served.scheduler.statistics().waiting == 0


def test_waiting_calls_hold_no_thread(served: Served) -> None:
    """Fifty wait in the scheduler, where deadlines count, while the pool has a single thread."""
    served.start(models.identity(), slo_s=60.0, workers=1)
    with busy(served.scheduler, {"x": ROW}):
        calls = [served.stub.ModelInfer.future(message(ROW + i)) for i in range(50)]
        until(lambda: served.scheduler.statistics().waiting == 50)
        assert served.client.is_server_live()
    for i, call in enumerate(calls):
        assert np.frombuffer(call.result(30).raw_output_contents[0], np.float32).tolist() == (ROW + i)[0].tolist()


def _bad_requests() -> dict[str, Any]:
    tensors = service_pb2.ModelInferRequest
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    short = message()
    short.raw_input_contents[0] = b"123"
    twice = message()
    twice.inputs.add(**x)
    twice.raw_input_contents.append(ROW.tobytes())
    shared = message()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "region"
    sequence = message()
    sequence.parameters["sequence_id"].int64_param = 7
    classes = message()
    classes.outputs.add(name="y").parameters["classification"].int64_param = 3
    wrong_field = tensors(model_name="model")
    wrong_field.inputs.add(**x).contents.int_contents.extend([1, 2, 3, 4])
    return {
        "input 'x' is missing": tensors(model_name="model"),
        "must hold 16 bytes, got 3": short,
        "given twice": twice,
        "must hold all 1 inputs or none, got 2": message(
            raw_input_contents=[b"", b""], inputs=[tensors.InferInputTensor(**x)]
        ),
        "shared memory is not supported": shared,
        "sequences are not supported": sequence,
        "classification extension is not supported": classes,
        "must be in fp32_contents, not int_contents": wrong_field,
        "output 'z' is unknown": message(outputs=[tensors.InferRequestedOutputTensor(name="z")]),
        "axis 1 of input 'x' must be 4": message(np.zeros((1, 3), dtype=np.float32)),
        "must have at most max_batch_size=2 rows, got 3": message(np.zeros((3, 4), dtype=np.float32)),
    }


def test_bad_requests_are_invalid_arguments(served: Served) -> None:
    """Each told what is wrong; the server lives on."""
    served.start(models.identity(), slo_s=30.0)
    for text, request in _bad_requests().items():
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, text
        assert text in caught.value.details()
    for changes in ({"model_name": "other"}, {"model_version": "9"}):
        request = message()
        request.MergeFrom(service_pb2.ModelInferRequest(**changes))
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert served.scheduler.statistics().submitted == 0
    assert served.stub.ModelInfer(message()).raw_output_contents


def test_a_poisonous_request_is_internal(served: Served) -> None:
    """What the model raises is told; a request without any deadline is not run."""
    served.start(models.lookup())
    indices = tensor(np.array([999]), "i")
    with pytest.raises(InferenceServerException, match="the model failed") as caught:
        served.client.infer("model", [indices], client_timeout=30)
    assert caught.value.status() == "StatusCode.INTERNAL"
    with pytest.raises(InferenceServerException, match="budget_s or deadline must be given"):
        served.client.infer("model", [indices])
    assert served.client.infer("model", [tensor(np.array([3]), "i")], client_timeout=30).as_numpy("y") == [30.0]


def test_large_tensors(served: Served) -> None:
    """Beyond grpcio's own limit of 4 MiB, both ways."""
    served.start(models.identity(columns=2_000_000), slo_s=30.0)
    row = np.arange(2_000_000, dtype=np.float32)[None]
    assert np.array_equal(served.client.infer("model", [tensor(row)]).as_numpy("y"), row)


def test_clients_that_do_not_fetch_their_answers_hold_up_nobody(served: Served) -> None:
    """Eight megabytes each, more than the network takes; their neighbour is served, and so are they when they read."""
    served.start(models.identity(columns=2_000_000), slo_s=60.0)
    row = np.arange(2_000_000, dtype=np.float32)[None]
    lazy = served.channel.unary_stream(PATH, request_serializer=lambda request: request.SerializeToString())
    with ExitStack() as stack:
        calls = [lazy(message(row)) for _ in range(4)]  # on the wire the same call, but read when the test says
        for call in calls:
            stack.callback(call.cancel)
        until(lambda: served.scheduler.statistics().met == 4)
        result = served.client.infer("model", [tensor(row)], client_timeout=30)
        assert np.array_equal(result.as_numpy("y"), row)
        for call in calls:
            answer = service_pb2.ModelInferResponse.FromString(next(call))
            assert answer.raw_output_contents[0] == row.tobytes()


def test_the_asyncio_client(served: Served) -> None:
    """Many at once; a cancelled task cancels its call."""
    served.start(models.identity(), slo_s=60.0)

    async def run() -> None:
        async with triton_aio.InferenceServerClient(served.address) as client:
            assert await client.is_model_ready("model")
            results = await asyncio.gather(
                *(client.infer("model", [tensor(ROW + i, module=triton_aio)], client_timeout=30) for i in range(40))
            )
            assert [result.as_numpy("y")[0, 0] for result in results] == list(range(40))

    asyncio.run(run())
    assert served.scheduler.statistics().met == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_answers_what_waits(kind: str) -> None:
    """With a grace period, requests that wait are served before the server ends: none is lost."""
    with ExitStack() as stack:
        session = stack.enter_context(ElasticSession(models.identity(), max_threads=1))
        scheduler = Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=2), slo_s=60.0)
        stack.callback(scheduler.close)
        with ExitStack() as serving:
            address = serving.enter_context(
                grpc_serving(kind, lambda server: add_inference_service(server, {"model": scheduler}), grace_s=30.0)
            )
            channel = stack.enter_context(grpc.insecure_channel(address))
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with busy(scheduler, {"x": ROW}):
                calls = [stub.ModelInfer.future(message()) for _ in range(5)]
                until(lambda: scheduler.statistics().waiting == 5)
                stopping = threading.Thread(target=serving.close)
                stopping.start()
                until(lambda: _refuses(address))
            stopping.join()
        assert all(call.result(30).raw_output_contents for call in calls)


def _refuses(address: str) -> bool:
    """Whether a server takes no calls any more."""
    with grpc.insecure_channel(address) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(
                service_pb2.ServerLiveRequest(), wait_for_ready=False, timeout=5
            )
        except grpc.RpcError:
            return True
        return False


def test_a_grpcio_without_the_mark_is_served_by_waiting() -> None:
    """The mark of handlers that do not block is experimental: where it is not known, they block and answer the same."""

    class Unmarked:
        """A server that hides the mark from grpcio."""

        def __init__(self, server: Any) -> None:
            self._server = server

        def add_generic_rpc_handlers(self, handlers: tuple[Any]) -> None:
            self._handler = handlers[0]
            self._server.add_generic_rpc_handlers((self,))

        def service(self, details: Any) -> Any:
            found = self._handler.service(details)
            if found is None or not found.response_streaming:
                return found
            codec = (found.request_deserializer, found.response_serializer)
            if found.request_streaming:
                return grpc.stream_stream_rpc_method_handler(
                    lambda requests, context: found.stream_stream(requests, context), *codec
                )
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: found.unary_stream(request, context), *codec
            )

    with ExitStack() as stack:
        session = stack.enter_context(ElasticSession(models.lookup(), max_threads=1))
        scheduler = Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=1), slo_s=60.0)
        stack.callback(scheduler.close)
        address = stack.enter_context(
            grpc_serving("blocking", lambda server: add_inference_service(Unmarked(server), {"model": scheduler}))
        )
        client = stack.enter_context(triton.InferenceServerClient(address))
        assert client.infer("model", [tensor(np.array([3]), "i")]).as_numpy("y") == [30.0]
        with pytest.raises(InferenceServerException, match="the model failed"):
            client.infer("model", [tensor(np.array([999]), "i")])
        with pytest.raises(InferenceServerException, match="input 'i' is missing"):
            client.infer("model", [tensor(ROW)])
        came: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        client.start_stream(lambda result, error: came.put((result, error)))
        for index in (3, 999, 2):
            client.async_stream_infer("model", [tensor(np.array([index]), "i")])
            result, error = came.get(timeout=30)
            assert ("the model failed" in str(error)) if index == 999 else result.as_numpy("y") == [10.0 * index]
        client.stop_stream()
