"""Triton's HTTP client, unchanged, against the ASGI application under uvicorn; and plain JSON clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from fastapi import FastAPI
from onnx import TensorProto
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from sponge.core.events import Arrived
from sponge.core.latency import LatencyModel
from sponge.core.settings import Settings
from sponge.core.solver import Solver
from sponge.deadlines import DeadlineRule
from sponge.integrations.oip.http import LENGTH_HEADER, inference_app
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.servers import Answer, RawClient, busy, serving, until
from tests.live import models

FAST = LatencyModel(1e-5, 1e-5, 1e-5, 1e-4)
SLOW = LatencyModel(1e-6, 0.0, 0.0, 0.9)
ROW = np.arange(4, dtype=np.float32)[None]
INFER = "/v2/models/model/infer"
_clients: list[Any] = []
"""Kept to the end: a client that the garbage collector closes on another thread upsets gevent, on which it is built."""


class Served:
    """One model of one lane under uvicorn, and what the scheduler saw."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.arrived: list[Arrived] = []

    def start(self, model: bytes, latency: LatencyModel = FAST, **arguments: Any) -> Served:
        rule = arguments.pop("rule", None)
        slo_s = arguments.pop("slo_s", None)
        options = {name: arguments.pop(name) for name in ("max_body_bytes", "compress_answers") if name in arguments}
        session = self._stack.enter_context(ElasticSession(model, max_threads=1))
        self.scheduler = Scheduler(
            session,
            Solver(latency, max_cores=1, max_batch_size=2),
            settings=Settings(**arguments),
            slo_s=slo_s,
            recorder=lambda now, event, actions: self.arrived.append(event) if isinstance(event, Arrived) else None,
        )
        self._stack.callback(self.scheduler.close, drain=False)
        app = inference_app({"model": self.scheduler}, rule=rule, **options)
        self.port = self._stack.enter_context(serving(app))
        self.client = triton.InferenceServerClient(f"127.0.0.1:{self.port}")
        _clients.append(self.client)
        self._stack.callback(self.client.close)
        return self

    def post(self, body: Any, path: str = INFER, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = RawClient(self.port, path, length=len(data), **headers)
        client.send(data)
        return client.answer()

    def get(self, path: str) -> Answer:
        return RawClient(self.port, path, method="GET").answer()

    @property
    def budgets_s(self) -> list[float]:
        return [event.request.deadline - event.request.arrived_at for event in self.arrived]


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def tensor(array: np.ndarray[Any, Any], name: str = "x", *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def document(**changes: Any) -> dict[str, Any]:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}
    return {"inputs": [{**x, **changes.pop("x", {})}], **changes}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("onnx_type", "array"),
    [
        (TensorProto.BOOL, np.array([[True, False, True, True]])),
        (TensorProto.UINT8, np.array([[0, 1, 2, 255]], dtype=np.uint8)),
        (TensorProto.INT64, np.array([[-(2**63), 1, 2, 2**63 - 1]])),
        (TensorProto.FLOAT16, np.array([[0.5, 1, -2, 60000]], dtype=np.float16)),
        (TensorProto.FLOAT, ROW),
        (TensorProto.STRING, np.array([["a", "", "žluťoučký", "d"]], dtype=object)),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
def test_datatypes_come_back(served: Served, onnx_type: int, array: np.ndarray[Any, Any], binary: bool) -> None:
    """As bytes and as JSON, in any mixture of ways in and out."""
    served.start(models.identity(dtype=onnx_type), slo_s=30.0)
    binary = binary or array.dtype == np.float16  # which versions of the client refuse to put into JSON
    for binary_answer in (True, False):
        wanted = [triton.InferRequestedOutput("y", binary_data=binary_answer)]
        result = served.client.infer("model", [tensor(array, binary=binary)], outputs=wanted, request_id="seven")
        answer = result.as_numpy("y")
        if array.dtype == object and binary_answer:
            answer = np.array([[text.decode() for text in row] for row in answer.tolist()], dtype=object)
        assert answer.tolist() == array.tolist()
        assert result.get_response()["id"] == "seven"
    assert served.client.infer("model", [tensor(array, binary=binary)]).as_numpy("y") is not None


def test_triton_client_learns_all_it_asks_for(served: Served) -> None:
    """Health, metadata, configuration, statistics; the subset and order of outputs."""
    served.start(models.several(), slo_s=30.0)
    client = served.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert not client.is_model_ready("model", "2")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "sponge"
    assert client.get_model_metadata("model", "1")["inputs"][2] == {"name": "tag", "datatype": "INT64", "shape": [-1]}
    assert client.get_model_config("model")["max_batch_size"] == 2
    image, scale = np.ones((2, 3, 4, 4), dtype=np.float32), np.full((2, 1), 2, dtype=np.float32)
    inputs = [tensor(np.array([5, 6]), "tag", binary=False), tensor(image, "image"), tensor(scale, "scale")]
    wanted = [triton.InferRequestedOutput("tag_plus_one", binary_data=False), triton.InferRequestedOutput("scaled")]
    result = client.infer("model", inputs, model_version="1", outputs=wanted)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["tag_plus_one", "scaled"]
    assert result.as_numpy("tag_plus_one").tolist() == [6, 7]
    assert (result.as_numpy("scaled") == 2).all()
    assert client.get_inference_statistics("model")["model_stats"][0]["inference_count"] == 1
    assert client.get_inference_statistics()["model_stats"][0]["inference_count"] == 1
    with pytest.raises(InferenceServerException, match="no model 'other' is served here"):
        client.get_model_metadata("other")
    served.scheduler.close()
    assert not client.is_server_ready()
    assert not client.is_model_ready("model")
    assert served.get("/v2/models/model/ready").status == 503


def test_plain_json(served: Served) -> None:
    """What a client without a library sends: nested data, no id, no outputs."""
    served.start(models.identity(), slo_s=30.0)
    answer = served.post(document(x={"shape": [2, 4], "data": [[0, 1, 2, 3], [4, 5, 6, 7.5]]}))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "model_name": "model",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 4], "data": [0, 1, 2, 3, 4, 5, 6, 7.5]}],
    }
    infinite = document(x={"data": [1e300, 0, 0, 0]})
    assert served.post(infinite).status == 400  # JSON has no word for it
    raw = served.post({**infinite, "parameters": {"binary_data_output": True}})
    assert np.frombuffer(raw.body[int(raw.headers[LENGTH_HEADER]) :], np.float32)[0] == np.inf


def test_headers_and_parameters_become_the_deadline(served: Served) -> None:
    """The tightest of all, the SLO among them."""
    served.start(models.identity(), rule=DeadlineRule(slo_s=20.0))
    before = time.monotonic()
    served.client.infer("model", [tensor(ROW)], headers={"Request-Timeout-Ms": "9000"})
    served.client.infer("model", [tensor(ROW)], timeout=8_000_000)
    served.client.infer("model", [tensor(ROW)], timeout=80_000_000)
    served.client.infer("model", [tensor(ROW)], timeout=7_000_000, headers={"Request-Timeout-Ms": "6000"})
    elapsed = time.monotonic() - before
    for budget_s, most in zip(served.budgets_s, (9.0, 8.0, 20.0, 6.0), strict=True):
        assert most - elapsed <= budget_s <= most


def test_overload_and_lateness(served: Served) -> None:
    """429 with Retry-After, 504, 503; a client that hangs up cancels."""
    served.start(models.identity(), SLOW, slo_s=60.0, max_queue=2)
    late = served.post(document(), request_timeout_ms="100")
    assert (late.status, late.json()["error"][:8]) == (504, "request ")
    with busy(served.scheduler, {"x": ROW}):
        data = json.dumps(document()).encode()
        waiting = [RawClient(served.port, INFER, length=len(data)) for _ in range(2)]
        for client in waiting:
            client.send(data)
        until(lambda: served.scheduler.statistics().waiting == 2)
        refused = served.post(document())
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        waiting[0].close()
        until(lambda: served.scheduler.statistics().cancelled == 1)
    assert waiting[1].answer().status == 200
    served.scheduler.close()
    assert served.post(document()).status == 503


def test_bad_requests_are_told_what_is_wrong(served: Served) -> None:
    """None of them reaches the scheduler, and the service lives on."""
    served.start(models.identity(), slo_s=30.0)
    binary = {"data": None, "parameters": {"binary_data_size": 16}}
    head = json.dumps(document(x=binary)).encode()
    cases: list[tuple[Any, dict[str, str], str]] = [
        (b"", {}, "must be a JSON document"),
        (b"\xff", {}, "must be a JSON document"),
        (b"[" * 100_000, {}, "must be a JSON document"),
        ([], {}, "must have 'inputs'"),
        ({"inputs": [1]}, {}, "must have 'inputs'"),
        ({"inputs": []}, {}, "input 'x' is missing"),
        (document(x={"shape": "1"}), {}, "shape of input 'x' must be a list"),
        (document(x={"datatype": "BF16"}), {}, "datatype of input 'x'"),
        (document(x={"data": ["a"] * 4}), {}, "must be of datatype FP32"),
        (document(x={"shape": [1, 3], "data": [1, 2, 3]}), {}, "axis 1 of input 'x' must be 4"),
        (document(parameters=[1]), {}, "parameters must be an object"),
        (document(parameters={"sequence_id": 1}), {}, "sequences are not supported"),
        (document(x={"parameters": {"shared_memory_region": "r"}}), {}, "shared memory is not supported"),
        (document(outputs=[{"name": "z"}]), {}, "output 'z' is unknown"),
        (document(outputs=[{"name": "y", "parameters": {"classification": 3}}]), {}, "classification extension"),
        ({"inputs": document()["inputs"] * 2}, {}, "given twice"),
        (head + b"123", {LENGTH_HEADER: str(len(head))}, "at most the 3 bytes left"),
        (head + b"1" * 17, {LENGTH_HEADER: str(len(head))}, "1 bytes of the body belong to no input"),
        (head, {LENGTH_HEADER: "9" * 30}, LENGTH_HEADER),
        (head, {LENGTH_HEADER: "-1"}, LENGTH_HEADER),
        (head, {LENGTH_HEADER: str(len(head) + 1)}, LENGTH_HEADER),
    ]
    for body, headers, text in cases:
        answer = served.post(body, **headers)
        assert answer.status == 400, text
        assert text in answer.json()["error"]
    assert served.scheduler.statistics().submitted == 0
    assert served.post(document(), "/v2/models/other/infer").status == 404
    assert served.post(document(), "/v2/models/model/versions/2/infer").status == 404
    assert served.post(document(), "/v2/models/model").status == 405
    assert served.get(INFER).status == 405
    for path in (
        "/",
        "/v1",
        "/v2/models",
        "/v2/models/",
        "/v2/nonsense",
        "/v2/models/model/nonsense",
        "/v2/models/%00",
    ):
        assert served.get(path).status == 404, path
    assert served.post(document()).status == 200


def test_only_paths_of_the_protocol_are_served(served: Served) -> None:
    """Another service may be mounted beside this one."""
    served.start(models.identity(), slo_s=30.0)
    for prefix in ("/v1", "/v3", "/nonsense"):
        assert served.post(document(), INFER.replace("/v2", prefix)).status == 404
        assert served.post(b"", f"{prefix}/repository/index").status == 404


def test_the_repository_index(served: Served) -> None:
    """What is served and whether it takes requests; the filter; and that nothing is loaded or unloaded by request."""
    served.start(models.identity(), slo_s=30.0)
    ready = {"name": "model", "version": "1", "state": "READY", "reason": ""}
    assert served.client.get_model_repository_index() == [ready]
    assert served.post({"ready": True}, "/v2/repository/index").json() == [ready]
    assert "model_repository" in served.client.get_server_metadata()["extensions"]
    for change in (served.client.load_model, served.client.unload_model):
        with pytest.raises(InferenceServerException, match="neither loaded nor unloaded by request") as caught:
            change("model")
        assert caught.value.status() == "501"
    for body in (b"{", [], {"ready": 1}, {"ready": "yes"}):
        answer = served.post(body, "/v2/repository/index")
        assert answer.status == 400, body
    assert served.post(b"", "/v2/repository/nonsense").status == 404
    assert served.post(b"", "/v2/repository/models/model").status == 404
    assert served.get("/v2/repository/index").status == 405
    assert served.client.infer("model", [tensor(ROW)]).as_numpy("y").tolist() == ROW.tolist()
    served.scheduler.close()
    closed = {"name": "model", "version": "1", "state": "UNAVAILABLE", "reason": "the scheduler is closed"}
    assert served.client.get_model_repository_index() == [closed]
    assert served.post({"ready": False}, "/v2/repository/index").json() == [closed]
    assert served.post({"ready": True}, "/v2/repository/index").json() == []


def test_bodies_are_bounded(served: Served) -> None:
    """A client cannot make the service hold what it will not serve."""
    served.start(models.identity(), slo_s=30.0, max_body_bytes=1000)
    assert served.post(b" " * 1001).status == 413
    assert served.post(document()).status == 200


def test_poisonous_requests_fail_alone(served: Served) -> None:
    """500 with the model's words."""
    served.start(models.lookup(), slo_s=30.0)
    with pytest.raises(InferenceServerException, match="the model failed"):
        served.client.infer("model", [tensor(np.array([999]), "i")])
    assert served.client.infer("model", [tensor(np.array([3]), "i")]).as_numpy("y") == [30.0]


def test_the_asyncio_client(served: Served) -> None:
    """Many at once over its pool of connections."""
    served.start(models.identity(), slo_s=30.0)

    async def run() -> list[float]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            results = await asyncio.gather(*(client.infer("model", [tensor(ROW + i)]) for i in range(40)))
        return [float(result.as_numpy("y")[0, 0]) for result in results]

    assert asyncio.run(run()) == list(range(40))


def test_it_can_be_mounted() -> None:
    """Inside of a larger application, below a path of its own."""
    with ExitStack() as stack:
        session = stack.enter_context(ElasticSession(models.identity(), max_threads=1))
        scheduler = Scheduler(session, Solver(FAST, max_cores=1, max_batch_size=2), slo_s=30.0)
        stack.callback(scheduler.close)
        app = FastAPI()
        app.mount("/inference", inference_app({"model": scheduler}))
        port = stack.enter_context(serving(app))
        client = RawClient(port, "/inference/v2/models/model/infer", length=len(json.dumps(document())))
        client.send(json.dumps(document()).encode())
        assert client.answer().status == 200


@pytest.mark.parametrize("names", [[], [""], ["a/b"]])
def test_names_must_fit_into_paths(names: list[str]) -> None:
    """A name that no client could ask for is a mistake to be told at once."""
    with pytest.raises(ValueError, match="model"):
        inference_app(dict.fromkeys(names))  # type: ignore[arg-type]
