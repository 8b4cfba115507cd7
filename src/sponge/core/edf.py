"""The waiting queue, earliest deadline first; equal deadlines leave in order of arrival.

A sorted list instead of a heap: the optimiser reads the deadlines in order at every dispatch, which a heap cannot
offer, and cancellation finds its request by bisection. Inserting moves at most some kilobytes of pointers, which is
cheaper than keeping a balanced tree in Python up to tens of thousands of waiting requests: 2 µs at 10,000.

`EdfQueue` is the queue by itself. `PlannedQueue` also keeps what a plan reads, so that planning copies nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sponge.core.values import Request

_Key: TypeAlias = tuple[float, int]
_INF = float("inf")


class EdfQueue:
    """Requests ordered by (deadline, sequence number)."""

    __slots__ = ("_by_id", "_keys", "_rows")

    def __init__(self) -> None:
        self._keys: list[_Key] = []
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

    def check(self) -> None:
        """Assert the invariants; for tests."""
        assert self._keys == sorted(self._keys)
        assert {request_id for _, request_id in self._keys} == self._by_id.keys()
        assert all(self._by_id[i].deadline == deadline for deadline, i in self._keys)
        assert self._rows == sum(request.rows for request in self._by_id.values())


class PlannedQueue(EdfQueue):
    """An `EdfQueue` whose deadlines can be read in place, and whose groups are known.

    An array holds the deadline of every row in order. That costs a bisection for each request that comes or goes, and
    makes a plan independent of the length of the queue but for what it reads.
    """

    __slots__ = ("_deadlines", "_group_rows", "_groups")

    def __init__(self) -> None:
        super().__init__()
        self._deadlines = array("d", [_INF])
        self._groups: dict[int, list[_Key]] = {}
        self._group_rows: dict[int, int] = {}

    def push(self, request: Request) -> None:
        """Add a request, as `EdfQueue.push`."""
        super().push(request)
        deadline, group, rows = request.deadline, request.group, request.rows
        if rows == 1:
            insort(self._deadlines, deadline, 0, len(self._deadlines) - 1)
        else:
            at = bisect_left(self._deadlines, deadline)
            self._deadlines[at:at] = array("d", [deadline]) * rows
        if group in self._groups:
            insort(self._groups[group], (deadline, request.request_id))
            self._group_rows[group] += rows
        else:
            self._groups[group] = [(deadline, request.request_id)]
            self._group_rows[group] = rows

    def remove(self, request_id: int) -> Request | None:
        """Take out one request, as `EdfQueue.remove`."""
        request = super().remove(request_id)
        if request is not None:
            at = bisect_left(self._deadlines, request.deadline)
            del self._deadlines[at : at + request.rows]
            keys = self._groups[request.group]
            del keys[bisect_left(keys, (request.deadline, request_id))]
            self._leave_group(request.group, request.rows)
        return request

    def take(self, max_rows: int) -> list[Request]:
        """Take the head and what may share its batch, as `EdfQueue.take`."""
        if len(self._groups) == 1:
            taken = super().take(max_rows)
            rows = sum([request.rows for request in taken])
            del self._deadlines[:rows]
            del self._groups[taken[0].group][: len(taken)]
            self._leave_group(taken[0].group, rows)
            return taken
        head = self.head()
        taken, rows = [head], head.rows
        for _, request_id in islice(self._groups[head.group], 1, None):
            request = self._by_id[request_id]
            if rows + request.rows > max_rows:
                break
            taken.append(request)
            rows += request.rows
        for request in taken:
            self.remove(request.request_id)
        return taken

    def take_all(self) -> list[Request]:
        """Empty the queue, as `EdfQueue.take_all`."""
        self._deadlines = array("d", [_INF])
        self._groups.clear()
        self._group_rows.clear()
        return super().take_all()

    @property
    def head_group_rows(self) -> int:
        """Waiting rows that may share a batch with the head, its own included; the queue must not be empty."""
        return self._group_rows[self.head().group]

    def deadlines(self) -> npt.NDArray[np.float64]:
        """Return the deadlines in order, one entry for each row, and ``inf`` as the last [s], shape ``(rows + 1,)``.

        It is the queue's own memory: to be read at once, and let go of before the queue changes.
        """
        return np.frombuffer(self._deadlines)

    def _leave_group(self, group: int, rows: int) -> None:
        if self._groups[group]:
            self._group_rows[group] -= rows
        else:
            del self._groups[group], self._group_rows[group]

    def check(self) -> None:
        """Assert the invariants; for tests."""
        super().check()
        assert self._deadlines.tolist() == [r.deadline for r in self for _ in range(r.rows)] + [_INF]
        waiting = list(self)
        assert self._groups.keys() == self._group_rows.keys() == {r.group for r in waiting}
        for group, keys in self._groups.items():
            assert keys == [(r.deadline, r.request_id) for r in waiting if r.group == group]
            assert self._group_rows[group] == sum(r.rows for r in waiting if r.group == group)
