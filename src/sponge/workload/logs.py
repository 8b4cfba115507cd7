"""Bandwidth logs of several formats, read into a `BandwidthTrace`.

The formats are told apart by their first line. A file is either understood as a whole or refused with a
`TraceError` that names the line: a log that is silently half read would make every figure drawn from it
wrong. It is read line by line, so a file of any kind takes little more memory than the trace made of it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from array import array
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import attrs
import numpy as np

from sponge.errors import TraceError
from sponge.files import open_data
from sponge.workload.bandwidth import MAX_TIME_S, BandwidthTrace

LogFormat: TypeAlias = Literal["auto", "ghent", "mahimahi", "csv"]

MAHIMAHI_PACKET_BYTES = 1500
"""What one line of a packet-delivery file delivers: a full Ethernet frame, as ``mm-link`` defines it."""

MAX_FILE_CHARACTERS = 2**26
"""Ten minutes of packets at 100 Mbit/s are half of it."""
MAX_LINE_CHARACTERS = 10_000
SHORTEST_STEP_MS = 1e-6
"""Less is no time between two lines of a log, and the bandwidth would be a division by nothing."""

_BYTES_PER_S_OF = {
    "bytes_per_s": 1.0,
    "bits_per_s": 1 / 8,
    "kbps": 1e3 / 8,
    "kbit_per_s": 1e3 / 8,
    "mbps": 1e6 / 8,
    "mbit_per_s": 1e6 / 8,
}
_SECONDS_OF = {"time_s": 1.0, "time_ms": 1e-3}


def load_bandwidth(path: str | os.PathLike[str], format: LogFormat = "auto") -> BandwidthTrace:
    """Read a bandwidth log.

    Parameters
    ----------
    path
        The log. Blank lines and lines that begin with ``#`` are skipped in every format.
    format
        ``"ghent"``: six columns separated by blanks, as in the 4G logs of Ghent University: epoch [ms],
        time since the start [ms], latitude, longitude, bytes since the last line, time since the last line
        [ms].
        ``"mahimahi"``: one whole number a line, the millisecond of an opportunity to deliver 1,500 bytes;
        the trace loops at the last one. It is read exactly to the millisecond: the packet of millisecond t
        is delivered evenly over [t − 1, t] (of t = 0, over [0, 1]).
        ``"csv"``: a header with ``time_s`` or ``time_ms`` and one of ``bytes_per_s``, ``bits_per_s``,
        ``kbps`` or ``mbps`` (thousands and millions of *bits* per second), separated by comma, semicolon or
        tab; other columns are ignored. Each bandwidth holds until the next line; the last as long as the
        one before it (one second if there is but one line).
        ``"auto"``: by the first line.

    Returns
    -------
    BandwidthTrace
        Starts at 0 whatever the first time of the log, and loops.

    Raises
    ------
    TraceError
        If the file cannot be read or is not what its format says; names file, line and what was expected.
    ValueError
        If *format* is none of the above.
    """
    if format not in ("auto", *_READERS):
        raise ValueError(f"format must be 'auto' or one of {', '.join(_READERS)}, got {format!r}")
    name = os.fspath(path)
    try:
        file = io.TextIOWrapper(open_data(name), encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TraceError(f"{name}: cannot be read ({error})") from error
    with file:
        try:
            if os.fstat(file.fileno()).st_size > MAX_FILE_CHARACTERS:
                raise TraceError(f"{name}: expected a file of at most {MAX_FILE_CHARACTERS} characters, got more")
            lines = _lines(name, file)
            first = next(lines, None)
            if first is None:
                raise TraceError(f"{name}: holds no data, expected a bandwidth log")
            reader = _READERS[_guess(first) if format == "auto" else format]
            return reader(itertools.chain([first], lines))
        except UnicodeDecodeError as error:
            raise TraceError(f"{name}: not a text file in UTF-8 ({error.reason})") from error
        except OSError as error:
            raise TraceError(f"{name}: cannot be read ({error})") from error
        except ValueError as error:
            raise TraceError(f"{name}: {error}") from error


def _lines(name: str, file: io.TextIOWrapper) -> Iterator[_Line]:
    """Return the lines that hold data, one at a time."""
    read = 0
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_CHARACTERS + 1)
        if not line:
            return
        read += len(line)
        if len(line) > MAX_LINE_CHARACTERS or read > MAX_FILE_CHARACTERS:
            what, most = (
                ("line", MAX_LINE_CHARACTERS) if len(line) > MAX_LINE_CHARACTERS else ("file", MAX_FILE_CHARACTERS)
            )
            raise TraceError(f"{name}, line {number}: expected a {what} of at most {most} characters, got more")
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield _Line(file=name, number=number, text=stripped)


@attrs.frozen(kw_only=True, slots=True)
class _Line:
    file: str
    number: int
    text: str

    def wrong(self, expected: str) -> TraceError:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return TraceError(f"{self.file}, line {self.number}: expected {expected}, got {shown!r}")

    def floats(self, fields: list[str], expected: str) -> list[float]:
        try:
            # float() would also take "1_000"; no log writes that, so it is a sign of something else.
            values = [math.nan if "_" in field else float(field) for field in fields]
        except ValueError:
            raise self.wrong(expected) from None
        if not all(map(math.isfinite, values)):
            raise self.wrong(expected)
        return values


def _guess(line: _Line) -> str:
    columns = {field.strip().strip('"').lower() for field in line.text.split(_delimiter(line.text))}
    if columns & set(_SECONDS_OF) or columns & set(_BYTES_PER_S_OF):
        return "csv"
    fields = line.text.split()
    if len(fields) == 6:
        return "ghent"
    if len(fields) == 1 and fields[0].isascii() and fields[0].isdigit():
        return "mahimahi"
    raise line.wrong(
        "a log of a known format (six numbers: Ghent; one whole number: Mahimahi; a header with time_s and "
        "bytes_per_s or mbps: CSV)"
    )


def _ghent(lines: Iterator[_Line]) -> BandwidthTrace:
    expected = "six numbers: epoch ms, ms since start, latitude, longitude, bytes and ms (> 0) since the last line"
    durations_s, rates = array("d"), array("d")
    for line in lines:
        fields = line.text.split()
        if len(fields) != 6:
            raise line.wrong(expected)
        values = line.floats(fields, expected)
        size_bytes, milliseconds = values[4], values[5]
        if size_bytes < 0 or not SHORTEST_STEP_MS <= milliseconds <= MAX_TIME_S * 1000:
            raise line.wrong(expected)
        durations_s.append(milliseconds / 1000)
        rates.append(size_bytes / (milliseconds / 1000))
    edges_s = np.concatenate([[0.0], np.cumsum(durations_s)])
    return BandwidthTrace(times_s=edges_s[:-1], bytes_per_s=rates, end_s=edges_s[-1])


def _mahimahi(lines: Iterator[_Line]) -> BandwidthTrace:
    expected = "a whole number of milliseconds, not less than the one before"
    edges_ms, packets = array("q", [0]), array("q")
    for milliseconds, group in itertools.groupby(_milliseconds(lines, expected), key=lambda ms: max(ms, 1)):
        if milliseconds - 1 > edges_ms[-1]:
            edges_ms.append(milliseconds - 1)
            packets.append(0)
        edges_ms.append(milliseconds)
        packets.append(sum(1 for _ in group))
    return BandwidthTrace(
        times_s=np.array(edges_ms[:-1], dtype=np.float64) / 1000,
        bytes_per_s=np.array(packets, dtype=np.float64) * MAHIMAHI_PACKET_BYTES * 1000,
        end_s=edges_ms[-1] / 1000,
    )


def _milliseconds(lines: Iterator[_Line], expected: str) -> Iterator[int]:
    last = 0
    line: _Line | None = None
    for line in lines:
        # Thirteen digits are 300 years; more would be a number of another kind.
        if not (line.text.isascii() and line.text.isdigit() and len(line.text) <= 13 and int(line.text) >= last):
            raise line.wrong(expected)
        last = int(line.text)
        yield last
    if line is not None and last == 0:
        raise line.wrong("a last opportunity after millisecond 0: the trace loops there")


def _csv(lines: Iterator[_Line]) -> BandwidthTrace:
    header = next(lines)
    delimiter = _delimiter(header.text)
    time_at, seconds, rate_at, bytes_per_s, width = _header(header, delimiter)
    times_s, rates = array("d"), array("d")
    for line in lines:
        expected = f"{width} fields, with a time greater than the last and a bandwidth ≥ 0"
        fields = [field.strip().strip('"') for field in line.text.split(delimiter)]
        if len(fields) != width:
            raise line.wrong(expected)
        time, rate = line.floats([fields[time_at], fields[rate_at]], expected)
        if rate < 0 or abs(time) * seconds > MAX_TIME_S or (times_s and time * seconds <= times_s[-1]):
            raise line.wrong(expected)
        times_s.append(time * seconds)
        rates.append(rate * bytes_per_s)
    if not times_s:
        raise TraceError(f"{header.file}, line {header.number}: expected lines of data after the header, got none")
    last_step_s = times_s[-1] - times_s[-2] if len(times_s) > 1 else 1.0
    starts_s = np.array(times_s) - times_s[0]
    return BandwidthTrace(times_s=starts_s, bytes_per_s=rates, end_s=starts_s[-1] + last_step_s)


def _header(line: _Line, delimiter: str) -> tuple[int, float, int, float, int]:
    columns = [field.strip().strip('"').lower() for field in line.text.split(delimiter)]
    times = [column for column in columns if column in _SECONDS_OF]
    rates = [column for column in columns if column in _BYTES_PER_S_OF]
    if len(times) != 1 or len(rates) != 1:
        raise line.wrong(f"a header with one of {', '.join(_SECONDS_OF)} and one of {', '.join(_BYTES_PER_S_OF)}")
    time, rate = times[0], rates[0]
    return columns.index(time), _SECONDS_OF[time], columns.index(rate), _BYTES_PER_S_OF[rate], len(columns)


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


_READERS: dict[str, Callable[[Iterator[_Line]], BandwidthTrace]] = {
    "ghent": _ghent,
    "mahimahi": _mahimahi,
    "csv": _csv,
}
