"""When clients send: arrival processes as ``(rate_rps, duration_s, rng) -> sorted send times [s]``.

All of them give times in [0, *duration_s*) except where said, and all have the same mean rate; they differ
in how much comes at once. `rate_trace` takes the rate over time instead of a mean. Randomness comes from the
given generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

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


def markov(
    rate_rps: float,
    duration_s: float,
    rng: np.random.Generator,
    *,
    factor: float = 4.0,
    calm_s: float = 8.0,
    busy_s: float = 2.0,
) -> FloatArray:
    """Return the send times of a Poisson process whose rate switches at random between a calm and a busy one.

    The two-state Markov-modulated Poisson process: what clients do when they influence each other, such as cars that
    come in platoons. It begins in its stationary state, so that the mean rate holds from the first second on. One run
    strays from the mean much more than a Poisson process: its number of requests has the variance
    ``λT + 2·p·(1 − p)·(Δ·τ)²·(T/τ − 1 + exp(−T/τ))`` over T, with p the share of busy time, Δ the difference of the two
    rates, and 1/τ = 1/calm + 1/busy.

    Parameters
    ----------
    rate_rps, duration_s, rng
        As for `constant`; *rate_rps* is the mean over both states.
    factor
        Rate of the busy state over that of the calm one, ≥ 1.
    calm_s, busy_s
        Mean lengths of the states [s], > 0; each length is exponential.

    Returns
    -------
    ndarray
        Send times [s], ascending, shape ``(n_requests,)``.

    Raises
    ------
    ValueError
        As for `constant`, or if *factor*, *calm_s* or *busy_s* is out of range, or more than a hundred million
        changes of state would be made.
    """
    _check(rate_rps, duration_s)
    _check_factor(factor)
    for name, value in (("calm_s", calm_s), ("busy_s", busy_s)):
        if not (math.isfinite(value) and value > 0 and duration_s / value <= MAX_REQUESTS):
            raise ValueError(f"{name} must be positive and not tiny beside duration_s, got {value!r}")
    calm_rps = rate_rps * (calm_s + busy_s) / (calm_s + factor * busy_s)
    busy = bool(rng.random() < busy_s / (calm_s + busy_s))
    starts_s, rates_rps = [0.0], [factor * calm_rps if busy else calm_rps]
    while (at_s := starts_s[-1] + rng.exponential(busy_s if busy else calm_s)) < duration_s:
        busy = not busy
        starts_s.append(at_s)
        rates_rps.append(factor * calm_rps if busy else calm_rps)
    return _piecewise(np.array(starts_s), np.array(rates_rps), duration_s, rng)


def rate_trace(
    times_s: npt.ArrayLike, rates_rps: npt.ArrayLike, duration_s: float, rng: np.random.Generator
) -> FloatArray:
    """Return the send times of a Poisson process whose rate follows a step function.

    Parameters
    ----------
    times_s
        Start of each step [s], shape ``(n_steps,)``, ascending from 0.
    rates_rps
        Rate from each start to the next [1/s], shape ``(n_steps,)``, ≥ 0; the last holds to *duration_s*.
    duration_s
        Length [s], > 0; steps that begin later do not count.
    rng
        Gives numbers and instants.

    Returns
    -------
    ndarray
        Send times [s], ascending, shape ``(n_requests,)``.

    Raises
    ------
    ValueError
        If the times do not ascend from 0, a rate is negative or not finite, the shapes differ, or more than a hundred
        million requests would be made.
    """
    _check(1.0, duration_s)
    times = np.asarray(times_s, dtype=np.float64)
    rates = np.asarray(rates_rps, dtype=np.float64)
    if times.ndim != 1 or times.shape != rates.shape or not times.size:
        raise ValueError(
            "times_s and rates_rps must be one-dimensional, of equal length and not empty, "
            f"got shapes {times.shape} and {rates.shape}"
        )
    if times[0] != 0 or not np.all(np.isfinite(times)) or not np.all(np.diff(times) >= 0):
        raise ValueError(f"times_s must be finite and ascend from 0, got {times.tolist()[:5]!r}")
    if not np.all(np.isfinite(rates) & (rates >= 0)):
        raise ValueError(
            f"rates_rps must be finite and not negative, got {float(rates[~(np.isfinite(rates) & (rates >= 0))][0])!r}"
        )
    kept = times < duration_s
    return _piecewise(times[kept], rates[kept], duration_s, rng)


def surges(
    rate_rps: float,
    duration_s: float,
    rng: np.random.Generator,
    *,
    factor: float = 3.0,
    length_s: float = 10.0,
    every_s: float = 60.0,
) -> FloatArray:
    """Return the send times of a Poisson process that a surge visits once in each *every_s* seconds.

    The surge is in the middle of its period, so that what a policy has learnt in between is put to the test. A workload
    shorter than *every_s* is one period, with a surge that is shorter in proportion.

    Parameters
    ----------
    rate_rps, duration_s, rng
        As for `constant`; *rate_rps* is the mean, surges included: the rate between them is lower.
    factor
        Rate in a surge over that between surges, ≥ 1.
    length_s, every_s
        Length of a surge, and of a period [s]; 0 < *length_s* ≤ *every_s*.

    Returns
    -------
    ndarray
        Send times [s], ascending, shape ``(n_requests,)``.

    Raises
    ------
    ValueError
        As for `constant`, or if *factor*, *length_s* or *every_s* is out of range, or more than a hundred million
        surges would be made.
    """
    _check(rate_rps, duration_s)
    _check_factor(factor)
    if not (0 < length_s <= every_s < math.inf and duration_s / every_s <= MAX_REQUESTS):
        raise ValueError(
            "length_s and every_s must be 0 < length_s <= every_s, and every_s finite and not tiny beside duration_s, "
            f"got {length_s!r} and {every_s!r}"
        )
    period_s = min(every_s, duration_s)
    surge_s = length_s * period_s / every_s
    starts_s = np.arange(math.ceil(duration_s / period_s)) * period_s + (period_s - surge_s) / 2
    edges_s = np.append(0.0, np.column_stack([starts_s, starts_s + surge_s]).ravel())
    edges_s = np.minimum(edges_s, duration_s)
    weights = np.where(np.arange(len(edges_s)) % 2, factor, 1.0)
    # The last period may be cut: what counts is the surging time there really is.
    mean = float(weights @ np.diff(np.append(edges_s, duration_s))) / duration_s
    return _piecewise(edges_s, weights * rate_rps / mean, duration_s, rng)


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be at least 1 and finite, got {factor!r}")


def _piecewise(starts_s: FloatArray, rates_rps: FloatArray, duration_s: float, rng: np.random.Generator) -> FloatArray:
    lengths_s = np.diff(np.append(starts_s, duration_s))
    means = rates_rps * lengths_s
    if means.sum() > MAX_REQUESTS:
        raise ValueError(f"rates_rps must give at most {MAX_REQUESTS:,} requests, got {means.sum():g}")
    counts = rng.poisson(means)
    begins_s, spans_s = np.repeat(starts_s, counts), np.repeat(lengths_s, counts)
    times_s: FloatArray = begins_s + rng.random(len(begins_s)) * spans_s
    # Rounding may reach the end of a step, which for the last one is outside.
    return np.sort(np.minimum(times_s, np.nextafter(duration_s, 0.0)))


PROCESSES: dict[str, ArrivalProcess] = {
    "constant": constant,
    "poisson": poisson,
    "bursts": bursts,
    "markov": markov,
    "surges": surges,
}
"""The processes by name, as commands offer them."""
