"""The waiting queue, earliest deadline first; equal deadlines leave in order of arrival.

A sorted list instead of a heap: the optimiser reads the deadlines in order at every dispatch, which a heap cannot
offer, and cancellation finds its request by bisection. Inserting moves at most a few kilobytes of pointers, which is
cheaper than keeping a balanced tree in Python up to tens of thousands of waiting requests.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from sponge.core.values import Request


class EdfQueue:
    """Requests ordered by (deadline, sequence number)."""

    __slots__ = ("_by_id", "_keys", "_rows")

    def __init__(self) -> None:
        self._keys: list[tuple[float, int]] = []
        self._by_id: dict[int, Request] = {}
        self._rows = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Request]:
        """Iterate in deadline order."""
        return (self._by_id[request_id] for _, request_id in self._keys)

    @property
    def rows(self) -> int:
        """Rows of all waiting requests together."""
        return self._rows

    def push(self, request: Request) -> None:
        """Add a request.

        Raises
        ------
        ValueError
            If a request with this id is already waiting.
        """
        if request.request_id in self._by_id:
            raise ValueError(f"request_id {request.request_id} is already waiting")
        self._by_id[request.request_id] = request
        self._rows += request.rows
        insort(self._keys, (request.deadline, request.request_id))

    def head(self) -> Request:
        """Return the most urgent request; the queue must not be empty."""
        return self._by_id[self._keys[0][1]]

    def remove(self, request_id: int) -> Request | None:
        """Take out one request; return it, or None if it is not waiting."""
        request = self._by_id.pop(request_id, None)
        if request is None:
            return None
        self._rows -= request.rows
        del self._keys[bisect_left(self._keys, (request.deadline, request_id))]
        return request

    def take(self, max_rows: int) -> list[Request]:
        """Take the head and what may share its batch, in deadline order, up to *max_rows* rows.

        Only requests of the head's group qualify. The head is taken even if it alone has more rows. The first of the
        group that does not fit ends the batch: overtaking it would serve a later deadline first.
        """
        head = self.head()
        if len(self._keys) == 1 or head.rows >= max_rows:
            del self._keys[0], self._by_id[head.request_id]
            self._rows -= head.rows
            return [head]
        taken = [head]
        rows = head.rows
        count = 1  # a run of keys from the front, while no other group intervenes
        contiguous = True
        for _, request_id in islice(self._keys, 1, None):
            if rows >= max_rows:
                break
            request = self._by_id[request_id]
            if request.group != head.group:
                contiguous = False
                continue
            if rows + request.rows > max_rows:
                break
            taken.append(request)
            rows += request.rows
            count += contiguous
        for request in taken:
            del self._by_id[request.request_id]
        del self._keys[:count]
        for request in taken[count:]:
            del self._keys[bisect_left(self._keys, (request.deadline, request.request_id))]
        self._rows -= rows
        return taken

    def take_all(self) -> list[Request]:
        """Empty the queue and return what was in it, in deadline order."""
        taken = list(self)
        self._keys.clear()
        self._by_id.clear()
        self._rows = 0
        return taken

    def deadlines(self) -> list[float]:
        """Return the deadlines in order, one entry per row [s]."""
        if self._rows == len(self._keys):
            return [key[0] for key in self._keys]
        return [key[0] for key in self._keys for _ in range(self._by_id[key[1]].rows)]

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert self._keys == sorted(self._keys)
        assert {request_id for _, request_id in self._keys} == self._by_id.keys()
        assert all(self._by_id[i].deadline == deadline for deadline, i in self._keys)
        assert self._rows == sum(request.rows for request in self._by_id.values())
