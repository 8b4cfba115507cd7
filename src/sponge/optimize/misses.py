"""How few deadlines any schedule could miss: a lower bound.

Two kinds of misses are beyond every scheduler. A request is *lost at arrival* if not even a batch of one on all cores
fits into its budget. Of the others, `at_least` counts those for which there is no room, by relaxations of which the
largest counts, since each holds for every schedule:

* *Work.* Full batches on all cores have a highest throughput. At that constant speed the earliest deadline first leaves
  the least work undone; each busy period's undone work is rounded up by itself, since requests are missed as a
  whole.
* *Urgent work.* The same for the requests with small budgets alone, which cannot ride in batches that take longer.
* *Room.* Batches that serve requests with windows inside a span lie inside it themselves, and only so many fit. What
  exceeds that is missed; the spans are chosen disjoint, by dynamic programming, so that no miss counts twice.
"""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency
from sponge.optimize import envelope, fluid
from sponge.optimize.envelope import FloatArray, Limits

_ROUNDING = 1e-6
"""Requests by which sums of work are mistrusted."""
_SPAN_REQUESTS = 64
"""Requests after the first that a span may hold: longer spans are left to the relaxations by work."""


def lost_at_arrival(budgets_s: FloatArray, latency: Latency, max_cores: float) -> npt.NDArray[np.bool_]:
    """Return which requests not even a batch of one on all cores can serve in time, shape ``(n,)``.

    Budgets that are short by no more than rounding are not counted.
    """
    return np.asarray(budgets_s < latency.latency_s(1, max_cores) * (1 - 1e-9))


def at_least(arrived_at_s: FloatArray, deadline_s: FloatArray, limits: Limits, lanes: int, highest_rps: float) -> int:
    """Return a number of requests that every schedule misses or exceeds, of requests that are not lost at arrival.

    Parameters
    ----------
    arrived_at_s, deadline_s
        Windows [s], shape ``(n,)``, arrivals ascending.
    limits, lanes
        What batches may be, and how many run side by side.
    highest_rps
        Throughput that so many lanes do not exceed, see `envelope.side_by_side` [1/s].

    Returns
    -------
    int
        Zero does not say that a schedule without a miss exists.
    """
    if len(arrived_at_s) == 0:
        return 0
    budgets_s = deadline_s - arrived_at_s
    found = max(
        _by_work(arrived_at_s, deadline_s, highest_rps),
        _by_room(arrived_at_s, deadline_s, limits, lanes, highest_rps),
    )
    for batch_size, too_long_s in enumerate(limits.full_speed_s[1:].tolist(), start=1):
        urgent = budgets_s < too_long_s * (1 - 1e-9)
        if urgent.any():
            rps = _urgent_rps(attrs.evolve(limits, max_batch_size=batch_size), lanes, float(np.max(budgets_s[urgent])))
            found = max(found, _by_work(arrived_at_s[urgent], deadline_s[urgent], min(rps, highest_rps)))
    return found


def _urgent_rps(limits: Limits, lanes: int, budget_s: float) -> float:
    """Return a throughput that requests with no more than this budget do not exceed, in batches of these limits."""
    by_size = envelope.side_by_side([envelope.lane_envelope(limits)] * lanes, limits.max_cores).max_rps
    core_s = float(envelope.request_core_s(limits, np.array([budget_s]))[0])
    return min(by_size, limits.max_cores / core_s)


def _by_work(arrived_at_s: FloatArray, deadline_s: FloatArray, rps: float) -> int:
    sweep = fluid.edf(arrived_at_s, deadline_s, rps)
    if not sweep.undone.any():
        return 0
    starts, ends = np.array(sweep.starts_s), np.array(sweep.ends_s)
    begins = starts[np.concatenate([[True], starts[1:] > ends[:-1]])]
    busy_period = np.searchsorted(begins, arrived_at_s, side="right") - 1
    undone = np.bincount(busy_period, weights=sweep.undone)
    return int(np.sum(np.ceil(undone - _ROUNDING)))


def most_in(spans_s: FloatArray, limits: Limits, lanes: int, highest_rps: float) -> FloatArray:
    """Return how many requests batches can serve within spans of time at the most, shape of *spans_s* [s, > 0].

    On one lane this is exact: batches on all cores, one after the other. On several it is the least of what so many
    lanes could do if each had all cores, what the throughput allows, and what the core-seconds allow, where a batch
    in a short span has to be wide.

    More than 64 for a lane are given as 64, as many as a span is asked to hold: a budget of hours takes no longer to
    look at than one of seconds.
    """
    batch_s = limits.full_speed_s
    spans_s = spans_s * (1 + 1e-9)  # what is short by no more than rounding is not short
    longest_s = float(np.max(spans_s))
    least_s = [0.0]  # least_s[m]: shortest time in which one lane serves m requests
    while least_s[-1] <= longest_s and len(least_s) <= _SPAN_REQUESTS:
        served = len(least_s)
        before = np.array([least_s[max(served - size, 0)] for size in range(1, len(batch_s) + 1)])
        least_s.append(float(np.min(before + batch_s)))
    most = lanes * (np.searchsorted(np.array(least_s), spans_s, side="right") - 1.0)
    if lanes > 1:
        core_s = envelope.request_core_s(limits, spans_s)
        most = np.minimum(most, np.floor(limits.max_cores * spans_s / core_s + _ROUNDING))
        most = np.minimum(most, np.floor(highest_rps * spans_s + _ROUNDING))
    return np.asarray(most)


def _by_room(arrived_at_s: FloatArray, deadline_s: FloatArray, limits: Limits, lanes: int, highest_rps: float) -> int:
    """Choose disjoint spans, from an arrival to a deadline, whose windows exceed their room by the most in total."""
    count = len(arrived_at_s)
    after = min(_SPAN_REQUESTS, count)
    padded = np.concatenate([deadline_s, np.full(after, np.inf)])
    # Row i: deadlines of the requests from i on, sorted, so that column j closes a span that holds j + 1 of them.
    ends_s = np.sort(np.lib.stride_tricks.sliding_window_view(padded, after)[:count], axis=1)
    spans_s = ends_s - arrived_at_s[:, None]
    finite = np.isfinite(spans_s)
    excess = np.zeros(spans_s.shape)
    if not finite.any():
        return 0
    room = most_in(spans_s[finite], limits, lanes, highest_rps)
    excess[finite] = np.broadcast_to(np.arange(1.0, after + 1), spans_s.shape)[finite] - room
    following = np.searchsorted(arrived_at_s, ends_s, side="left")
    crowded = (np.max(excess, axis=1) > 0).tolist()
    best = np.zeros(count + 1)  # best[i]: largest total of spans that begin with the arrival of i or later
    for i in reversed(range(count)):
        best[i] = max(best[i + 1], np.max(excess[i] + best[following[i]])) if crowded[i] else best[i + 1]
    return int(best[0])
