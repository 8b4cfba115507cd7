"""Unit jobs with windows on one machine of variable speed: how slow it may run, and what a constant speed leaves.

Every request is one unit of divisible work that must be done between its arrival and its deadline.

* `edf` runs the earliest deadline first at a constant speed and drops what a deadline leaves undone. It does as much
  work as any order can: the undone work is least.
* `flattest` returns the speed over time that is the least possible in the sense of majorisation: it is the cheapest for
  every convex cost of speed at once (Yao, Demers, Shenker 1995, whose algorithm removes the interval of highest
  intensity first). Here it is found by decomposition: run `edf` at the average speed; if nothing is left undone, the
  average is the answer; otherwise the time that the undone work could be moved to, however indirectly, needs more
  than the average and the rest less, and the two are problems of their own (Fujishige 1980; Groenevelt 1991).
"""

from __future__ import annotations

import heapq
import math
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.intp]

_NOTHING = 1e-9
"""Work that counts as none [requests]; also a relative difference of speeds that is none."""
_NO_TIME = 1e-13
"""Share of an instant that is rounding: axes are cut and put together again."""


@attrs.frozen(kw_only=True, eq=False)
class Sweep:
    """What earliest-deadline-first does at a constant speed."""

    undone: FloatArray
    """Work left of each job at its deadline [requests], shape ``(n,)``."""
    starts_s: list[float]
    """Pieces of time in which one job ran, in order."""
    ends_s: list[float]
    jobs: list[int]

    @property
    def total_undone(self) -> float:
        """Least work that is left undone at this speed [requests]."""
        return math.fsum(self.undone)


def edf(arrived_at_s: FloatArray, deadline_s: FloatArray, rps: float) -> Sweep:
    """Run unit jobs at a constant speed, the earliest deadline first, dropping what a deadline leaves undone.

    Parameters
    ----------
    arrived_at_s, deadline_s
        Windows [s], shape ``(n,)``, arrivals ascending; deadlines may be ``inf``.
    rps
        Speed [requests per second], > 0.

    Returns
    -------
    Sweep
        No schedule, preemptive or not, does more work by the deadlines at this speed: to swap work into deadline
        order never makes an early deadline's work impossible.
    """
    arrivals: list[float] = [*arrived_at_s.tolist(), math.inf]
    deadlines: list[float] = deadline_s.tolist()
    count, unit_s = len(deadlines), 1.0 / rps
    left_s = [unit_s] * count
    undone = np.zeros(count)
    starts, ends, jobs = list[float](), list[float](), list[int]()
    queue: list[tuple[float, int]] = []
    now, following = -math.inf, 0
    while following < count or queue:
        if not queue:
            now = max(now, arrivals[following])
        while following < count and arrivals[following] <= now:
            heapq.heappush(queue, (deadlines[following], following))
            following += 1
        deadline, job = queue[0]
        if deadline <= now:
            heapq.heappop(queue)
            undone[job] = left_s[job] / unit_s
            continue
        end = min(now + left_s[job], deadline, arrivals[following])
        if end == now + left_s[job]:
            heapq.heappop(queue)
            left_s[job] = 0.0
        else:
            left_s[job] -= end - now
        if end > now:
            starts.append(now)
            ends.append(end)
            jobs.append(job)
        now = end
    undone[undone < _NOTHING] = 0.0
    return Sweep(undone=undone, starts_s=starts, ends_s=ends, jobs=jobs)


@attrs.frozen(kw_only=True, eq=False)
class Speed:
    """Speed over time: ``rps[i]`` from ``times_s[i]`` to ``times_s[i + 1]``; ``times_s`` has one more entry."""

    times_s: FloatArray
    rps: FloatArray

    def above(self, rps: FloatArray) -> FloatArray:
        """Return the work done above each of some speeds, ``∫ (speed − rps)⁺ dt`` [requests], shape of *rps*.

        For the flattest speed this is the least work that *any* order leaves undone at that constant speed.
        """
        order = np.argsort(self.rps)
        speeds, lengths = self.rps[order], np.diff(self.times_s)[order]
        work = np.append(np.cumsum((speeds * lengths)[::-1])[::-1], 0.0)
        time_s = np.append(np.cumsum(lengths[::-1])[::-1], 0.0)
        first = np.searchsorted(speeds, rps, side="right")
        return np.asarray(np.maximum(work[first] - rps * time_s[first], 0.0))


def flattest(arrived_at_s: FloatArray, deadline_s: FloatArray) -> Speed:
    """Return the least speed over time at which every unit job can be done within its window.

    Parameters
    ----------
    arrived_at_s, deadline_s
        Windows [s], shape ``(n,)``, arrivals ascending, every deadline finite and after its arrival.

    Returns
    -------
    Speed
        From the first arrival to the last deadline; 0 where no window is open. Some ``n·log n`` operations for every
        halving that it takes, 20 or so in practice.
    """
    if len(arrived_at_s) == 0:
        return Speed(times_s=np.zeros(1), rps=np.zeros(0))
    pieces: list[tuple[float, float, float]] = []
    problems = [_whole(arrived_at_s, deadline_s)]
    while problems:
        problem = problems.pop()
        parts = problem.split()
        if not parts:
            pieces += problem.pieces(problem.average_rps)
        problems += parts
    table = np.array(sorted(pieces))
    slivers = table[:, 1] - table[:, 0] <= _NO_TIME * np.max(np.abs(table[:, :2]))
    times_s, ends_s, rps = table[~slivers].T
    changes = np.concatenate([[True], np.abs(np.diff(rps)) > _NOTHING * rps[1:]])
    return Speed(times_s=np.append(times_s[changes], ends_s[-1]), rps=rps[changes])


@attrs.frozen(eq=False)
class _Problem:
    """Unit jobs on an axis from 0 to ``length_s`` that is put together from pieces of real time."""

    arrived_s: FloatArray
    deadline_s: FloatArray
    offsets_s: FloatArray
    """Where each piece lies on the axis; one more entry: the length."""
    real_s: FloatArray
    """Where each piece begins in real time."""

    @property
    def length_s(self) -> float:
        return float(self.offsets_s[-1])

    @property
    def average_rps(self) -> float:
        return len(self.arrived_s) / self.length_s

    def pieces(self, rps: float) -> list[tuple[float, float, float]]:
        ends_s = self.real_s + np.diff(self.offsets_s)
        return [(start, end, rps) for start, end in zip(self.real_s.tolist(), ends_s.tolist(), strict=True)]

    def split(self) -> list[_Problem]:
        """Return the parts that need more and less than the average; none if the average does for all."""
        if len(self.arrived_s) == 0:
            return []
        sweep = edf(self.arrived_s, self.deadline_s, self.average_rps)
        tight = _reachable(self.arrived_s, self.deadline_s, sweep)
        if not tight.any():
            return []
        spans = np.clip(_union(self.arrived_s[tight], self.deadline_s[tight]), 0.0, self.length_s)
        if float(np.sum(spans[:, 1] - spans[:, 0])) >= self.length_s * (1 - 1e-12):
            return []  # what is left undone is rounding
        arrived_s, deadline_s = self.arrived_s[tight], self.deadline_s[tight]
        span_of = np.searchsorted(spans[:, 0], arrived_s, side="right") - 1
        parts = []
        for i, (start, end) in enumerate(spans.tolist()):
            inside = span_of == i
            offsets_s, real_s = self._cut(np.array([[start, end]]))
            parts.append(_Problem(arrived_s[inside] - start, deadline_s[inside] - start, offsets_s, real_s))
        edges = spans.ravel()
        gaps = np.concatenate([[0.0], edges, [self.length_s]]).reshape(-1, 2)
        offsets_s, real_s = self._cut(gaps)
        removed = np.repeat(np.cumsum(spans[:, 1] - spans[:, 0]), 2)
        removed[::2] -= spans[:, 1] - spans[:, 0]
        rest_arrived, rest_deadline = self.arrived_s[~tight], self.deadline_s[~tight]
        rest_arrived = rest_arrived - np.interp(rest_arrived, edges, removed)
        rest_deadline = rest_deadline - np.interp(rest_deadline, edges, removed)
        order = np.argsort(rest_arrived, kind="stable")
        parts.append(_Problem(rest_arrived[order], rest_deadline[order], offsets_s, real_s))
        return parts

    def _cut(self, spans: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return offsets and real time of what lies in some spans of the axis, put together."""
        lengths, real = [], []
        for start, end in spans.tolist():
            first = max(int(np.searchsorted(self.offsets_s, start, side="right")) - 1, 0)
            last = int(np.searchsorted(self.offsets_s[:-1], end, side="left"))
            low = np.maximum(self.offsets_s[first:last], start)
            high = np.minimum(self.offsets_s[first + 1 : last + 1], end)
            kept = high > low
            lengths.append((high - low)[kept])
            real.append((self.real_s[first:last] + (low - self.offsets_s[first:last]))[kept])
        return np.concatenate([[0.0], np.cumsum(np.concatenate(lengths))]), np.concatenate(real)


def _whole(arrived_at_s: FloatArray, deadline_s: FloatArray) -> _Problem:
    start, end = float(arrived_at_s[0]), float(np.max(deadline_s))
    return _Problem(arrived_at_s - start, deadline_s - start, np.array([0.0, end - start]), np.array([start]))


def _union(starts_s: FloatArray, ends_s: FloatArray) -> FloatArray:
    """Return the union of intervals, given by ascending starts, as separate ones, shape ``(n, 2)``."""
    reach = np.maximum.accumulate(ends_s)
    first = np.concatenate([[True], starts_s[1:] > reach[:-1]])
    last = np.append(np.flatnonzero(first)[1:] - 1, len(starts_s) - 1)
    return np.stack([starts_s[first], reach[last]], axis=1)


def _reachable(arrived_s: FloatArray, deadline_s: FloatArray, sweep: Sweep) -> npt.NDArray[np.bool_]:
    """Return the jobs whose time the undone work competes for, directly or by pushing others aside, shape ``(n,)``."""
    reached = sweep.undone > 0
    stack: list[int] = np.flatnonzero(reached).tolist()
    first = np.searchsorted(np.array(sweep.ends_s), arrived_s, side="right").tolist()
    beyond = np.searchsorted(np.array(sweep.starts_s), deadline_s, side="left").tolist()
    jobs = sweep.jobs
    unseen = list(range(len(jobs) + 1))  # unseen[k] leads to the first piece from k on that was not looked at
    while stack:
        job = stack.pop()
        k = _find(unseen, first[job])
        while k < beyond[job]:
            unseen[k] = k + 1
            other = jobs[k]
            if not reached[other]:
                reached[other] = True
                stack.append(other)
            k = _find(unseen, k + 1)
    return reached


def _find(leads_to: list[int], k: int) -> int:
    end = k
    while leads_to[end] != end:
        end = leads_to[end]
    while leads_to[k] != end:
        leads_to[k], k = end, leads_to[k]
    return end
