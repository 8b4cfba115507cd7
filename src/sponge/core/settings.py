"""How a controller behaves, apart from the latency model and the core range, which the solver holds."""

from __future__ import annotations

import enum

import attrs


class Late(enum.Enum):
    """What to do with a request that can no longer meet its deadline."""

    REJECT = "reject"
    """Tell the client at once."""
    SERVE = "serve"
    """Serve it when nothing that can still be saved is waiting."""


@attrs.frozen(kw_only=True)
class Settings:
    """How a `Controller` behaves, apart from the latency model and the core range, which the solver holds."""

    late: Late = attrs.field(default=Late.REJECT, converter=Late)
    max_queue: int = attrs.field(default=1024, validator=attrs.validators.ge(1))
    """Waiting requests at most; a further one is turned away."""
    guard_s: float = attrs.field(default=0.002, validator=attrs.validators.ge(0))
    """Time kept between the predicted end of a batch and the deadline, for handing over [s]."""
    idle_cores: float = attrs.field(default=0.1, validator=attrs.validators.gt(0))
    """Allocation while nothing runs [cores]."""
    linger_s: float = attrs.field(default=0.0005, validator=attrs.validators.ge(0))
    """How long cores that are no longer needed are kept before they are given back [s]: about what giving them back and
    asking for them again costs, so that requests that follow closely do not pay for it each time."""
    resize_delay_s: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    """How long it takes until a larger allocation is in force [s]: 0 for a quota, more where it takes a pod's resize or
    a replica's start. Above 0, batches start only on cores that are in force, and the largest demand of the last ten
    delays is kept allocated, since what is asked for when it is needed comes too late. It begins with all cores."""
    rate_time_constant_s: float = attrs.field(default=2.0, validator=attrs.validators.gt(0))
    """How much of the past counts in the arrival rate [s]."""
    follow_drift: bool = True
    """Scale the latency model by how long recent batches really took."""
    hold: bool = True
    """Let a batch wait for company where that is cheaper and puts no deadline at risk."""
