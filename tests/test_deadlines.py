"""Deadlines from headers and measurements: what is believed, what is not, and which source wins."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sponge.deadlines import (
    DEADLINE_HEADER,
    MAX_HEADER_CHARACTERS,
    SENT_HEADER,
    TIMEOUT_HEADERS,
    DeadlineRule,
    parse_grpc_timeout,
    parse_instant,
    parse_milliseconds,
    parse_seconds,
)

untimed = settings(deadline=None)  # other people's machines are busy
RULE = DeadlineRule()
UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
NONSENSE = [
    "",
    " ",
    "nan",
    "NaN",
    "inf",
    "-1",
    "+1",
    "0",
    "0.0",
    "1e3",
    "1_000",
    "0x10",
    "١",
    "1.",
    ".5",
    "1 2",
    "1;2",
    "9" * 16,
]


@untimed
@given(st.integers(0, 99_999_999), st.sampled_from(sorted(UNITS_S)))
def test_grpc_timeouts_are_read_by_their_units(amount: int, unit: str) -> None:
    """All that the gRPC specification allows."""
    assert parse_grpc_timeout(f"{amount}{unit}") == amount * UNITS_S[unit]


@untimed
@given(st.text(max_size=12))
@example("100000000S")
@example("1s")
@example("1")
@example("S")
@example("١S")
@example("1S\n")
def test_other_grpc_timeouts_are_refused(value: str) -> None:
    """Nothing but digits and a unit gets through; the message names the value."""
    if re.match(r"\A[0-9]{1,8}[HMSmun]\Z", value):
        return
    with pytest.raises(ValueError, match="grpc-timeout must be") as caught:
        parse_grpc_timeout(value)
    assert repr(value) in str(caught.value)


@untimed
@given(st.decimals(min_value="0.001", max_value=999_999_999, places=3))
def test_decimal_timeouts(value: object) -> None:
    """Seconds and milliseconds differ by the factor only."""
    assert parse_seconds(str(value)) == float(str(value))
    assert parse_milliseconds(str(value)) == float(str(value)) / 1000.0


@pytest.mark.parametrize("value", NONSENSE)
def test_what_is_no_timeout_is_refused(value: str) -> None:
    """Python's float() would take half of these."""
    with pytest.raises(ValueError, match="positive decimal number"):
        parse_seconds(value)


def test_instants() -> None:
    """Seconds since 1970, or RFC 3339 with any zone; nothing without a zone."""
    assert parse_instant("1764121200.25") == 1764121200.25
    assert parse_instant("2025-11-26T01:40:00.25Z") == 1764121200.25
    assert parse_instant("2025-11-26t03:40:00+02:00") == 1764121200.0
    for value in ("2025-11-26T01:40:00", "2025-13-26T01:40:00Z", "2025-11-26", "Wed, 26 Nov 2025 01:40:00 GMT", "-1"):
        with pytest.raises(ValueError, match=r"instant|month"):
            parse_instant(value)


@pytest.mark.parametrize(
    ("name", "value", "allowance_s"),
    [
        ("X-Request-Timeout-Seconds", "0.25", 0.25),
        ("Request-Timeout-Ms", "250", 0.25),
        ("x-envoy-expected-rq-timeout-ms", "250", 0.25),
        ("Connect-Timeout-Ms", "250", 0.25),
        ("grpc-timeout", "250m", 0.25),
    ],
)
def test_every_header_form(name: str, value: str, allowance_s: float) -> None:
    """As text and as bytes, in any case; the time of other headers (traceparent) is none of ours."""
    other = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    for headers in ([(name, value), other], [(name.upper().encode(), value.encode())]):
        due = RULE.decide(headers, head_at=100.0)
        assert due.deadline == 100.0 + allowance_s
        assert due.source == name.lower()
        assert not due.ignored
        assert due.budget_s(100.1) == pytest.approx(allowance_s - 0.1)


def test_the_tightest_wins() -> None:
    """Whoever gave the least time is named as the source."""
    rule = DeadlineRule(slo_s=1.0)
    headers = [("request-timeout-ms", "800"), ("x-request-timeout-seconds", "0.9")]
    assert rule.decide(headers, head_at=0.0).deadline == 0.8
    assert rule.decide(headers, head_at=0.0, allowances={"grpc": 0.3}).source == "grpc"
    assert rule.decide([("request-timeout-ms", "5000")], head_at=0.0).source == "slo"
    assert rule.decide([], head_at=0.0).deadline == 1.0
    nobody = RULE.decide([], head_at=0.0)
    assert nobody.deadline is None
    assert nobody.source is None
    assert nobody.budget_s(0.0) is None


def test_upload_and_ways_are_gone_from_the_budget() -> None:
    """A 1 s SLO, a 60 ms round trip, 20 ms for the answer: 0.92 s from the head, 0.52 s after an upload of 0.4 s."""
    due = DeadlineRule(slo_s=1.0, rtt_s=0.06, answer_s=0.02).decide([], head_at=50.0)
    assert due.deadline == pytest.approx(50.92)
    assert due.budget_s(50.4) == pytest.approx(0.52)
    assert due.budget_s(51.0) == pytest.approx(-0.08)


def test_duplicated_headers_all_count() -> None:
    """On two lines or joined by a comma, as proxies may do."""
    for headers in (
        [("request-timeout-ms", "800"), ("request-timeout-ms", "300")],
        [("request-timeout-ms", "800, 300")],
        [("request-timeout-ms", "300,nonsense")],
    ):
        assert RULE.decide(headers, head_at=0.0).deadline == 0.3


@pytest.mark.parametrize("name", sorted(TIMEOUT_HEADERS))
@pytest.mark.parametrize("value", ["nan", "-5", "1e400", "", "٣S", "9" * (MAX_HEADER_CHARACTERS + 1)])
def test_nonsense_is_ignored_and_told(name: str, value: str) -> None:
    """A broken client gets the service's SLO, not an error, and the reason can be logged."""
    due = DeadlineRule(slo_s=2.0).decide([(name, value)], head_at=10.0)
    assert due.deadline == 12.0
    assert due.source == "slo"
    assert len(due.ignored) == 1
    assert due.ignored[0].startswith(name)


def test_a_long_list_is_not_cut_into_a_shorter_number() -> None:
    """A value that is too long is dropped whole: its first 64 characters could end within a number."""
    value = ", ".join(["60000"] * 9 + ["50000"])
    assert len(value) > MAX_HEADER_CHARACTERS
    assert RULE.decide([("request-timeout-ms", value)], head_at=0.0).deadline is None


def test_clients_are_bounded() -> None:
    """Too little and too much are cut; the service's own SLO is not."""
    rule = DeadlineRule(min_slo_s=0.01, max_slo_s=5.0)
    assert rule.decide([("grpc-timeout", "1n")], head_at=0.0).deadline == 0.01
    assert rule.decide([("grpc-timeout", "99999999H")], head_at=0.0).deadline == 5.0
    assert rule.decide([], head_at=0.0, allowances={"grpc": math.inf}).deadline == 5.0
    assert rule.decide([], head_at=0.0, allowances={"grpc": -3.0}).deadline == 0.01
    assert rule.decide([], head_at=0.0, allowances={"grpc": math.nan}).ignored == ("grpc: not a number",)
    assert DeadlineRule(slo_s=60.0, max_slo_s=5.0).decide([], head_at=0.0).deadline == 60.0


def test_only_believed_headers_count() -> None:
    """A public service may want to believe none of them."""
    headers = [("request-timeout-ms", "100"), (DEADLINE_HEADER, "1"), (SENT_HEADER, "nonsense")]
    assert DeadlineRule(slo_s=1.0, headers=frozenset()).decide(headers, head_at=0.0, wall_at=0.0).source == "slo"
    assert DeadlineRule(headers=frozenset({"Request-Timeout-Ms"})).decide(headers, head_at=0.0).deadline == 0.1


def test_absolute_deadlines_and_wrong_clocks() -> None:
    """Believed only as far as a clock can be trusted; with the time of sending, the offset cancels."""
    rule = DeadlineRule(slo_s=10.0, rtt_s=0.2, max_slo_s=60.0, max_skew_s=1.0)
    wall_at = 1_764_121_200.0

    def decide(*headers: tuple[str, str]) -> object:
        return rule.decide(headers, head_at=5.0, wall_at=wall_at)

    assert decide((DEADLINE_HEADER, f"{wall_at + 3}")) == rule.decide(
        [(DEADLINE_HEADER, "2025-11-26T01:40:03Z")], head_at=5.0, wall_at=wall_at
    )
    assert rule.decide([(DEADLINE_HEADER, f"{wall_at + 3}")], head_at=5.0, wall_at=wall_at).deadline == pytest.approx(
        7.9
    )
    for wrong in (wall_at - 1.5, wall_at + 62, 0.0, 9e14):
        due = rule.decide([(DEADLINE_HEADER, f"{wrong:.1f}")], head_at=5.0, wall_at=wall_at)
        assert due.source == "slo"
        assert "clock must be wrong" in due.ignored[0]
    # A client whose clock is a year behind, but tells when it sent.
    behind = wall_at - 3e7
    due = rule.decide([(DEADLINE_HEADER, f"{behind + 2}"), (SENT_HEADER, f"{behind}")], head_at=5.0, wall_at=wall_at)
    assert due.deadline == pytest.approx(5.0 + 2.0 - 0.2)
    reversed_ = rule.decide([(DEADLINE_HEADER, f"{behind}"), (SENT_HEADER, f"{behind}")], head_at=5.0, wall_at=wall_at)
    assert reversed_.source == "slo"
    assert "not after" in reversed_.ignored[0]
    assert "wall clock was not given" in rule.decide([(DEADLINE_HEADER, "5")], head_at=5.0).ignored[0]


HEADER_NAMES = st.sampled_from([*TIMEOUT_HEADERS, DEADLINE_HEADER, SENT_HEADER, "traceparent"])
VALUES = st.one_of(
    st.text(max_size=80),
    st.binary(max_size=80),
    st.from_regex(r"\A[0-9]{1,9}[HMSmun]?\Z"),
    st.from_regex(r"\A[0-9]{1,10}\.[0-9]{1,4}\Z"),
    st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
)


@untimed
@given(st.lists(st.tuples(HEADER_NAMES, VALUES), max_size=6), st.none() | st.floats(1e-3, 100), st.floats(-1e9, 2e9))
def test_no_header_can_break_or_stretch_a_deadline(
    headers: list[tuple[str, str | bytes]], slo_s: float | None, wall_at: float
) -> None:
    """Whatever clients send: no exception, no NaN, and a budget within the bounds; the SLO is never exceeded."""
    rule = DeadlineRule(slo_s=slo_s, min_slo_s=0.005, max_slo_s=200.0, max_skew_s=1.0)
    due = rule.decide(headers, head_at=0.0, wall_at=wall_at)
    if due.deadline is None:
        assert slo_s is None
        return
    assert -1.0 <= due.deadline <= 200.0
    if slo_s is not None:
        assert due.deadline <= slo_s
    if due.source not in (None, "slo", DEADLINE_HEADER):
        assert due.deadline >= 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slo_s": 0.0}, "slo_s must be positive and finite, got 0.0"),
        ({"slo_s": math.nan}, "slo_s must be positive"),
        ({"rtt_s": -0.1}, "rtt_s must be finite and not negative, got -0.1"),
        ({"answer_s": math.inf}, "answer_s must be finite"),
        ({"min_slo_s": 2.0, "max_slo_s": 1.0}, "min_slo_s must be positive and at most max_slo_s=1.0, got 2.0"),
        ({"headers": frozenset({"x-nonsense"})}, "headers names 'x-nonsense'"),
    ],
)
def test_bad_rules_are_refused(arguments: dict[str, object], message: str) -> None:
    """At construction, by name and value."""
    with pytest.raises(ValueError, match=re.escape(message)):
        DeadlineRule(**arguments)  # type: ignore[arg-type]
