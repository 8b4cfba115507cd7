"""A closed loop: so many clients, each of which sends again a think time after it was answered or turned away.

Rules, and why they hold:

* Every client has streams of its own for think times, sizes and SLO classes. What it does with its k-th request depends
  on the seed, the client and k alone, so that two policies meet the same people, though not at the same instants.
* `ClosedLoop` is a frozen description, like a `Workload`, and may be simulated any number of times; `Clients` is one
  round of it.
* A client never sends twice within `LEAST_CYCLE_S`. One that is turned away at once and does not think would otherwise
  send without end at a single instant.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.workload.bandwidth import BandwidthTrace, FloatArray
from sponge.workload.traffic import Payload, SloClass, as_classes, draw_slos, fixed

ThinkTime: TypeAlias = Callable[[int, np.random.Generator], FloatArray]
"""``(n, rng) -> think times [s]``, shape ``(n,)``, ≥ 0."""

LEAST_CYCLE_S = 1e-4
"""From one request of a client to its next at the least [s]: about a round trip within a machine."""
MAX_CLIENTS = 1_000_000
_BLOCK = 16
"""Requests of a client that are drawn at a time."""

Sent: TypeAlias = tuple[float, int, float, float]
"""A request on its way: when it arrives, the client, when it was sent, its deadline [s]."""


def exponential(mean_s: float) -> ThinkTime:
    """Return exponential think times of this mean [s, ≥ 0]: people, who owe each other nothing.

    Raises
    ------
    ValueError
        If the mean is negative or not finite.
    """
    _check_think("mean_s", mean_s)
    return lambda count, rng: rng.exponential(mean_s, count)


def always(think_s: float) -> ThinkTime:
    """Return think times that are all the same [s, ≥ 0]: machines that ask at intervals.

    Raises
    ------
    ValueError
        If it is negative or not finite.
    """
    _check_think("think_s", think_s)
    return lambda count, _: np.full(count, float(think_s))


def _check_think(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


@attrs.frozen(kw_only=True, eq=False)
class ClosedLoop:
    """What a number of clients do who each wait for their answer; `sponge.simulate` takes it as a workload.

    A client sends, waits until it is answered or turned away, thinks, and sends again. It begins at a random place in
    its first think time, so that clients who all think equally long do not march in step. Who is turned away thinks as
    long as who is answered.

    Parameters
    ----------
    clients
        How many, from 1 to a million.
    duration_s
        Nobody sends from then on [s], > 0.
    trace
        The bandwidth that each client has to itself.
    think
        Between the answer and the next request: `exponential`, `always`, or any function of that form.
    payload, slos
        As for `Traffic`.
    seed
        Of think times, sizes and classes, ≥ 0.
    offset_s
        Place in the trace at time 0 [s, ≥ 0]: one for all, or one for each client, shape ``(clients,)``.
    shortcut
        See `BandwidthTrace.upload_time_s`.

    Raises
    ------
    ValueError
        If a number is out of range, or there is no SLO class.

    Notes
    -----
    With N clients, X requests/s and the mean times that a request takes (R, sending to answer) and a client thinks (Z),
    Little's law says N = X·(R + Z): whoever serves more slowly is asked for less. So deadlines that are met in a
    closed loop say little of what happens when more people come.
    """

    clients: int = attrs.field()
    duration_s: float = attrs.field(converter=float)
    trace: BandwidthTrace
    think: ThinkTime = attrs.field(factory=lambda: exponential(1.0))
    payload: Payload = attrs.field(factory=lambda: fixed(0.0))
    slos: tuple[SloClass, ...] = attrs.field(default=(SloClass(1.0),), converter=as_classes)
    seed: int = 0
    offset_s: npt.ArrayLike = 0.0
    shortcut: bool = False

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise ValueError(f"clients must be from 1 to {MAX_CLIENTS:,}, got {self.clients!r}")
        if not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration_s must be positive and finite, got {self.duration_s!r}")
        if self.seed < 0 or self.seed != int(self.seed):
            raise ValueError(f"seed must be a whole number and not negative, got {self.seed!r}")
        if not self.slos:
            raise ValueError(f"slos must hold at least one class, got {self.slos!r}")
        if np.shape(self.offset_s) not in ((), (self.clients,)):
            raise ValueError(
                f"offset_s must be one number or one for each of {self.clients} clients, "
                f"got shape {np.shape(self.offset_s)}"
            )


class Clients:
    """One round of a `ClosedLoop`: who sends next, given who was answered when.

    Parameters
    ----------
    loop
        What they do.

    Raises
    ------
    ValueError
        If a think time or a size is negative or not finite, or an upload would never end; `answered` may raise it too.
    """

    def __init__(self, loop: ClosedLoop) -> None:
        self._loop = loop
        self._offsets_s = np.broadcast_to(np.asarray(loop.offset_s, dtype=np.float64), loop.clients)
        self._habits = [_habits(loop, client) for client in range(loop.clients)]
        self._under_way: list[Sent] = []
        self.next_at = math.inf
        """When the next request arrives [s]; ``inf`` if none is under way."""
        phases = np.random.default_rng(np.random.SeedSequence(loop.seed)).random(loop.clients)
        for client, phase in enumerate(phases.tolist()):
            self._send(client, 0.0, 0.0, float(phase))

    def take(self) -> Sent:
        """Return the request that arrives next; its client then waits until it is `answered`."""
        taken = heapq.heappop(self._under_way)
        self.next_at = self._under_way[0][0] if self._under_way else math.inf
        return taken

    def answered(self, client: int, sent_at_s: float, now: float) -> None:
        """Let a client whose request of *sent_at_s* was answered or turned away at *now* [s] think, and send again."""
        self._send(client, now, sent_at_s + LEAST_CYCLE_S, 1.0)

    def _send(self, client: int, now: float, not_before: float, share: float) -> None:
        think_s, payload_bytes, slo_s = next(self._habits[client])
        sent_at_s = max(now + share * think_s, not_before)
        if sent_at_s >= self._loop.duration_s:
            return
        upload_s = 0.0
        if payload_bytes != 0:
            in_trace_s = sent_at_s + float(self._offsets_s[client])
            upload_s = float(self._loop.trace.upload_time_s(in_trace_s, payload_bytes, shortcut=self._loop.shortcut))
        if not math.isfinite(upload_s):
            raise ValueError(f"the upload sent at {sent_at_s:g} s never ends: the trace has no bandwidth from then on")
        heapq.heappush(self._under_way, (sent_at_s + upload_s, client, sent_at_s, sent_at_s + slo_s))
        self.next_at = self._under_way[0][0]


def _habits(loop: ClosedLoop, client: int) -> Iterator[tuple[float, float, float]]:
    """Yield think time [s], size [bytes] and SLO [s] of a client's requests, one after the other, without end."""
    streams = np.random.SeedSequence(loop.seed, spawn_key=(client,)).spawn(3)
    thinks, sizes, classes = map(np.random.default_rng, streams)
    while True:
        think_s = np.asarray(loop.think(_BLOCK, thinks), dtype=np.float64)
        if not np.all(np.isfinite(think_s) & (think_s >= 0)):
            raise ValueError(f"think must give times that are finite and not negative, got {think_s.tolist()!r}")
        yield from zip(
            think_s.tolist(),
            np.asarray(loop.payload(_BLOCK, sizes), dtype=np.float64).tolist(),
            draw_slos(loop.slos, _BLOCK, classes).tolist(),
            strict=True,
        )
