"""When clients send: arrival processes as ``(rate_rps, duration_s, rng) -> sorted send times [s]``.

All of them give times in [0, *duration_s*) except where said, and all have the same mean rate; they differ
in how much comes at once. Randomness comes from the given generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from sponge.workload.bandwidth import FloatArray

ArrivalProcess: TypeAlias = Callable[[float, float, np.random.Generator], FloatArray]

MAX_REQUESTS = 100_000_000


def _check(rate_rps: float, duration_s: float) -> None:
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise ValueError(f"rate_rps must be positive, got {rate_rps!r}")
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s must be positive, got {duration_s!r}")
    if rate_rps * duration_s > MAX_REQUESTS:
        raise ValueError(f"rate_rps * duration_s must be at most {MAX_REQUESTS:,}, got {rate_rps * duration_s:g}")


def constant(rate_rps: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Return send times at equal distances 1/rate, from a random offset within the first of them.

    Parameters
    ----------
    rate_rps
        Requests per second, > 0.
    duration_s
        Length [s], > 0.
    rng
        Gives the offset.

    Returns
    -------
    ndarray
        Send times [s], ascending, shape ``(n_requests,)``.

    Raises
    ------
    ValueError
        If a number is not positive, or more than a hundred million requests would be made.
    """
    _check(rate_rps, duration_s)
    times_s: FloatArray = (np.arange(math.ceil(rate_rps * duration_s) + 1.0) + rng.random()) / rate_rps
    return times_s[times_s < duration_s]


def poisson(rate_rps: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Return the send times of a Poisson process: many independent clients.

    Parameters, result and errors as for `constant`.
    """
    _check(rate_rps, duration_s)
    # Given their number, the points of a Poisson process are independent and uniform.
    times_s: FloatArray = rng.random(rng.poisson(rate_rps * duration_s)) * duration_s
    return np.sort(times_s)


def bursts(rate_rps: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Return send times of which each second's come together at its beginning.

    Second k holds the whole numbers in [k·rate, (k+1)·rate): always *rate_rps* of them if that is whole.
    Each is sent at k plus an exponential offset of mean 1/rate, independent of the others, so that at 20
    requests/s the last of a second is sent after (1 + 1/2 + … + 1/20)/20 = 0.18 s on average. This is the
    load of the published results of the in-place scaling approach that sponge follows. A request may be
    sent after *duration_s*, with probability exp(−rate) for the last second.

    Parameters, result and errors as for `constant`.
    """
    _check(rate_rps, duration_s)
    seconds = np.floor(np.arange(math.ceil(rate_rps * duration_s)) / rate_rps)
    return np.sort(seconds + rng.exponential(1 / rate_rps, len(seconds)))


PROCESSES: dict[str, ArrivalProcess] = {"constant": constant, "poisson": poisson, "bursts": bursts}
"""The processes by name, as commands offer them."""
