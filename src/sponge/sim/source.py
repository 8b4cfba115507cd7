"""Who arrives next: from a workload that is given, or from clients that wait for their answers.

Rules, and why they hold:

* The kernel sees one number, `next_at`, and takes arrivals one by one, so that a million requests are not as many
  objects.
* Requests are numbered in order of arrival, so that the number is also the place in the result.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Protocol

from sponge.core.events import Arrived
from sponge.core.values import Request
from sponge.workload import ClosedLoop, Workload
from sponge.workload.closed_loop import Clients

_CHUNK = 4096
_NOBODY: tuple[float, Arrived | None] = (math.inf, None)


class Source(Protocol):
    """What the kernel asks."""

    next_at: float
    """When the next request arrives [s]; ``inf`` if none is under way."""

    def take(self) -> Arrived:
        """Return the request that arrives at `next_at`."""

    def workload(self) -> Workload:
        """Return all requests so far."""


class OpenSource:
    """Requests that come whatever happens to them."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._arrivals = _arrivals(workload)
        self.next_at, self._arrival = next(self._arrivals, _NOBODY)

    def take(self) -> Arrived:
        """See `Source`."""
        arrived_at, taken = self.next_at, self._arrival
        assert taken is not None
        self.next_at, self._arrival = next(self._arrivals, _NOBODY)
        return Arrived(taken.request, more=True) if self.next_at == arrived_at else taken

    def workload(self) -> Workload:
        """See `Source`."""
        return self._workload


def _arrivals(workload: Workload) -> Iterator[tuple[float, Arrived | None]]:
    for first in range(0, len(workload), _CHUNK):
        arrived = workload.arrived_at_s[first : first + _CHUNK].tolist()
        deadlines = workload.deadline_s[first : first + _CHUNK].tolist()
        ids = range(first, first + len(arrived))
        for request_id, arrived_at, deadline in zip(ids, arrived, deadlines, strict=True):
            yield arrived_at, Arrived(Request(request_id=request_id, arrived_at=arrived_at, deadline=deadline))


class ClosedSource:
    """Requests of clients that wait for their answers."""

    def __init__(self, loop: ClosedLoop) -> None:
        self._clients = Clients(loop)
        self._client = array("q")
        self._sent_at_s = array("d")
        self._arrived_at_s = array("d")
        self._deadline_s = array("d")
        self.next_at = self._clients.next_at

    def take(self) -> Arrived:
        """See `Source`."""
        arrived_at, client, sent_at, deadline = self._clients.take()
        request = Request(request_id=len(self._client), arrived_at=arrived_at, deadline=deadline)
        self._client.append(client)
        self._sent_at_s.append(sent_at)
        self._arrived_at_s.append(arrived_at)
        self._deadline_s.append(deadline)
        self.next_at = self._clients.next_at
        return Arrived(request, more=self.next_at == arrived_at)

    def answered(self, request_id: int, now: float) -> None:
        """Tell the client of a request that it was answered or turned away at *now* [s]."""
        self._clients.answered(self._client[request_id], self._sent_at_s[request_id], now)
        self.next_at = self._clients.next_at

    def workload(self) -> Workload:
        """See `Source`."""
        return Workload(sent_at_s=self._sent_at_s, arrived_at_s=self._arrived_at_s, deadline_s=self._deadline_s)
