"""Tensors of the Open Inference Protocol: raw bytes, lists of numbers, and strings.

Raw tensors are read in place, without a copy. Everything that a client can get wrong raises `InvalidRequest` with the
tensor's name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sponge.integrations.outcomes import Array, InvalidRequest

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""NumPy dtype by the protocol's name. BF16 is not among them: ONNX Runtime takes and gives no such arrays in Python."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
MAX_RANK = 32
"""NumPy's least upper bound."""
_LENGTH = struct.Struct("<I")


def datatype_name(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype of the model's."""
    return _NAMES[dtype]


def _layout(name: str, datatype: str, shape: Iterable[Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        raise InvalidRequest(f"datatype of input {name!r} must be one of {', '.join(DATATYPES)}, got {datatype!r}")
    sizes = tuple(shape)
    if len(sizes) > MAX_RANK:
        raise InvalidRequest(f"shape of input {name!r} must have at most {MAX_RANK} axes, got {len(sizes)}")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise InvalidRequest(f"shape of input {name!r} must be integers that are not negative, got {list(sizes)}")
    return dtype, sizes


def from_raw(name: str, datatype: str, shape: Iterable[Any], raw: bytes | memoryview) -> Array:
    """Return the array that *raw* holds, row after row, little endian; strings each behind their length (4 bytes).

    The array is a read-only view of *raw* where its bytes are aligned.

    Raises
    ------
    InvalidRequest
        If datatype, shape and number of bytes do not fit together.
    """
    dtype, sizes = _layout(name, datatype, shape)
    count = math.prod(sizes)
    if dtype.kind == "O":
        texts = _strings(name, raw)
        if len(texts) != count:
            raise InvalidRequest(f"input {name!r} of shape {list(sizes)} must hold {count} strings, got {len(texts)}")
        return _objects(texts, sizes)
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest(
            f"input {name!r} of shape {list(sizes)} and datatype {datatype} must hold {count * dtype.itemsize} bytes, "
            f"got {len(raw)}"
        )
    if count == 0:
        return np.empty(sizes, dtype)
    return np.require(np.frombuffer(raw, dtype).reshape(sizes), requirements="A")


def from_values(name: str, datatype: str, shape: Iterable[Any], values: Any) -> Array:
    """Return the array of *values*: flat or nested, of numbers, booleans or strings; the row-major order counts.

    Raises
    ------
    InvalidRequest
        If a value is of another type or out of range, or their number does not fit the shape.
    """
    dtype, sizes = _layout(name, datatype, shape)
    count = math.prod(sizes)
    if dtype.kind == "O":
        array = np.array(values, dtype=object).reshape(-1)
        texts = [_text(name, value) for value in array.tolist()]
        if len(texts) != count:
            raise InvalidRequest(f"input {name!r} of shape {list(sizes)} must hold {count} strings, got {len(texts)}")
        return _objects(texts, sizes)
    try:
        array = np.array(values)
        if dtype == np.uint64 and array.dtype.kind == "f":  # what numpy makes of [0, 2**63]
            array = _whole_numbers(values, array)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidRequest(f"data of input {name!r} is no array: {error}") from error
    if array.size != count:
        raise InvalidRequest(f"input {name!r} of shape {list(sizes)} must hold {count} values, got {array.size}")
    if count == 0:
        return np.empty(sizes, dtype)
    if array.dtype.kind not in _TAKES[dtype.kind]:
        raise InvalidRequest(
            f"data of input {name!r} must be of datatype {datatype}, got values like {_short(array.flat[0])}"
        )
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            raise InvalidRequest(f"data of input {name!r} must fit into {datatype}, got {wrong}")
    with np.errstate(over="ignore"):  # what is too large for a float is infinite
        return array.reshape(sizes).astype(dtype, copy=False)


_TAKES = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""Kinds of values taken for each kind of tensor: no floats for integers, no numbers for booleans."""


def to_raw(array: Array) -> bytes:
    """Return the bytes of an output, as `from_raw` reads them."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).tobytes()
    parts = []
    for value in array.reshape(-1).tolist():
        encoded = value if isinstance(value, bytes) else str(value).encode()
        parts += [_LENGTH.pack(len(encoded)), encoded]
    return b"".join(parts)


def _strings(name: str, raw: bytes | memoryview) -> list[str]:
    texts = []
    position, end = 0, len(raw)
    while position < end:
        start = position + _LENGTH.size
        if start > end or start + (length := _LENGTH.unpack_from(raw, position)[0]) > end:
            raise InvalidRequest(f"input {name!r} ends within a string, at byte {end}")
        position = start + length
        texts.append(_text(name, bytes(raw[start:position])))
    return texts


def _whole_numbers(values: Any, rounded: Array) -> Array:
    """Return the values as unsigned integers if they are all such, else *rounded*."""
    exact = np.array(values, dtype=object)
    if all(type(value) is int and 0 <= value < 1 << 64 for value in exact.flat):
        return exact.astype(np.uint64)
    return rounded


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequest(f"data of input {name!r} must be strings, got {_short(value)}")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"strings of input {name!r} must be UTF-8: {error}") from error


def _short(value: Any) -> str:
    """Return a value as a message may show it: a client may have sent a megabyte."""
    return repr(value)[:60]


def _objects(texts: Sequence[str], sizes: tuple[int, ...]) -> Array:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(sizes)
