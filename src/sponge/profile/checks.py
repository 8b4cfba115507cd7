"""Reading JSON that may come from anywhere: every type and size is checked, and errors name the field."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

MAX_FILE_BYTES = 64 * 2**20
MAX_TEXT = 4_096


def read_json(path: str | os.PathLike[str]) -> object:
    """Return the contents of a JSON file.

    Raises
    ------
    ValueError
        If it is no regular file, too large, or no JSON (NaN and infinities are none).
    OSError
        If it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would block
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number of JSON")


def short(value: object) -> str:
    """Return a value's repr, cut to a line of an error message."""
    text = repr(value)
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
