"""Tensors of the protocol: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from sponge.integrations.oip.tensors import DATATYPES, datatype_name, from_raw, from_values, to_raw
from sponge.integrations.outcomes import InvalidRequest
from sponge.live.tensors import DTYPES

untimed = settings(deadline=None)  # other people's machines are busy
NUMBERS = [dtype for dtype in DATATYPES.values() if dtype.kind != "O"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def test_every_type_of_a_model_has_a_name() -> None:
    """The names are those of Triton's client."""
    for dtype in DTYPES.values():
        assert datatype_name(dtype) == np_to_triton_dtype(dtype)


@untimed
@given(st.sampled_from(NUMBERS).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_numbers_survive_both_ways(array: np.ndarray[Any, Any]) -> None:
    """Raw bytes to the last bit; lists too, but for NaN payloads."""
    name = datatype_name(array.dtype)
    back = from_raw("x", name, array.shape, to_raw(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    listed = from_values("x", name, array.shape, array.reshape(-1).tolist())
    assert listed.dtype == array.dtype
    assert np.array_equal(listed, array, equal_nan=array.dtype.kind == "f")


@untimed
@given(hnp.arrays(object, SHAPES, elements=st.text(max_size=6)))
def test_strings_survive_both_ways(array: np.ndarray[Any, Any]) -> None:
    """Our bytes are those of Triton's client, and are read back; so are lists, of strings or of their bytes."""
    raw = to_raw(array)
    serialised = serialize_byte_tensor(array)
    if array.size:
        assert raw == serialised.item()
    assert from_raw("x", "BYTES", array.shape, raw).tolist() == array.tolist()
    flat = array.reshape(-1).tolist()
    assert from_values("x", "BYTES", array.shape, flat).tolist() == array.tolist()
    assert from_values("x", "BYTES", array.shape, [text.encode() for text in flat]).tolist() == array.tolist()


def test_nested_lists_are_taken() -> None:
    """JSON clients may send rows."""
    assert from_values("x", "FP32", [2, 2], [[1, 2.5], [3, 4]]).tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert from_values("x", "BYTES", [2, 1], [["a"], ["b"]]).tolist() == [["a"], ["b"]]
    assert from_values("x", "UINT64", [1], [2**64 - 1]).tolist() == [2**64 - 1]
    assert from_values("x", "UINT64", [2, 1], [[0], [2**63]]).tolist() == [[0], [2**63]]


def test_raw_views_are_aligned() -> None:
    """Tensors behind a JSON document begin at any byte; a model may read floats only where floats may lie."""
    body = b"{" + np.arange(8, dtype=np.float64).tobytes()
    array = from_raw("x", "FP64", [8], memoryview(body)[1:])
    assert array.flags.aligned
    assert array.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("FP32", [1, 4], b"\0" * 15),
        ("FP32", [1, 4], b"\0" * 20),
        ("FP32", [2**40, 2**40], b""),
        ("FP32", [-1, 4], b"\0" * 16),
        ("FP32", [True, 4], b"\0" * 16),
        ("FP32", ["1", 4], b"\0" * 16),
        ("FP32", [1] * 40, b"\0" * 4),
        ("BF16", [1], b"\0\0"),
        ("", [1], b"\0"),
        ("BYTES", [1], b"\1\0\0"),
        ("BYTES", [1], struct.pack("<I", 2**32 - 1) + b"a"),
        ("BYTES", [2], struct.pack("<I", 1) + b"a"),
        ("BYTES", [1], struct.pack("<I", 1) + b"\xff"),
    ],
)
def test_raw_bytes_that_do_not_fit(datatype: str, shape: list[Any], raw: bytes) -> None:
    """Told to the client, by the input's name, before anything is allocated."""
    with pytest.raises(InvalidRequest, match="input 'x'"):
        from_raw("x", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "shape", "values"),
    [
        ("FP32", [2], [1.0]),
        ("FP32", [1], ["1.0"]),
        ("FP32", [1], [None]),
        ("FP32", [1], [True]),
        ("FP32", [2], [[1.0], [2.0, 3.0]]),
        ("FP32", [1], {"a": 1}),
        ("INT8", [1], [128]),
        ("UINT8", [1], [-1]),
        ("INT32", [1], [1.5]),
        ("INT64", [1], [2**70]),
        ("UINT64", [2], [2**64 - 1, -1]),
        ("BOOL", [1], [1]),
        ("BYTES", [1], [1]),
        ("BYTES", [1], ["a", "b"]),
        ("BYTES", [2], [["a"], ["b", "c"]]),
        ("BYTES", [1], [b"\xff"]),
        ("COMPLEX", [1], [1]),
    ],
)
def test_values_that_do_not_fit(datatype: str, shape: list[Any], values: Any) -> None:
    """Nothing is cast, wrapped around or rounded."""
    with pytest.raises(InvalidRequest, match="input 'x'"):
        from_values("x", datatype, shape, values)


@untimed
@given(st.sampled_from(sorted(DATATYPES)), st.lists(st.integers(-2, 6), max_size=4), st.binary(max_size=64))
def test_no_bytes_can_break_the_reader(datatype: str, shape: list[int], raw: bytes) -> None:
    """An array of the shape, or InvalidRequest."""
    try:
        array = from_raw("x", datatype, shape, raw)
    except InvalidRequest:
        return
    assert array.shape == tuple(shape)
    assert array.dtype == DATATYPES[datatype]
