"""Reading JSON that may come from anywhere: every type and size is checked, and errors name the field."""

from __future__ import annotations

import json
import os
import reprlib
from typing import Any

from sponge.files import read_data

MAX_FILE_BYTES = 16 * 2**20
"""More than two million samples; JSON can take 25 times its size in memory."""
MAX_TEXT = 4_096


def read_json(path: str | os.PathLike[str]) -> object:
    """Return the contents of a JSON file.

    Raises
    ------
    ValueError
        If it is no regular file, too large, or no JSON (NaN and infinities are none, nor is an object that has a
        member twice).
    OSError
        If it cannot be read.
    """
    content = read_data(path, MAX_FILE_BYTES).decode("utf-8")
    try:
        return json.loads(content, parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number of JSON")


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object; of two members of one name it would not be clear which counts."""
    found: dict[str, object] = {}
    for name, value in members:
        if name in found:
            raise ValueError(f"{short(name)} is there twice in an object")
        found[name] = value
    return found


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 60, 60, 60


def short(value: object) -> str:
    """Return a value's repr, cut to a line of an error message; that of a large value is not made in full."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def mapping(value: object, field: str, most: int = 10_000) -> dict[str, Any]:
    """Return *value* if it is an object of at most *most* members."""
    if not isinstance(value, dict) or len(value) > most:
        raise ValueError(f"{field} must be an object of at most {most} members, got {short(value)}")
    return value


def sequence(value: object, field: str, least: int, most: int) -> list[Any]:
    """Return *value* if it is a list of *least* to *most* values."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(f"{field} must be a list of {least} to {most} values, got {short(value)}")
    return value


def text(value: object, field: str) -> str:
    """Return *value* if it is a string of bounded length that can be written again."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{field} must be a string of at most {MAX_TEXT} characters, got {short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} holds half a surrogate pair: {short(value)}") from error
    return value


def texts(value: object, field: str) -> dict[str, str]:
    """Return *value* if it is an object of strings."""
    return {
        text(name, field): text(item, f"{field}.{short(name)}") for name, item in mapping(value, field, 100).items()
    }


def whole(value: object, field: str, least: int, most: int) -> int:
    """Return *value* if it is an integer from *least* to *most*."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{field} must be an integer from {least} to {most}, got {short(value)}")
    return value


def positive(value: object, field: str, most: float) -> float:
    """Return *value* if it is a number above 0, at most *most*."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{field} must be a number above 0 and at most {most:g}, got {short(value)}")
    return float(value)


def flag(value: object, field: str) -> bool:
    """Return *value* if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{field} must be true or false, got {short(value)}")
    return value
