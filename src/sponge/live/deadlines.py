"""Until when an answer is due: what callers may write, as one float.

Rules, and why they hold:

* Whatever Python takes for a number is taken (numpy scalars, `Decimal`, `Fraction`), but no text, and no truth value:
  ``budget_s=True`` is a slip.
* No NaN gets past here: compared with anything it says no, so it would have no place in the queue.
* An instant in decades is a time of day, or milliseconds, by mistake, and would never be late: it is refused.
* An instant that nobody will see at all is no deadline, and is ``inf`` from here on: sums and quotients of it stay free
  of overflow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_NO_DEADLINE = 1e15
"""Instants from here on are taken for no deadline [s]: thirty million years."""

_OF_ANOTHER_CLOCK_S = 1e9
"""So far ahead no instant is meant [s], thirty years: ``time.time()`` is, on a clock that began with the machine."""


def deadline_of(now: float, budget_s: float | None, deadline: float | None, slo_s: float | None) -> float:
    """Return the instant by which a request is due [s].

    Parameters
    ----------
    now
        Instant of its arrival [s].
    budget_s
        Time left for it [s].
    deadline
        The instant itself, instead [s].
    slo_s
        Its budget if neither is given [s].

    Raises
    ------
    ValueError, TypeError
        If both are given, or nothing, or no number, or an instant of another clock.
    """
    if deadline is None:
        if budget_s is None:
            budget_s = slo_s
            if budget_s is None:
                raise ValueError(
                    "budget_s or deadline must be given, since the scheduler has no slo_s: budget_s is the time left "
                    "for this request [s], slo_s (of wrap and Scheduler) that of all which bring none"
                )
        deadline = now + seconds("budget_s", budget_s)
    elif budget_s is not None:
        raise ValueError(f"only one of budget_s and deadline may be given, got {budget_s!r} and {deadline!r}")
    else:
        deadline = seconds("deadline", deadline)
        if _OF_ANOTHER_CLOCK_S < deadline - now < _NO_DEADLINE:
            raise ValueError(
                f"deadline must be an instant on the scheduler's clock, which is at {now:.3f} (Scheduler.now()), "
                f"got {deadline!r}: is it of time.time()? Give budget_s, what is left of the time, instead"
            )
    return deadline if deadline < _NO_DEADLINE else math.inf


def seconds(name: str, value: Any) -> float:
    """Return an argument as a float [s]; raise ``TypeError`` or ``ValueError``, naming it, if it is not a number."""
    if type(value) is not float:
        if isinstance(value, (bool, np.bool_, str, bytes, bytearray)):
            raise TypeError(f"{name} must be a number of seconds, got {value!r}")
        try:
            value = float(value)
        except OverflowError:  # an integer of more than 300 digits
            value = math.inf if value > 0 else -math.inf
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a number of seconds, got {value!r}") from error
    if math.isnan(value):
        raise ValueError(f"{name} must be a number of seconds, got {value!r}")
    return float(value)
