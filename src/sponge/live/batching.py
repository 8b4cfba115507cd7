"""Joining requests into a batch, and parting the results.

A batch is copied into a buffer that is kept for its shapes: the first touch of fresh memory costs more than the copy
itself (page faults). A request that is alone in its batch is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]

_MAX_SHAPES = 8
"""Sets of shapes for which a lane keeps buffers; beyond that the one used longest ago is dropped."""


class BatchBuffers:
    """The input buffers of one lane; not thread-safe, since a lane runs one batch at a time.

    Parameters
    ----------
    max_rows
        Rows of the largest batch.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._kept: dict[int, dict[str, Array]] = {}

    def join(self, group: int, requests: Sequence[Inputs], rows: int) -> Inputs:
        """Return the requests' inputs as one batch, valid until the next call.

        Parameters
        ----------
        group
            What tells apart sets of shapes and dtypes.
        requests
            Each with the same names, and shapes that differ in axis 0 only.
        rows
            Their rows together.
        """
        if len(requests) == 1:
            return requests[0]
        buffers = self._kept.pop(group, None)
        if buffers is None or next(iter(buffers.values())).shape[0] < rows:
            size = max(self._max_rows, rows)
            buffers = {name: np.empty((size, *array.shape[1:]), array.dtype) for name, array in requests[0].items()}
            if len(self._kept) >= _MAX_SHAPES:
                del self._kept[next(iter(self._kept))]
        self._kept[group] = buffers  # the most recent one last
        for name, buffer in buffers.items():
            start = 0
            for request in requests:
                array = request[name]
                end = start + array.shape[0]
                buffer[start:end] = array
                start = end
        return {name: buffer[:rows] for name, buffer in buffers.items()}


def part(outputs: Sequence[Array], rows: Sequence[int]) -> list[list[Array]] | None:
    """Return each request's rows of each output, as views; None if an output does not have one row per input row.

    Parameters
    ----------
    outputs
        Of one run, each with the batch along axis 0.
    rows
        Rows of each request, in the order of the batch.
    """
    total = sum(rows)
    if any(getattr(output, "ndim", 0) == 0 or output.shape[0] != total for output in outputs):
        return None
    parts = []
    start = 0
    for count in rows:
        parts.append([output[start : start + count] for output in outputs])
        start += count
    return parts
