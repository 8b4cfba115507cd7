"""Reading bandwidth logs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sponge.errors import TraceError
from sponge.workload import BandwidthTrace, load_bandwidth

GHENT = """\
1450000000500 500 51.06 3.73 1000 500
1450000001500 1500 51.06 3.73 4000 1000
1450000002501 2501 51.06 3.73 0 1001
"""


def write(tmp_path: Path, text: str) -> Path:
    """Write a log and return its path."""
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8")
    return path


def test_ghent_log_gives_bytes_per_second_of_each_interval(tmp_path: Path) -> None:
    """Each line tells of the time since the line before it, which is not always a second."""
    trace = load_bandwidth(write(tmp_path, GHENT))
    assert trace.times_s.tolist() == pytest.approx([0.0, 0.5, 1.5])
    assert trace.bytes_per_s.tolist() == pytest.approx([2000.0, 4000.0, 0.0])
    assert trace.end_s == pytest.approx(2.501)
    assert trace.loops


def test_mahimahi_file_is_read_to_the_millisecond(tmp_path: Path) -> None:
    """A line is a chance to deliver 1,500 bytes; several may share a millisecond, and the file loops."""
    trace = load_bandwidth(write(tmp_path, "0\n1\n4\n4\n5\n"))
    assert trace.times_s.tolist() == pytest.approx([0.0, 0.001, 0.003, 0.004])
    assert trace.bytes_per_s.tolist() == pytest.approx([3e6, 0.0, 3e6, 1.5e6])
    assert trace.end_s == 0.005
    assert trace.mean_bytes_per_s == pytest.approx(5 * 1500 / 0.005)
    assert trace.upload_time_s(0.0, 6000.0) == pytest.approx(0.004)
    assert trace.upload_time_s(0.0, 7500.0 * 3) == pytest.approx(0.015)


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("time_s,bytes_per_s\n0,100\n2,50\n", [100.0, 50.0]),
        ("# a comment\n\nTime_s; Mbps\n10; 8\n12; 0.4\n", [1e6, 5e4]),
        ('"where"\t"kbps"\t"time_ms"\nhome\t8\t0\nbus\t0\t2000\n', [1000.0, 0.0]),
        ("time_s,mbit_per_s\r\n0,8\r\n2,16\r\n", [1e6, 2e6]),
        ("﻿time_s,bits_per_s\n0,8\n2,16\n", [1.0, 2.0]),
    ],
)
def test_csv_in_its_usual_dialects(tmp_path: Path, text: str, rates: list[float]) -> None:
    """Delimiters, capitals, quotes, comments, line ends and byte-order marks are no reason to fail."""
    trace = load_bandwidth(write(tmp_path, text))
    assert trace.times_s.tolist() == [0.0, 2.0]
    assert trace.bytes_per_s.tolist() == pytest.approx(rates)
    assert trace.end_s == 4.0


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (GHENT + "1450000003501 3501 51.06 3.73 100\n", 4, "six numbers"),
        (GHENT + "1450000003501 3501 51.06 3.73 -1 1000\n", 4, "six numbers"),
        (GHENT + "1450000003501 3501 51.06 3.73 100 0\n", 4, "six numbers"),
        (GHENT + "1450000003501 3501 51.06 3.73 1_0 1000\n", 4, "six numbers"),
        (GHENT + "1450000003501 3501 51.06 3.73 nan 1000\n", 4, "six numbers"),
        ("1\n3\n2\n", 3, "not less than the one before"),
        ("1\n2.5\n", 2, "whole number"),
        ("1\n-2\n", 2, "whole number"),
        ("1\n99999999999999999999\n", 2, "whole number"),
        ("0\n0\n", 2, "after millisecond 0"),
        ("time_s,mbps\n0,1\n0,2\n", 3, "greater than the last"),
        ("time_s,mbps\n0,1\n1,-2\n", 3, "bandwidth ≥ 0"),
        ("time_s,mbps\n0,1\n1\n", 3, "2 fields"),
        ("time_s,mbps\n0,x\n", 2, "2 fields"),
        ("time_s,speed\n0,1\n", 1, "bytes_per_s"),
        ("time_s,mbps,kbps\n0,1,1\n", 1, "one of"),
        ("time_s,mbps\n", 1, "lines of data"),
        ("hello world\n", 1, "known format"),
        ("１２\n", 1, "known format"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, text: str, line: int, word: str) -> None:
    """The message must let its reader find the place in a log of thousands of lines."""
    path = write(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        load_bandwidth(path)
    message = str(caught.value)
    assert f"{path}, line {line}:" in message
    assert word in message


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "time_s,mbps\n0,0\n1,0\n"])
def test_log_without_data_is_refused(tmp_path: Path, text: str) -> None:
    """An upload under no bandwidth at all would never end."""
    path = write(tmp_path, text)
    with pytest.raises(TraceError, match="data") as caught:
        load_bandwidth(path)
    assert str(path) in str(caught.value)


def test_unreadable_file_is_a_trace_error(tmp_path: Path) -> None:
    """One kind of error for "this log is of no use", whatever the reason."""
    with pytest.raises(TraceError, match="cannot be read"):
        load_bandwidth(tmp_path / "missing")
    with pytest.raises(TraceError, match="cannot be read"):
        load_bandwidth("a\0b")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not a text file"):
        load_bandwidth(binary)


def test_files_that_are_no_logs_for_their_size_or_kind_are_refused(tmp_path: Path) -> None:
    """A pipe, a device, a line or a file without an end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(TraceError, match="cannot be read"):
            load_bandwidth(path)
    with pytest.raises(TraceError, match="line 2: expected a line of at most 10000 characters"):
        load_bandwidth(write(tmp_path, "1\n" + "1" * 10_001))
    with pytest.raises(TraceError, match="expected a file of at most 67108864 characters"):
        load_bandwidth(write(tmp_path, "1\n" + ("#" * 9_999 + "\n") * 6_800))


@pytest.mark.parametrize(
    "text",
    [
        "1 1 1 1 5 5e-324\n",
        "1 1 1 1 5 1e308\n1 1 1 1 5 1e308\n",
        "time_s,mbps\n0,1\n1e308,1\n",
        "time_s,mbps\n-1e308,1\n1e308,1\n",
        "time_s,mbps\n0,1e308\n1,1e308\n",
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_at_the_ends_of_what_a_float_holds_are_refused(tmp_path: Path, text: str) -> None:
    """Neither a division by zero nor an infinity, nor a warning of one; such files were found by fuzzing."""
    with pytest.raises(TraceError, match=r"expected|must be"):
        load_bandwidth(write(tmp_path, text))


def test_named_format_is_not_guessed(tmp_path: Path) -> None:
    """A file of another format than was said is an error, not a surprise."""
    path = write(tmp_path, GHENT)
    with pytest.raises(TraceError, match="line 1: expected a whole number"):
        load_bandwidth(path, "mahimahi")
    with pytest.raises(ValueError, match="format must be"):
        load_bandwidth(path, "pcap")  # type: ignore[arg-type]


log_like = st.one_of(
    st.text(max_size=200),
    st.lists(
        st.lists(
            st.one_of(
                st.sampled_from(["time_s", "mbps", "0", "1e308", "1e-308", "-1", "nan", "inf", "9" * 400, "#", '"']),
                st.integers(-5, 10**15).map(str),
                st.floats().map(repr),
            ),
            min_size=1,
            max_size=6,
        ),
        max_size=6,
    ).flatmap(lambda rows: st.sampled_from(" ,;\t").map(lambda gap: "\n".join(gap.join(row) for row in rows))),
)


@given(log_like, st.sampled_from(["auto", "ghent", "mahimahi", "csv"]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_is_a_usable_trace_or_a_trace_error(tmp_path: Path, text: str, format: str) -> None:
    """A log comes from elsewhere: its content may not end in another exception, or in nonsense."""
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        trace = load_bandwidth(path, format)  # type: ignore[arg-type]
    except TraceError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
        return
    assert isinstance(trace, BandwidthTrace)
    upload_s = trace.upload_time_s([0.0, 0.5, 1e6], 1e5)
    assert np.all(np.isfinite(upload_s) & (upload_s >= 0))
