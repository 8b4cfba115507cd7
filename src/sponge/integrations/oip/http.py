"""The Open Inference Protocol over HTTP, as an ASGI application: JSON, and raw tensors behind it.

A request's body is a JSON document; with the header ``Inference-Header-Content-Length`` the document ends there and the
bytes of tensors follow, in the order in which the document names them. An answer is made the same way, for the outputs
that the client wants as bytes. Either may be compressed (`sponge.integrations.oip.compression`), which is done on a
thread: a body of many megabytes would hold up the event loop, and with it the clocks of all requests that arrive.

References
----------
The Open Inference Protocol, "HTTP/REST"; Triton's extension binary tensor data.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from sponge.deadlines import DeadlineRule
from sponge.errors import QueueFull, SpongeError
from sponge.integrations.asgi import (
    App,
    Arrival,
    DeadlineMiddleware,
    Receive,
    Scope,
    Send,
    arrival_of,
    send_bytes,
    send_json,
)
from sponge.integrations.oip.compression import (
    ENCODINGS,
    MIN_ANSWER_BYTES,
    BodyTooLong,
    UnknownEncoding,
    accepted_encoding,
    deflate,
    encoding_of,
    inflate,
)
from sponge.integrations.oip.models import Call, Models, allowances_of, refuse
from sponge.integrations.oip.tensors import from_raw, from_values, to_raw
from sponge.integrations.outcomes import ClientGone, InvalidRequest, UnknownModel, outcome_of, retry_after_s

if TYPE_CHECKING:
    from sponge.integrations.outcomes import Array
    from sponge.live.scheduler import Scheduler

LENGTH_HEADER = "inference-header-content-length"
MAX_BODY_BYTES = 64 << 20
POSTED = ("infer", "repository/index")
"""What is asked for by POST; all else by GET."""


class _Refused(SpongeError):
    """A request that is answered by a status alone."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def inference_app(
    models: Mapping[str, Scheduler],
    *,
    rule: DeadlineRule | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    compress_answers: bool = True,
) -> App:
    """Return an ASGI application that serves *models* by the Open Inference Protocol.

    Parameters
    ----------
    models
        Scheduler by the name that clients use. They stay the caller's to close.
    rule
        How deadlines are found, see `DeadlineRule`; a request's parameter ``timeout`` [µs] counts too. Where nobody
        says anything, the scheduler's own SLO holds.
    max_body_bytes
        A longer body is refused with status 413, and so is one that inflates to more.
    compress_answers
        Whether answers are compressed if a client accepts it. Many HTTP clients always say that they do; on a fast
        network it costs more than it brings.

    Raises
    ------
    ValueError
        If *models* is empty or a name cannot be part of a path.
    """
    served = Models(models, rule)
    return DeadlineMiddleware(_InferenceApp(served, max_body_bytes, compress_answers), rule=served.rule)


class _InferenceApp:
    def __init__(self, models: Models, max_body_bytes: int, compress_answers: bool) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes
        self._compress_answers = compress_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        try:
            await self._serve(scope, receive, send)
        except ClientGone:
            raise
        except _Refused as error:
            await send_json(send, error.status, {"error": str(error)})
        except BodyTooLong as error:
            await send_json(send, 413, {"error": str(error)})
        except UnknownEncoding as error:
            await send_json(send, 415, {"error": str(error)}, headers={"accept-encoding": ", ".join(ENCODINGS)})
        except SpongeError as error:
            status = 400 if isinstance(error, InvalidRequest) else outcome_of(error).http_status
            headers = {"retry-after": str(arrival_of(scope).retry_after_s)} if status == 429 else {}
            await send_json(send, status, {"error": str(error)}, headers=headers)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # what a larger application mounted it at
        parts = path.strip("/").split("/")
        name, version, what = _model_path(parts)
        if scope["method"] == "POST" and what == "infer":
            await self._infer(scope, receive, send, name, version)
            return
        if scope["method"] == "POST" and what.startswith("repository/"):
            await self._repository(scope, receive, send, what)
            return
        answers = self._answers(name, version, what)
        if answers is None:
            raise _Refused(404, f"there is nothing at {scope['path']!r}")
        if scope["method"] not in ("GET", "HEAD") or what in POSTED:
            raise _Refused(405, f"method {scope['method']} is not for {scope['path']!r}")
        status, content = answers()
        if content is None:
            await send_bytes(send, status, b"", kind="text/plain")
        else:
            await send_json(send, status, content)

    def _answers(self, name: str, version: str, what: str) -> Callable[[], tuple[int, dict[str, Any] | None]] | None:
        """Return what makes status and content of a question; None if there is no such question."""
        models = self._models
        return {
            "server": lambda: (200, models.server_metadata()),
            "health/live": lambda: (200, None),
            "health/ready": lambda: (200 if models.ready else 503, None),
            "metadata": lambda: (200, models.metadata(name, version)),
            "ready": lambda: (200 if models.get(name, version) and models.model_ready(name) else 503, None),
            "config": lambda: (200, models.config(name, version)),
            "stats": lambda: (200, models.statistics(name, version)),
            **dict.fromkeys(POSTED, lambda: (405, None)),
        }.get(what)

    async def _infer(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        arrival = arrival_of(scope)
        scheduler = self._models.get(name, version)
        headers = {key.lower(): value for key, value in scope["headers"]}
        body = await self._body(headers, receive)
        call, as_raw = parse_request(body, _header_length(headers, len(body)), name, version)
        deadline = _deadline(self._models.rule, arrival, call)
        try:
            outputs = await arrival.result(self._models.submit(call, deadline))
        except QueueFull:
            arrival.retry_after_s = retry_after_s(scheduler)
            raise
        document, tail = format_answer(self._models, call, outputs, as_raw)
        await self._send([document, *tail], headers.get(b"accept-encoding", b""), send)

    async def _send(self, parts: list[bytes], accepted: bytes, send: Send) -> None:
        """Send a document, and the tensors behind it if there are any, compressed if the client wants that."""
        headers = {LENGTH_HEADER: str(len(parts[0]))} if len(parts) > 1 else {}
        kind = "application/octet-stream" if len(parts) > 1 else "application/json"
        encoding = accepted_encoding(accepted) if self._compress_answers else None
        if encoding is not None and sum(map(len, parts)) >= MIN_ANSWER_BYTES:
            body = await asyncio.to_thread(deflate, parts, encoding)
            headers["content-encoding"] = encoding
        else:
            body = b"".join(parts)
        await send_bytes(send, 200, body, kind=kind, headers=headers)

    async def _repository(self, scope: Scope, receive: Receive, send: Send, what: str) -> None:
        """Answer what is asked of the repository, which is: what is served."""
        if what != "repository/index":
            if re.fullmatch("repository/models/.+/(load|unload)", what):
                self._models.refuse_change()
            raise _Refused(404, f"there is nothing at {scope['path']!r}")
        headers = {key.lower(): value for key, value in scope["headers"]}
        body = await self._body(headers, receive)
        question = _document(body) if body.strip() else {}
        ready = question.get("ready", False) if isinstance(question, dict) else None
        if not isinstance(ready, bool):
            raise InvalidRequest(f"the document must be an object whose 'ready' is a boolean, got {str(question)[:60]}")
        await send_json(send, 200, self._models.index(ready=ready))

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        encoding = encoding_of(headers.get(b"content-encoding", b""))
        body = await _received(receive, self._max_body_bytes)
        return body if encoding is None else await asyncio.to_thread(inflate, body, encoding, self._max_body_bytes)


def _model_path(parts: list[str]) -> tuple[str, str, str]:
    """Return model, version and what is asked for, of the parts of a path; "" for what it does not name."""
    if parts[0] != "v2":
        return "", "", ""
    if parts[1:2] != ["models"]:
        return "", "", "/".join(parts[1:]) or "server"
    if parts[2:] == ["stats"]:
        return "", "", "stats"
    name, *rest = parts[2:] or [""]
    version = ""
    if rest[:1] == ["versions"] and len(rest) > 1:
        version, rest = rest[1], rest[2:]
    return name, version, "/".join(rest) or "metadata"


async def _live(receive: Receive, send: Send) -> None:
    """Answer the server's lifespan events; the schedulers are the caller's."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _received(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise BodyTooLong(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _header_length(headers: Mapping[bytes, bytes], size: int) -> int:
    value = headers.get(LENGTH_HEADER.encode())
    if value is None:
        return size
    if not value.isdigit() or len(value) > 18 or int(value) > size:
        raise InvalidRequest(
            f"{LENGTH_HEADER} must be a number of at most {size}, the length of the body, got {value!r}"
        )
    return int(value)


def _deadline(rule: DeadlineRule, arrival: Arrival, call: Call) -> float | None:
    """Return the tighter of what the headers and the parameters of the request say."""
    if not call.allowances:
        return arrival.due.deadline
    stated = attrs.evolve(rule, slo_s=None).decide(head_at=arrival.head_at, allowances=call.allowances).deadline
    known = [deadline for deadline in (arrival.due.deadline, stated) if deadline is not None]
    return min(known, default=None)


def parse_request(body: bytes, header_length: int, name: str, version: str) -> tuple[Call, Callable[[str], bool]]:
    """Return the request that a body holds, and which of its outputs are wanted as bytes.

    Raises
    ------
    InvalidRequest
        If it is none.
    """
    document = _document(body[:header_length])
    tail = memoryview(body)[header_length:]
    inputs: dict[str, Array] = {}
    position = 0
    for tensor in _items(document, "inputs"):
        parameters = _parameters(tensor)
        refuse(parameters)
        size = parameters.get("binary_data_size")
        tensor_name, datatype = str(tensor.get("name", "")), str(tensor.get("datatype", ""))
        shape = tensor.get("shape")
        if not isinstance(shape, list):
            raise InvalidRequest(f"shape of input {tensor_name!r} must be a list, got {str(shape)[:60]}")
        if tensor_name in inputs:
            raise InvalidRequest(f"input {tensor_name!r} is given twice")
        if size is None:
            inputs[tensor_name] = from_values(tensor_name, datatype, shape, tensor.get("data", []))
            continue
        if not isinstance(size, int) or not 0 <= size <= len(tail) - position:
            raise InvalidRequest(
                f"binary_data_size of input {tensor_name!r} must be at most the {len(tail) - position} bytes left, "
                f"got {str(size)[:60]}"
            )
        inputs[tensor_name] = from_raw(tensor_name, datatype, shape, tail[position : position + size])
        position += size
    if position != len(tail):
        raise InvalidRequest(f"{len(tail) - position} bytes of the body belong to no input")
    parameters = _parameters(document)
    wanted = _items(document, "outputs") if "outputs" in document else []
    by_default = parameters.get("binary_data_output") is True
    raw_names: dict[str, bool] = {}
    for output in wanted:
        own = _parameters(output)
        refuse({key: value for key, value in own.items() if value not in (0, None)})
        raw_names[str(output.get("name", ""))] = own.get("binary_data", by_default) is True
    call = Call(
        model=name,
        version=version,
        id=str(document.get("id", "")),
        inputs=inputs,
        outputs=tuple(raw_names),
        allowances=allowances_of(parameters),
    )
    return call, lambda output_name: raw_names.get(output_name, by_default)


def format_answer(
    models: Models, call: Call, outputs: list[Array], as_raw: Callable[[str], bool]
) -> tuple[bytes, list[bytes]]:
    """Return the JSON document of an answer, and the tensors that follow it."""
    listed: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, datatype, array in models.select(call, outputs):
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if as_raw(name):
            tail.append(to_raw(array))
            tensor["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            tensor["data"] = array.reshape(-1).tolist()
        listed.append(tensor)
    metadata = models.metadata(call.model, call.version)
    document = {"model_name": call.model, "model_version": metadata["versions"][0], "outputs": listed}
    if call.id:
        document["id"] = call.id
    try:
        return json.dumps(document, allow_nan=False).encode(), tail
    except ValueError as error:
        raise InvalidRequest("an output is not finite, which JSON cannot say: ask for binary data") from error


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body must be a JSON document: {error}") from error


def _items(document: Any, key: str) -> list[dict[str, Any]]:
    items = document.get(key) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequest(f"the document must have {key!r}, a list of objects")
    return items


def _parameters(item: Mapping[str, Any]) -> dict[str, Any]:
    parameters = item.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, got {str(parameters)[:60]}")
    return parameters


__all__ = ["UnknownModel", "format_answer", "inference_app", "parse_request"]
