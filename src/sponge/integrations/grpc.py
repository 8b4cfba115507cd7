"""Deadlines in a gRPC service of your own (grpcio, asyncio or blocking servers).

Rules, and why they hold:

* The deadline of the call is the request's: gRPC has taken from it, since the head arrived, what the message took to
  arrive. The service's SLO, if the rule has one, runs from the start of the handler, the earliest moment that a handler
  knows of.
* When the client cancels, hangs up or gives up at its deadline, gRPC ends the call, and the request leaves the queue.
* Errors end the call with the status that belongs to them (`sponge.integrations.outcomes`).

A blocking server gives each call that a handler waits for a thread of its pool: what does not fit into the pool waits
outside of the scheduler, where nobody looks at deadlines. So give the pool as many threads as there are calls that may
wait, or use an asyncio server, where a waiting call is a task. (`sponge.integrations.oip.service` needs no thread for a
waiting call in either.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import grpc

from sponge.deadlines import DeadlineRule, Due
from sponge.errors import SpongeError
from sponge.integrations.outcomes import Array, outcome_of, submit

if TYPE_CHECKING:
    from sponge.live.scheduler import Scheduler

MAX_DETAILS = 1000
"""Characters of an error's text: it travels in a header, whose size is limited."""

SOURCE = "grpc deadline"


def due_of(
    context: Any,
    rule: DeadlineRule,
    *,
    now: float,
    head_at: float | None = None,
    allowances: Mapping[str, float] | None = None,
) -> Due:
    """Return by when the answer to a call must leave.

    Parameters
    ----------
    context
        The call's, of either kind of server.
    rule
        How deadlines are found; its headers are looked up in the call's metadata.
    now
        On the scheduler's clock [s].
    head_at
        When the call's head arrived, where that is known; else *now* [s].
    allowances
        Further sources by name [s from *head_at*].
    """
    head_at = now if head_at is None else head_at
    claims = dict(allowances or {})
    left_s = context.time_remaining()
    if left_s is not None and left_s < 1e9:  # without a deadline: None or centuries, by kind and version
        claims[SOURCE] = now - head_at + left_s
    return rule.decide(context.invocation_metadata() or (), head_at=head_at, allowances=claims)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return code and details with which a call ends that failed by *error*."""
    return grpc.StatusCode[outcome_of(error).grpc_code], str(error)[:MAX_DETAILS] or "cancelled"


async def infer(
    context: Any,
    scheduler: Scheduler,
    inputs: Mapping[str, Array],
    *,
    rule: DeadlineRule | None = None,
) -> list[Array]:
    """Queue a request with the deadline of its call, and wait for its outputs; for handlers of asyncio servers.

    If it ends without outputs, the call is aborted with the status that belongs to it. Arguments are those of
    `infer_blocking`.
    """
    try:
        due = due_of(context, rule or DeadlineRule(), now=scheduler.now())
        return await asyncio.wrap_future(submit(scheduler, inputs, due.deadline))
    except SpongeError as error:
        await context.abort(*status_of(error))
        raise AssertionError("abort raises") from error


def infer_blocking(
    context: Any,
    scheduler: Scheduler,
    inputs: Mapping[str, Array],
    *,
    rule: DeadlineRule | None = None,
) -> list[Array]:
    """Queue a request with the deadline of its call, and wait for its outputs; for handlers of blocking servers.

    If it ends without outputs, the call is aborted with the status that belongs to it.

    Parameters
    ----------
    context
        The call's.
    scheduler
        The model's.
    inputs
        As for `sponge.Scheduler.submit`.
    rule
        How deadlines are found; by default from the call alone, or else from the scheduler's SLO.
    """
    try:
        due = due_of(context, rule or DeadlineRule(), now=scheduler.now())
        future = submit(scheduler, inputs, due.deadline)
        if not context.add_callback(future.cancel):  # the call is over already
            future.cancel()
        return future.result()
    except (SpongeError, CancelledError) as error:
        context.abort(*status_of(error))
        raise AssertionError("abort raises") from error
