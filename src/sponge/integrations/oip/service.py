"""The Open Inference Protocol over gRPC, on a server of grpcio's, blocking or asyncio.

Rules, and why they hold:

* The instant at which a call's head arrives is taken where grpcio asks who handles it, before the message is there: so
  the upload counts, also against an SLO of the service.
* A waiting request holds no thread. On an asyncio server it is a task. On a blocking server the handler submits the
  request and returns; the answer is sent when it is there. grpcio has that for answers that are streams (its handlers
  may be marked as not blocking), and a stream of one answer is, on the wire, an answer. Where a version of grpcio does
  not know the mark, the handler waits, as handlers do.
* Answers of a blocking server are put together on threads of the service's own: a lane has better things to do. A
  client that does not fetch its answer holds such a thread, as grpcio has it, so there may be many; an asyncio server,
  where it holds a task, is the better one for clients that are not trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sponge.deadlines import DeadlineRule
from sponge.errors import SpongeError
from sponge.integrations.grpc import due_of, status_of
from sponge.integrations.oip.messages import METHODS, PACKAGE, REFUSED, SERVICE, STREAM, message_class
from sponge.integrations.oip.models import VERSION, Call, Models, allowances_of, refuse
from sponge.integrations.oip.streams import AsyncStreams, BlockingStreams
from sponge.integrations.oip.tensors import from_raw, from_values, to_raw
from sponge.integrations.outcomes import Array, InvalidRequest

if TYPE_CHECKING:
    from sponge.live.scheduler import Scheduler

SERVER_OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", -1))
"""For the server's ``options``: grpcio's own limit is 4 MiB, less than one image of 3 × 640 × 640 floats."""
MAX_IN_FLIGHT = 128
MAX_SENDERS = 64
"""Threads of a blocking server that send answers; one is started only when all others are busy."""

_log = logging.getLogger("sponge")
_ModelInferRequest = message_class("ModelInferRequest")
_ModelInferResponse = message_class("ModelInferResponse")


def add_inference_service(
    server: Any,
    models: Mapping[str, Scheduler],
    *,
    rule: DeadlineRule | None = None,
    clock: Callable[[], float] = time.monotonic,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> None:
    """Serve *models* by the Open Inference Protocol on a gRPC server, before it is started.

    Parameters
    ----------
    server
        Of ``grpc.server`` or ``grpc.aio.server``. Make it with ``options=SERVER_OPTIONS`` if inputs may be large.
    models
        Scheduler by the name that clients use. They stay the caller's to close, after the server has stopped.
    rule
        How deadlines are found. The call's deadline and a request's parameter ``timeout`` [µs] always count; where
        nobody says anything, the scheduler's own SLO holds.
    clock
        The schedulers'.
    max_in_flight
        Requests of one stream that may be without an answer at a time; more are not read until then.

    Raises
    ------
    ValueError
        If *models* is empty, a name is not usable, or *max_in_flight* is below 1.
    """
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight}")
    asynchronous = isinstance(server, grpc.aio.Server)
    handler = _Handler(Models(models, rule), clock, max_in_flight, asynchronous=asynchronous)
    server.add_generic_rpc_handlers((handler,))


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, models: Models, clock: Callable[[], float], max_in_flight: int, *, asynchronous: bool) -> None:
        self._models = models
        self._clock = clock
        self._asynchronous = asynchronous
        self._senders = None if asynchronous else ThreadPoolExecutor(MAX_SENDERS, thread_name_prefix="sponge-grpc")
        self._methods = {f"/{PACKAGE}.{SERVICE}/{method}": method for method in (*METHODS, *REFUSED, STREAM)}
        self._readers = {method: message_class(f"{method}Request").FromString for method in METHODS}
        streams = AsyncStreams if asynchronous else BlockingStreams
        self._streams = streams(partial(self._submit, None), partial(write_answer, models), max_in_flight)
        self._answers: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda request: {"live": True},
            "ServerReady": lambda request: {"ready": models.ready},
            "ModelReady": lambda request: {"ready": models.model_ready(request.name, request.version)},
            "ServerMetadata": lambda request: models.server_metadata(),
            "ModelMetadata": lambda request: models.metadata(request.name, request.version),
            "ModelConfig": lambda request: {"config": models.config(request.name, request.version)},
            "ModelStatistics": lambda request: models.statistics(request.name, request.version),
            "RepositoryIndex": lambda request: {"models": models.index(request.repository_name, ready=request.ready)},
            **dict.fromkeys(REFUSED, lambda request: models.refuse_change()),
        }

    def service(self, handler_call_details: Any) -> Any:
        """Return what handles a call; called when its head has arrived."""
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return None
        reader = self._readers.get(method)  # None: as bytes, which nobody reads
        if method == STREAM:
            handler = self._streams.serve if isinstance(self._streams, AsyncStreams) else self._streams
            return grpc.stream_stream_rpc_method_handler(handler, _ModelInferRequest.FromString, _write)
        if method != "ModelInfer":
            answer = self._asynchronous_answer if self._asynchronous else self._blocking_answer
            return grpc.unary_unary_rpc_method_handler(partial(answer, method), reader, _write)
        head_at = self._clock()
        if self._asynchronous:
            return grpc.unary_unary_rpc_method_handler(partial(self._infer, head_at), reader, _write)
        behaviour = _NotBlocking(self._infer_by_callback, head_at)
        return grpc.unary_stream_rpc_method_handler(behaviour, reader, _write)

    # -- questions -----------------------------------------------------------------------------------------------

    def _answer(self, method: str, request: Any) -> Any:
        fields = self._answers[method](request)
        return message_class(f"{method}Response")(**fields)

    async def _asynchronous_answer(self, method: str, request: Any, context: Any) -> Any:
        try:
            return self._answer(method, request)
        except SpongeError as error:
            await context.abort(*status_of(error))

    def _blocking_answer(self, method: str, request: Any, context: Any) -> Any:
        try:
            return self._answer(method, request)
        except SpongeError as error:
            context.abort(*status_of(error))

    # -- inference -----------------------------------------------------------------------------------------------

    def _submit(self, head_at: float | None, request: Any, context: Any) -> tuple[Call, Future[list[Array]]]:
        """Queue a request; *head_at*: when its call's head arrived, None within a stream, whose head came long ago."""
        call = read_request(request)
        due = due_of(context, self._models.rule, now=self._clock(), head_at=head_at, allowances=call.allowances)
        return call, self._models.submit(call, due.deadline)

    async def _infer(self, head_at: float, request: Any, context: Any) -> Any:
        try:
            call, future = self._submit(head_at, request, context)
            return write_answer(self._models, call, await asyncio.wrap_future(future))
        except SpongeError as error:
            await context.abort(*status_of(error))

    def _infer_by_callback(self, head_at: float, request: Any, context: Any, send: Callable[[Any], None]) -> None:
        """Submit, and return: *send* takes the answer when it is there, and then None for its end."""
        try:
            call, future = self._submit(head_at, request, context)
        except SpongeError as error:
            _end(context, send, error)
            return
        senders = self._senders
        assert senders is not None
        future.add_done_callback(lambda done: senders.submit(self._finish, call, context, send, done))
        if not context.add_callback(future.cancel):
            future.cancel()

    def _finish(self, call: Call, context: Any, send: Callable[[Any], None], future: Future[list[Array]]) -> None:
        try:
            send(write_answer(self._models, call, future.result()))
            send(None)
        except (SpongeError, CancelledError) as error:
            _end(context, send, error)
        except Exception as error:  # or the client would wait for an answer that never comes
            _log.exception("an answer could not be put together")
            _end(context, send, error)


class _NotBlocking:
    """A handler that is given a function to send by, instead of being waited for."""

    experimental_non_blocking = True

    def __init__(self, handle: Callable[..., None], head_at: float) -> None:
        self._handle = handle
        self._head_at = head_at

    def __call__(
        self, request: Any, context: Any, send_response_callback: Callable[[Any], None] | None = None
    ) -> Iterator[Any] | None:
        if send_response_callback is not None:
            self._handle(self._head_at, request, context, send_response_callback)
            return None
        answers: Future[list[Any]] = Future()
        gathered: list[Any] = []

        def send(answer: Any) -> None:
            if answer is None:
                answers.set_result(gathered)
            else:
                gathered.append(answer)

        self._handle(self._head_at, request, context, send)
        return iter(answers.result())


def _end(context: Any, send: Callable[[Any], None], error: BaseException) -> None:
    code, details = status_of(error)
    context.set_code(code)
    context.set_details(details)
    send(None)


def _write(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in chosen.items() if choice}


def read_request(request: Any) -> Call:
    """Return the request that a message holds.

    Raises
    ------
    InvalidRequest
        If a tensor is not as it says, or a parameter cannot be honoured.
    """
    inputs: dict[str, Array] = {}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(f"raw_input_contents must hold all {len(request.inputs)} inputs or none, got {len(raw)}")
    for index, tensor in enumerate(request.inputs):
        refuse(_parameters(tensor.parameters))
        if tensor.name in inputs:
            raise InvalidRequest(f"input {tensor.name!r} is given twice")
        if raw:
            inputs[tensor.name] = from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index])
        else:
            values = _contents(tensor)
            inputs[tensor.name] = from_values(tensor.name, tensor.datatype, tensor.shape, values)
    for output in request.outputs:
        refuse({name: value for name, value in _parameters(output.parameters).items() if value})
    return Call(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        inputs=inputs,
        outputs=tuple(output.name for output in request.outputs),
        allowances=allowances_of(_parameters(request.parameters)),
    )


_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the protocol keeps values of each datatype; those of FP16 are sent raw."""


def _contents(tensor: Any) -> Iterable[Any]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InvalidRequest(
            f"input {tensor.name!r} of datatype {tensor.datatype!r} must be sent in raw_input_contents: "
            f"only {', '.join(_CONTENTS)} have a field of their own"
        )
    for other in sorted(set(_CONTENTS.values()) - {field}):
        if len(getattr(tensor.contents, other)):
            raise InvalidRequest(f"input {tensor.name!r} of datatype {tensor.datatype} must be in {field}, not {other}")
    return list(getattr(tensor.contents, field))


def write_answer(models: Models, call: Call, outputs: list[Array], answer: Any = None) -> Any:
    """Return the message of an answer, its tensors raw; *answer*: an empty one that is to be filled."""
    answer = _ModelInferResponse() if answer is None else answer
    answer.model_name, answer.model_version, answer.id = call.model, VERSION, call.id
    for name, datatype, array in models.select(call, outputs):
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        answer.raw_output_contents.append(to_raw(array))
    return answer
