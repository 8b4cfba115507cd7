"""Streams of requests and of their answers over gRPC, on a server of grpcio's, blocking or asyncio.

Rules, and why they hold:

* A stream is a way to send, not an order: its requests are queued as they come, each with a deadline of its own, and
  each is answered when it is ready. So answers may overtake each other; ids tell them apart.
* A request that fails is answered by an error message, and the stream goes on: its neighbours are not to blame.
* At most *max_in_flight* requests of a stream are without an answer that gRPC has taken. Beyond that the stream is not
  read, and HTTP/2 stops the client: what one client has sent and not fetched is bounded, and holds up nobody else.
* When the call ends, by the client's word, its deadline or a lost connection, its waiting requests leave the queue.
* On a blocking server a stream has two threads of its own, one that reads and one that writes. Both wait for the
  client, which neither a lane nor a thread of the server's pool has time for. So streams are limited in number there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

import attrs
import grpc
import grpc.aio

from sponge.errors import SpongeError
from sponge.integrations.grpc import status_of
from sponge.integrations.oip.messages import STREAM, message_class
from sponge.integrations.oip.models import Call
from sponge.integrations.outcomes import Array

MAX_STREAMS = 64
"""Open streams of a blocking server."""
FINAL = "triton_final_response"
"""Parameter of an answer: whether it is its request's last, which Triton says in streams. Here each request has one."""

Submit: TypeAlias = Callable[[Any, Any], tuple[Call, Future[list[Array]]]]
"""Queues what a message asks for in a call's context; raises `SpongeError` if it cannot."""
Write: TypeAlias = Callable[[Call, list[Array], Any], object]
"""Puts outputs into a message."""

_log = logging.getLogger("sponge")
_ModelStreamInferResponse = message_class(f"{STREAM}Response")


@attrs.frozen
class _Done:
    """A request that has ended, in whatever way."""

    request: Any
    call: Call | None
    """None if the request was refused."""
    future: Future[list[Array]]


class _Requests:
    """The requests of one stream that have not ended yet.

    Parameters
    ----------
    submit
        Queues one.
    deliver
        Takes each request once it has ended, on any thread.
    """

    def __init__(self, submit: Callable[[Any], tuple[Call, Future[list[Array]]]], deliver: Callable[[_Done], object]):
        self._submit = submit
        self._deliver = deliver
        self._lock = threading.Lock()
        self._waiting: set[Future[list[Array]]] = set()
        self.gone = False
        """Whether nobody waits for answers any more."""

    def submit(self, request: Any) -> None:
        """Queue a request; it is delivered when it has ended, also if it is refused."""
        call: Call | None = None
        try:
            call, future = self._submit(request)
        except Exception as error:  # each request is answered, or its client would wait for it
            if not isinstance(error, SpongeError):
                _log.exception("a request could not be queued")
            future = Future()
            future.set_exception(error)
        with self._lock:
            gone = self.gone
            self._waiting.add(future)
        future.add_done_callback(partial(self._ended, request, call))
        if gone:
            future.cancel()

    def _ended(self, request: Any, call: Call | None, future: Future[list[Array]]) -> None:
        with self._lock:
            self._waiting.discard(future)
            gone = self.gone
        if not gone:
            self._deliver(_Done(request, call, future))

    def cancel(self) -> None:
        """Take out of the queue what waits: there is nobody to be answered."""
        with self._lock:
            self.gone = True
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()


def _answer(done: _Done, write: Write) -> Any:
    """Return the message that tells a client how its request ended."""
    answer = _ModelStreamInferResponse()
    try:
        outputs = done.future.result()
        assert done.call is not None
        write(done.call, outputs, answer.infer_response)
        answer.infer_response.parameters[FINAL].bool_param = True
        return answer
    except (SpongeError, CancelledError) as error:
        return _failed(done.request, error)
    except Exception as error:  # or the client would wait for an answer that never comes
        _log.exception("an answer could not be put together")
        return _failed(done.request, error)


def _failed(request: Any, error: BaseException) -> Any:
    """Return the message of an error; its text names the request, since some clients show nothing else."""
    code, details = status_of(error)
    named = f"[request id: {request.id}] " if request.id else ""
    answer = _ModelStreamInferResponse(error_message=f"{named}{code.name}: {details}")
    answer.infer_response.model_name = request.model_name
    answer.infer_response.id = request.id
    return answer


class AsyncStreams:
    """Serves streams on an asyncio server."""

    def __init__(self, submit: Submit, write: Write, max_in_flight: int) -> None:
        self._submit = submit
        self._write = write
        self._max_in_flight = max_in_flight

    async def serve(self, messages: AsyncIterator[Any], context: Any) -> None:
        """Serve one stream until the client has ended it and has all answers, or has gone."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[_Done | int | Exception] = asyncio.Queue()
        requests = _Requests(
            lambda request: self._submit(request, context),
            lambda done: loop.call_soon_threadsafe(items.put_nowait, done),
        )
        room = asyncio.Semaphore(self._max_in_flight)
        reader = asyncio.ensure_future(_read(messages, requests, room, items))
        answered, total = 0, -1
        try:
            while answered != total:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, int):
                    total = item
                    continue
                await _send_one(context, _answer(item, self._write))
                answered += 1
                room.release()
        finally:
            reader.cancel()
            requests.cancel()


async def _send_one(context: Any, answer: Any) -> None:
    """Send an answer; if its client leaves meanwhile, end as by the cancellation that gRPC is about to send."""
    try:
        await context.write(answer)
    except grpc.aio.BaseError as error:
        raise asyncio.CancelledError from error


async def _read(messages: AsyncIterator[Any], requests: _Requests, room: asyncio.Semaphore, items: Any) -> None:
    """Queue what comes while there is room, and then put how many they were, or why no more can be read."""
    count = 0
    try:
        await room.acquire()
        async for message in messages:
            requests.submit(message)
            count += 1
            await room.acquire()
        items.put_nowait(count)
    except Exception as error:
        items.put_nowait(error)


class BlockingStreams:
    """Serves streams on a blocking server: its handler."""

    experimental_non_blocking = True  # a handler that is given a function to send by, instead of being waited for

    def __init__(self, submit: Submit, write: Write, max_in_flight: int) -> None:
        self._submit = submit
        self._write = write
        self._max_in_flight = max_in_flight
        self._free = threading.Semaphore(MAX_STREAMS)

    def __call__(
        self, messages: Iterator[Any], context: Any, send_response_callback: Callable[[Any], None] | None = None
    ) -> Iterator[Any] | None:
        """Serve one stream; without a function to send by, by answers that the server waits for."""
        answers = self._open(messages, context)
        if send_response_callback is None:
            return answers
        threading.Thread(
            target=_send_all, args=(answers, send_response_callback), name="sponge-grpc-writer", daemon=True
        ).start()
        return None

    def _open(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        if not self._free.acquire(blocking=False):
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"{MAX_STREAMS} streams are open, which is the most that are served at a time")
            return iter(())
        stream = _Stream(lambda request: self._submit(request, context), self._write, self._max_in_flight)

        def on_end() -> None:
            self._free.release()
            stream.cancel()

        if not context.add_callback(on_end):
            on_end()
        threading.Thread(target=stream.read, args=(messages,), name="sponge-grpc-reader", daemon=True).start()
        return stream.answers()


def _send_all(answers: Iterator[Any], send: Callable[[Any], None]) -> None:
    for answer in answers:
        send(answer)
    send(None)


class _Stream:
    """One stream of a blocking server."""

    def __init__(
        self, submit: Callable[[Any], tuple[Call, Future[list[Array]]]], write: Write, max_in_flight: int
    ) -> None:
        self._write = write
        self._items: SimpleQueue[_Done | int | None] = SimpleQueue()  # None: the call is over
        self._requests = _Requests(submit, self._items.put)
        self._room = threading.Semaphore(max_in_flight)

    def read(self, messages: Iterator[Any]) -> None:
        """Queue what comes while there is room, and then put how many they were."""
        count = 0
        try:
            while self._room.acquire() and not self._requests.gone:
                message = next(messages, None)
                if message is None:
                    break
                self._requests.submit(message)
                count += 1
        except grpc.RpcError:  # the call is over
            self.cancel()
        self._items.put(count)

    def answers(self) -> Iterator[Any]:
        """Yield answers as they become ready, until all requests have one or the call is over."""
        answered, total = 0, -1
        while answered != total:
            item = self._items.get()
            if item is None:
                return
            if isinstance(item, int):
                total = item
                continue
            yield _answer(item, self._write)
            answered += 1
            self._room.release()

    def cancel(self) -> None:
        """End both threads, and take out of the queue what waits."""
        self._requests.cancel()
        self._items.put(None)
        self._room.release()
