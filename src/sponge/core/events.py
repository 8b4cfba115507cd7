"""What happened: the only way into a controller. Every event is handed over with the instant at which it is handled."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from sponge.core.values import Request


@attrs.frozen(slots=True)
class Arrived:
    """A request was accepted by the shell."""

    request: Request
    more: bool = False
    """Whether another one arrived together with it and is handed over next. Then that is waited for: who decides about
    the first of a burst by itself gives it a lane that all of them need."""


@attrs.frozen(slots=True)
class Cancelled:
    """The client gave up; has no effect once the request runs or is done."""

    request_id: int


@attrs.frozen(slots=True)
class BatchFinished:
    """A lane is free again."""

    lane: int
    ok: bool = True
    """False if the model raised, or nothing was left to run: the duration then says nothing about the model."""
    service_s: float | None = None
    """Duration of the run alone [s], where the shell measures it; else the time since the dispatch counts."""


@attrs.frozen(slots=True)
class CpuApplied:
    """The shell has carried out a `SetCpu`; ``cores`` is what is now in force."""

    cores: float


@attrs.frozen(slots=True)
class Drain:
    """No request will arrive any more: wait for no company, serve what is queued."""


@attrs.frozen(slots=True)
class Abort:
    """Turn away everything that is still queued; running batches finish."""


@attrs.frozen(slots=True)
class Tick:
    """Nothing happened but time; sent at `Controller.next_wakeup`."""


Event: TypeAlias = Arrived | Cancelled | BatchFinished | CpuApplied | Drain | Abort | Tick
