"""Joining requests and parting results."""

from __future__ import annotations

from typing import Any

import numpy as np

from sponge.live.batching import BatchBuffers, part


def array(value: float, rows: int = 1, width: int = 3, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.full((rows, width), value, dtype=dtype)


def test_lone_request_is_passed_on_as_it_is() -> None:
    """No copy where there is nothing to join."""
    request = {"x": array(1)}
    assert BatchBuffers(8).join(0, [request], 1) is request


def test_requests_are_joined_in_order() -> None:
    """Several inputs, several rows, several dtypes; contiguous whatever the requests are."""
    requests = [
        {"x": array(i, rows), "k": array(i, rows, 1, np.int64)[:, 0]} for i, rows in enumerate([1, 3, 2], start=1)
    ]
    requests[1]["x"] = np.asfortranarray(requests[1]["x"])
    batch = BatchBuffers(8).join(0, requests, 6)
    assert batch["x"][:, 0].tolist() == batch["k"].tolist() == [1, 2, 2, 2, 3, 3]
    assert batch["x"].flags.c_contiguous
    assert (batch["x"].dtype, batch["k"].dtype) == (np.float32, np.int64)


def test_buffers_are_kept_and_bounded() -> None:
    """The same memory serves the next batch of the same shapes; a client with a thousand shapes does not fill it."""
    buffers = BatchBuffers(4)
    first = buffers.join(0, [{"x": array(1)}, {"x": array(2)}], 2)["x"]
    again = buffers.join(0, [{"x": array(3)}, {"x": array(4)}, {"x": array(5)}], 3)["x"]
    assert np.shares_memory(first, again)
    for group in range(1, 100):
        buffers.join(group, [{"x": array(0, width=group)}] * 2, 2)
    assert len(buffers._kept) <= 8


def test_strings_are_joined() -> None:
    """Object arrays hold references."""
    batch = BatchBuffers(4).join(0, [{"x": np.array([["a"]], object)}, {"x": np.array([["b"]], object)}], 2)
    assert batch["x"].tolist() == [["a"], ["b"]]


def test_results_are_parted_without_copy() -> None:
    """Each request gets its rows of every output."""
    outputs = [np.arange(12).reshape(6, 2), np.arange(6)]
    parts = part(outputs, [1, 3, 2])
    assert parts is not None
    assert [p[1].tolist() for p in parts] == [[0], [1, 2, 3], [4, 5]]
    assert all(np.shares_memory(p[0], outputs[0]) for p in parts)


def test_outputs_that_do_not_follow_the_batch_are_noticed() -> None:
    """One row too few, a scalar, or something that is no array."""
    good = np.zeros((2, 1))
    for bad in (np.zeros((1, 1)), np.float32(3), [1, 2], np.array(5)):
        assert part([good, bad], [1, 1]) is None  # type: ignore[list-item]
