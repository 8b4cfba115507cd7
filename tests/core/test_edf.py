"""The waiting queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.core.edf import EdfQueue, PlannedQueue
from sponge.core.values import Request


def request(request_id: int, deadline: float, rows: int = 1, group: int = 0) -> Request:
    return Request(request_id=request_id, arrived_at=0.0, deadline=deadline, rows=rows, group=group)


requests = st.lists(
    st.tuples(st.integers(0, 5).map(float) | st.just(float("inf")), st.integers(1, 3), st.integers(0, 2)), max_size=40
).map(lambda found: [request(i, deadline, rows, group) for i, (deadline, rows, group) in enumerate(found)])


def brute_take(waiting: list[Request], max_rows: int) -> list[Request]:
    """What `take` must give: by sorting and filtering from scratch."""
    ordered = sorted(waiting, key=lambda r: (r.deadline, r.request_id))
    same = [r for r in ordered if r.group == ordered[0].group]
    taken = [same[0]]
    for candidate in same[1:]:
        if sum(r.rows for r in taken) + candidate.rows > max_rows:
            break
        taken.append(candidate)
    return taken


queues = st.sampled_from([EdfQueue, PlannedQueue])


@given(queues, requests, st.lists(st.integers(1, 8), max_size=40))
def test_take_agrees_with_sorting(kind: type[EdfQueue], waiting: list[Request], sizes: list[int]) -> None:
    """Earliest deadline first, ties by arrival, one group a batch, nothing overtaken for its size."""
    queue = kind()
    left = list(waiting)
    for each in waiting:
        queue.push(each)
    for size in sizes:
        if not left:
            break
        assert queue.head() == min(left, key=lambda r: (r.deadline, r.request_id))
        expected = brute_take(left, size)
        assert queue.take(size) == expected
        left = [r for r in left if r not in expected]
        queue.check()
        assert len(queue) == len(left)
        assert queue.rows == sum(r.rows for r in left)
    assert queue.take_all() == sorted(left, key=lambda r: (r.deadline, r.request_id))
    assert len(queue) == queue.rows == 0


@given(queues, requests, st.sets(st.integers(0, 45)))
def test_remove_takes_out_exactly_one(kind: type[EdfQueue], waiting: list[Request], gone: set[int]) -> None:
    """A cancelled request leaves, an unknown one changes nothing."""
    queue = kind()
    for each in waiting:
        queue.push(each)
    for request_id in gone:
        removed = queue.remove(request_id)
        assert (removed is not None) == any(r.request_id == request_id for r in waiting)
        assert request_id not in queue
        queue.check()
    assert {r.request_id for r in queue} == {r.request_id for r in waiting} - gone


def test_deadlines_have_one_entry_per_row() -> None:
    """The optimiser counts rows, and a request of three takes the room of three; nobody beyond is in a hurry."""
    queue = PlannedQueue()
    queue.push(request(0, 2.0, rows=3))
    queue.push(request(1, 1.0))
    assert queue.deadlines().tolist() == [1.0, 2.0, 2.0, 2.0, float("inf")]


def test_rows_of_the_head_s_group() -> None:
    """A batch can be no larger than those who may share it, whoever else is waiting."""
    queue = PlannedQueue()
    queue.push(request(0, 2.0, group=1))
    queue.push(request(1, 1.0, rows=3))
    queue.push(request(2, 3.0))
    assert queue.head_group_rows == 4
    queue.take(4)
    assert queue.head_group_rows == 1


@pytest.mark.parametrize("kind", [EdfQueue, PlannedQueue])
def test_pushing_twice_is_refused(kind: type[EdfQueue]) -> None:
    """Two outcomes for one request would follow, and the queue must not remember half of it."""
    queue = kind()
    queue.push(request(7, 1.0))
    with pytest.raises(ValueError, match="request_id 7"):
        queue.push(request(7, 2.0))
    queue.check()
    assert len(queue) == 1
