"""Deadlines in an ASGI service (Starlette, FastAPI, plain ASGI), under uvicorn or any other server.

Rules, and why they hold:

* `DeadlineMiddleware` runs when a request's head has arrived, before its body has: its clock reading is where the
  deadline starts. What a slow upload takes is then gone from the budget by itself, whoever asks for it.
* An error of sponge that leaves the application becomes a status that says what happened (see
  `sponge.integrations.outcomes`) with a body of ``application/problem+json``; other errors pass through.
* While a request waits in `infer` for longer than a moment, one task listens whether the client hangs up; then the
  request is taken out of the queue. There is one listener for a request, and what it reads that was meant for the
  application is kept for it: two tasks that receive at the same time would steal each other's messages.
* No package is needed: ASGI is a calling convention.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

from sponge.deadlines import DeadlineRule, Due
from sponge.errors import QueueFull, SpongeError
from sponge.integrations.outcomes import Array, ClientGone, outcome_of, retry_after_s, submit

if TYPE_CHECKING:
    from sponge.live.scheduler import Scheduler

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

STATE_KEY = "sponge"
"""Where the middleware leaves a request's `Arrival`: ``request.state.sponge`` in Starlette and FastAPI."""

_LISTEN_AFTER_S = 0.02
"""How long an answer is waited for before anybody listens whether its client hangs up [s]: most answers are there by
then, and have no use for a task that listens."""

_log = logging.getLogger("sponge")


class Arrival:
    """What was measured of one request: when its head came, when its body had come, and when the answer is due."""

    def __init__(self, receive: Receive, due: Due, head_at: float, clock: Callable[[], float]) -> None:
        self.due = due
        self.head_at = head_at
        self.body_at: float | None = None
        """When the last byte of the body was handed on; None before."""
        self.gone = False
        """Whether the client has hung up."""
        self.retry_after_s = 1
        self._receive = receive
        self._clock = clock
        self._kept: deque[Message] = deque()
        self._heard = False  # whether any message was received
        self._listener: asyncio.Task[None] | None = None

    @property
    def upload_s(self) -> float | None:
        """How long the body took to arrive after the head [s]; None while it has not."""
        return None if self.body_at is None else self.body_at - self.head_at

    @property
    def budget_s(self) -> float | None:
        """What is left now until the answer must leave [s]; None if nobody set a deadline."""
        return self.due.budget_s(self._clock())

    async def receive(self) -> Message:
        """Receive a message for the application: ASGI's ``receive``, for what runs inside of the middleware."""
        while True:
            if self._kept:
                return self._kept.popleft()
            if self.gone:
                return {"type": "http.disconnect"}
            if self._listener is None or self._listener.done():
                return await self._next()
            await asyncio.wait({self._listener})

    async def result(self, future: Future[list[Array]]) -> list[Array]:
        """Wait for a submitted request; cancel it if the client hangs up or the waiting task is cancelled.

        Raises
        ------
        ClientGone
            If the client has hung up.
        SpongeError
            What the future raises.
        """
        answer = asyncio.wrap_future(future)
        listener: asyncio.Task[None] | None = None
        hung_up = False

        def on_end(_: object) -> None:
            nonlocal hung_up
            hung_up = self.gone and answer.cancel()

        def listen() -> None:
            nonlocal listener
            listener = self._listen()
            if listener is not None:
                listener.add_done_callback(on_end)
            elif self.gone:  # as an earlier listener has heard
                on_end(None)

        timer = asyncio.get_running_loop().call_later(_LISTEN_AFTER_S, listen)
        try:
            if self.gone:
                raise ClientGone
            return await answer
        except asyncio.CancelledError:
            if hung_up:  # it was us, not somebody who wants this task to end
                raise ClientGone from None
            raise
        finally:
            answer.cancel()
            timer.cancel()
            if listener is not None:
                listener.remove_done_callback(on_end)

    def stop(self) -> None:
        """Listen no more: the request is over."""
        if self._listener is not None:
            self._listener.cancel()

    def _listen(self) -> asyncio.Task[None] | None:
        """Return the task that ends when the client hangs up; None while the application has yet to read the body."""
        if self.gone:
            return None
        idle = self._listener is None or self._listener.done()
        if idle and (self.body_at is not None or not self._heard):
            self._listener = asyncio.ensure_future(self._listen_until_gone())
        return self._listener

    async def _listen_until_gone(self) -> None:
        while not self.gone:
            message = await self._next()
            if not self.gone:
                self._kept.append(message)
                if self.body_at is None:  # there is more of the body: for the application to read
                    return

    async def _next(self) -> Message:
        message = await self._receive()
        self._heard = True
        if message["type"] == "http.disconnect":
            self.gone = True
        elif self.body_at is None and not message.get("more_body", False):
            self.body_at = self._clock()
        return message


class DeadlineMiddleware:
    """Gives every HTTP request a deadline, and tells clients by a status how their request ended.

    ``app.add_middleware(DeadlineMiddleware, rule=DeadlineRule(slo_s=1.0))`` in Starlette and FastAPI, whose own handler
    of unknown errors stays outside of it; any other ASGI application is wrapped: ``DeadlineMiddleware(app, rule=...)``.
    Add it last: it then surrounds the others, and what they take counts.

    Parameters
    ----------
    app
        The application.
    rule
        How deadlines are found; by default from the headers alone.
    clock
        The scheduler's: seconds, never decreasing.
    wall_clock
        Seconds since 1970, for clients that name an instant.
    """

    def __init__(
        self,
        app: App,
        *,
        rule: DeadlineRule | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.app = app
        self.rule = rule or DeadlineRule()
        self._clock = clock
        self._wall_clock = wall_clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI asks for."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head_at = self._clock()
        due = self.rule.decide(scope["headers"], head_at=head_at, wall_at=self._wall_clock())
        if due.ignored:
            _log.debug("ignored of %s %s: %s", scope["method"], scope["path"], "; ".join(due.ignored))
        arrival = Arrival(receive, due, head_at, self._clock)
        scope.setdefault("state", {})[STATE_KEY] = arrival
        started = False

        async def tracking_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, arrival.receive, tracking_send)
        except ClientGone:
            pass  # nobody is there to be told
        except SpongeError as error:
            if started:
                raise
            await send_problem(send, error, retry_after_s=arrival.retry_after_s)
        finally:
            arrival.stop()


async def infer(
    request: Any,
    scheduler: Scheduler,
    inputs: Mapping[str, Array],
    *,
    budget_s: float | None = None,
) -> list[Array]:
    """Queue one request with the deadline of the HTTP request it came by, and wait for its outputs.

    Parameters
    ----------
    request
        Starlette's or FastAPI's, or an ASGI scope.
    scheduler
        The model's.
    inputs
        As for `sponge.Scheduler.submit`.
    budget_s
        A further bound, from now [s].

    Raises
    ------
    InvalidRequest
        If the inputs do not fit the model.
    ClientGone
        If the client hung up while the request was waiting; the request is cancelled.
    DeadlineExceeded, QueueFull, ModelError, SchedulerClosed
        As for `sponge.Scheduler.submit`; left to pass, the middleware makes statuses of them.
    RuntimeError
        If the application is not wrapped in `DeadlineMiddleware`.
    """
    arrival = arrival_of(request)
    try:
        return await arrival.result(submit(scheduler, inputs, arrival.due.deadline, budget_s))
    except QueueFull:
        arrival.retry_after_s = retry_after_s(scheduler)
        raise


def arrival_of(request: Any) -> Arrival:
    """Return what the middleware measured of *request* (Starlette's, FastAPI's, or an ASGI scope).

    Raises
    ------
    RuntimeError
        If the application is not wrapped in `DeadlineMiddleware`.
    """
    scope = getattr(request, "scope", request)
    arrival = scope.get("state", {}).get(STATE_KEY)
    if not isinstance(arrival, Arrival):
        raise RuntimeError("the application must be wrapped: app.add_middleware(DeadlineMiddleware, rule=...)")
    return arrival


async def send_problem(send: Send, error: SpongeError, *, retry_after_s: int = 1) -> None:
    """Answer with the status that belongs to *error*, and what happened in words (RFC 9457)."""
    outcome = outcome_of(error)
    problem = {"type": "about:blank", "title": outcome.title, "status": outcome.http_status, "detail": str(error)}
    headers = {"retry-after": str(retry_after_s)} if outcome.http_status == 429 else {}
    await send_json(send, outcome.http_status, problem, kind="application/problem+json", headers=headers)


async def send_json(
    send: Send,
    status: int,
    content: Mapping[str, Any] | list[Any],
    *,
    kind: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer with a JSON document."""
    await send_bytes(send, status, json.dumps(content).encode(), kind=kind, headers=headers)


async def send_bytes(
    send: Send, status: int, body: bytes, *, kind: str, headers: Mapping[str, str] | None = None
) -> None:
    """Answer with *body* of the media type *kind*."""
    listed = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in listed.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
