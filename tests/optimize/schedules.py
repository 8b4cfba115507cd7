"""Real schedules of a handful of requests, all of them: batches that run as they do, without any relaxation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import attrs

from sponge.core.latency import Latency

Block: TypeAlias = tuple[int, ...]


@attrs.frozen(kw_only=True)
class Machine:
    """What a schedule may do."""

    latency: Latency
    widths: tuple[float, ...]
    max_cores: float
    max_batch_size: int
    lanes: int
    interference: bool = False


@attrs.frozen(kw_only=True)
class Run:
    """One batch of a schedule."""

    start: float
    end: float
    cores: float


def cost(runs: Sequence[Run], *, idle_cores: float, start: float, end: float) -> float:
    """Core-seconds allocated from *start* to *end*, or as long as batches run."""
    events = sorted({start, end, *(run.start for run in runs), *(run.end for run in runs)})
    total = 0.0
    for low, high in itertools.pairwise(events):
        busy = sum(run.cores for run in runs if run.start <= low and run.end >= high)
        total += (high - low) * (max(idle_cores, busy) if low < end else busy)
    return total


def partitions(items: Sequence[int], largest: int) -> Iterator[list[Block]]:
    """All ways to form batches."""
    if not items:
        yield []
        return
    head, tail = items[0], items[1:]
    for size in range(min(largest, len(items))):
        for company in itertools.combinations(tail, size):
            rest = [item for item in tail if item not in company]
            for others in partitions(rest, largest):
                yield [(head, *company), *others]


def schedules(machine: Machine, arrived: Sequence[float], deadline: Sequence[float]) -> Iterator[tuple[int, list[Run]]]:
    """Yield (requests missed, batches) for every choice of who is served, in what batches, on what widths, started in
    what order; each batch starts as soon as it can after the one before, since a later start helps nobody."""
    everyone = range(len(arrived))
    for served in range(len(arrived) + 1):
        for chosen in itertools.combinations(everyone, served):
            for blocks in partitions(chosen, machine.max_batch_size):
                for order in itertools.permutations(blocks):
                    for widths in itertools.product(machine.widths, repeat=len(order)):
                        runs = _run(machine, order, widths, arrived, deadline)
                        if runs is not None:
                            yield len(arrived) - served, runs


def _run(
    machine: Machine,
    order: Sequence[Block],
    widths: Sequence[float],
    arrived: Sequence[float],
    deadline: Sequence[float],
) -> list[Run] | None:
    runs: list[Run] = []
    now = -math.inf
    for block, cores in zip(order, widths, strict=True):
        now = max(now, *(arrived[i] for i in block))
        while True:
            busy = [run for run in runs if run.end > now]
            free = machine.max_cores - sum(run.cores for run in busy)
            if len(busy) < machine.lanes and free >= cores - 1e-9:
                break
            if not busy:
                return None
            now = min(run.end for run in busy)
        lanes = len(busy) + 1 if machine.interference else 1
        end = now + machine.latency.latency_s(len(block), cores, lanes)
        if end > min(deadline[i] for i in block):
            return None
        runs.append(Run(start=now, end=end, cores=cores))
    return runs


def cheapest(
    machine: Machine, arrived: Sequence[float], deadline: Sequence[float], *, idle_cores: float = 0.0
) -> dict[int, float]:
    """Return the fewest core-seconds for each number of misses that a schedule can have; none misses all and costs
    nothing but idling."""
    start, end = min(arrived), max(arrived)
    best: dict[int, float] = {}
    for missed, runs in schedules(machine, arrived, deadline):
        best[missed] = min(best.get(missed, math.inf), cost(runs, idle_cores=idle_cores, start=start, end=end))
    return best
