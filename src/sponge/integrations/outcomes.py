"""What a client is told when its request ends without outputs: one table for HTTP and gRPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np

from sponge.errors import DeadlineExceeded, ModelError, QueueFull, SchedulerClosed, SpongeError

if TYPE_CHECKING:
    from sponge.live.scheduler import Scheduler

Array: TypeAlias = np.ndarray[Any, Any]

MAX_RETRY_AFTER_S = 60
"""No queue is worth waiting longer for: by then another replica is there, or the service is lost."""


class InvalidRequest(SpongeError):
    """The request cannot be served as it is: an input is missing, or of the wrong shape, type or encoding."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UnknownModel(SpongeError):
    """No model of that name and version is served here."""

    def __init__(self, name: str, version: str = "") -> None:
        self.name = name
        self.version = version
        super().__init__(f"no model {name!r}{f' of version {version!r}' if version else ''} is served here")


class NotSupported(SpongeError):
    """The client asks for something that this service never does."""


class ClientGone(SpongeError):
    """The client hung up while its request was waiting; the request was cancelled and nobody waits for an answer."""

    def __init__(self) -> None:
        super().__init__("the client hung up; its request was cancelled")


@attrs.frozen
class Outcome:
    """How an error is told to a client."""

    http_status: int
    grpc_code: str
    """Name of the `grpc.StatusCode`."""
    title: str


_OUTCOMES: tuple[tuple[type[BaseException], Outcome], ...] = (
    (DeadlineExceeded, Outcome(504, "DEADLINE_EXCEEDED", "Deadline cannot be met")),
    (QueueFull, Outcome(429, "RESOURCE_EXHAUSTED", "Too many requests are waiting")),
    (InvalidRequest, Outcome(422, "INVALID_ARGUMENT", "Invalid request")),
    (UnknownModel, Outcome(404, "NOT_FOUND", "Unknown model")),
    (NotSupported, Outcome(501, "UNIMPLEMENTED", "Not supported")),
    (ModelError, Outcome(500, "INTERNAL", "The model failed on this request")),
    (SchedulerClosed, Outcome(503, "UNAVAILABLE", "The service is shutting down")),
    (ClientGone, Outcome(499, "CANCELLED", "The client hung up")),
    (CancelledError, Outcome(499, "CANCELLED", "The request was cancelled")),
)
_UNKNOWN = Outcome(500, "INTERNAL", "Internal error")


def outcome_of(error: BaseException) -> Outcome:
    """Return how *error* is told to a client."""
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), _UNKNOWN)


def submit(
    scheduler: Scheduler, inputs: Mapping[str, Array], deadline: float | None, budget_s: float | None = None
) -> Future[list[Array]]:
    """Queue one request by the tighter of both, or by the scheduler's SLO if neither is given.

    Raises
    ------
    InvalidRequest
        If the inputs do not fit the model, or there is no deadline at all.
    SchedulerClosed
        If the scheduler is closed.
    """
    if deadline is not None and budget_s is not None:
        deadline, budget_s = min(deadline, scheduler.now() + budget_s), None
    try:
        return scheduler.submit(inputs, deadline=deadline, budget_s=budget_s)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(str(error)) from error


def retry_after_s(scheduler: Scheduler) -> int:
    """Return when a queue that is full now will be worth another try [whole seconds, at least 1].

    The time that the model needs for what is waiting, at its highest throughput. Controllers of the user's own may hold
    no latency model: then a second.
    """
    solver: Any = getattr(scheduler.controller, "solver", None)
    if solver is None:
        return 1
    lanes: int = solver.max_lanes
    rate_rps: float = lanes * float(solver.latency.throughput_rps(solver.max_batch_size, solver.max_cores / lanes))
    waiting: int = scheduler.statistics().waiting
    if not rate_rps > 0:
        return MAX_RETRY_AFTER_S
    return min(max(1, math.ceil(waiting / rate_rps)), MAX_RETRY_AFTER_S)
