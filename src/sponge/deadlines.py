"""Where a request's deadline comes from: what its client said and what its network took, measured and not asked for.

Rules, and why they hold:

* Every source gives an *allowance*: seconds from the moment the client sent its request until it wants to have the
  answer. The service's own SLO is one, a timeout in a header is one, gRPC's deadline is one.
* The allowance runs from the arrival of the request's *head*. The head is one small packet: it was sent about half a
  round trip before. The body may take long on a slow link, and that time counts, and whoever asks for the
  budget after the last byte is told what the upload has left of it. So

      deadline = head_at + allowance − rtt_s − answer_s

  is the instant by which the answer must leave: half a round trip was lost before the head, half is lost on the
  answer's way, and *answer_s* is for the bytes of a long answer.
* The tightest source wins: an answer that is too late for one of them is of no use to that one.
* A client is never believed blindly. An allowance is cut to ``[min_slo_s, max_slo_s]``; what makes no sense (not a
  number, negative, too long, not ASCII) is ignored, and told in `Due.ignored`: a broken client gets the service's SLO,
  not an error. Of a header that comes twice every value counts.
* No clock is read here: instants are arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import attrs

MAX_HEADER_CHARACTERS = 64
"""A longer value is not read: no timeout needs that many digits."""

DEADLINE_HEADER = "x-request-deadline"
"""When the answer is due on the client's wall clock, see `parse_instant`."""
SENT_HEADER = "x-request-sent"
"""When the request was sent, on the same clock; with it, how far that clock is off does not matter."""

_DECIMAL = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?", re.ASCII)
_GRPC_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_GRPC_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})", re.ASCII
)

HeaderValue = str | bytes
Headers = Iterable[tuple[HeaderValue, HeaderValue]]


def parse_seconds(value: str) -> float:
    """Return a timeout in decimal notation, like ``"1.5"`` [s].

    Raises
    ------
    ValueError
        If it is not a positive number of at most 15 digits before and after the point; no sign, no exponent.
    """
    if not _DECIMAL.fullmatch(value) or not float(value) > 0:
        raise ValueError(f"a timeout must be a positive decimal number, got {value!r}")
    return float(value)


def parse_milliseconds(value: str) -> float:
    """Return a timeout given in milliseconds, like ``"1500"``, in seconds; errors as for `parse_seconds`."""
    return parse_seconds(value) / 1000.0


def parse_grpc_timeout(value: str) -> float:
    """Return the value of a ``grpc-timeout`` header in seconds: up to eight digits and one of the units H M S m u n.

    Zero is allowed: it is what is left of a timeout that a proxy has used up.

    Raises
    ------
    ValueError
        If it is of another form.

    References
    ----------
    gRPC over HTTP/2, "Requests": TimeoutValue and TimeoutUnit.
    """
    match = _GRPC_TIMEOUT.fullmatch(value)
    if not match:
        raise ValueError(
            f"grpc-timeout must be one to eight digits and one of the units H, M, S, m, u, n, got {value!r}"
        )
    return int(match[1]) * _GRPC_UNIT_S[match[2]]


def parse_instant(value: str) -> float:
    """Return an instant of the wall clock [s since 1970]: seconds like ``"1764121200.25"``, or an RFC 3339 time.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if _DECIMAL.fullmatch(value):
        return float(value)
    match = _RFC3339.fullmatch(value)
    if not match:
        raise ValueError(f"an instant must be seconds since 1970 or an RFC 3339 time, got {value!r}")
    day, time, fraction, zone = match.groups()
    zone = "+00:00" if zone in "Zz" else zone
    whole = datetime.fromisoformat(f"{day}T{time}{zone}").astimezone(timezone.utc).timestamp()
    return whole + float(fraction or 0)


TIMEOUT_HEADERS: Mapping[str, Callable[[str], float]] = {
    "x-request-timeout-seconds": parse_seconds,
    "request-timeout-ms": parse_milliseconds,
    "x-envoy-expected-rq-timeout-ms": parse_milliseconds,
    "connect-timeout-ms": parse_milliseconds,
    "grpc-timeout": parse_grpc_timeout,
}
"""Headers that say how long the client (or the proxy before us) waits, and how each is read."""


@attrs.frozen(kw_only=True)
class Due:
    """By when an answer must leave, and who says so."""

    deadline: float | None
    """Instant on the clock of *head_at* [s]; None if no source gave one."""
    source: str | None = None
    """``"slo"``, the name of a header, or what the caller named it."""
    ignored: tuple[str, ...] = ()
    """What was not believed, and why."""

    def budget_s(self, now: float) -> float | None:
        """Return what is left at *now* [s]; negative if it is too late, None without a deadline."""
        return None if self.deadline is None else self.deadline - now


def _seconds(_: object, attribute: Any, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{attribute.name} must be finite and not negative, got {value}")


def _lower(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


@attrs.frozen(kw_only=True)
class DeadlineRule:
    """How a service turns what it knows of a request into a deadline.

    Raises
    ------
    ValueError
        If a duration is negative or not finite, *slo_s* or *min_slo_s* is not positive, or *min_slo_s* is above
        *max_slo_s*.
    """

    slo_s: float | None = attrs.field(default=None)
    """The service's own promise, for every request [s]; None: only what the client says counts."""
    rtt_s: float = attrs.field(default=0.0, validator=_seconds)
    """Round trip to the client [s]: half of it was lost before the head arrived, half is lost on the answer's way."""
    answer_s: float = attrs.field(default=0.0, validator=_seconds)
    """Allowance for the bytes of the answer on their way down [s]; nothing for a short one."""
    min_slo_s: float = attrs.field(default=0.001, validator=_seconds)
    """A client that asks for less counts as asking for this [s]."""
    max_slo_s: float = attrs.field(default=300.0, validator=_seconds)
    """A client that grants more counts as granting this [s]."""
    max_skew_s: float = attrs.field(default=1.0, validator=_seconds)
    """How far a client's wall clock may be off [s]: a head that arrives longer than this after its own deadline tells
    of a wrong clock, and so does a deadline farther away than *max_slo_s* and this."""
    headers: frozenset[str] = attrs.field(default=(*TIMEOUT_HEADERS, DEADLINE_HEADER), converter=_lower)
    """Headers that are believed, of `TIMEOUT_HEADERS` and `DEADLINE_HEADER`; empty: none."""

    def __attrs_post_init__(self) -> None:
        if self.slo_s is not None and not 0 < self.slo_s < math.inf:
            raise ValueError(f"slo_s must be positive and finite, got {self.slo_s}")
        if not 0 < self.min_slo_s <= self.max_slo_s:
            raise ValueError(f"min_slo_s must be positive and at most max_slo_s={self.max_slo_s}, got {self.min_slo_s}")
        if unknown := self.headers - {*TIMEOUT_HEADERS, DEADLINE_HEADER}:
            raise ValueError(f"headers names {min(unknown)!r}; known are {[*TIMEOUT_HEADERS, DEADLINE_HEADER]}")

    def decide(
        self,
        headers: Headers = (),
        *,
        head_at: float,
        wall_at: float | None = None,
        allowances: Mapping[str, float] | None = None,
    ) -> Due:
        """Return by when the answer to a request must leave.

        Parameters
        ----------
        headers
            The request's, in any case, as text or bytes.
        head_at
            When its head arrived [s on the clock of the deadline].
        wall_at
            The same instant on the wall clock [s since 1970]; without it absolute deadlines are ignored.
        allowances
            Further sources by name [s from *head_at*], bounded like those of headers.
        """
        relative, absolute, sent, ignored = self._read(headers)
        claims = {} if self.slo_s is None else {"slo": self.slo_s}
        for name, allowance_s in [*relative, *(allowances or {}).items()]:
            if math.isnan(allowance_s):
                ignored.append(f"{name}: not a number")
            else:
                bounded = min(max(allowance_s, self.min_slo_s), self.max_slo_s)
                claims[name] = min(claims.get(name, math.inf), bounded)
        on_the_way_s = self.rtt_s + self.answer_s
        ends = {name: head_at + allowance_s - on_the_way_s for name, allowance_s in claims.items()}
        for instant in absolute:
            end = self._absolute(instant, sent, head_at, wall_at, ignored)
            if end is not None:
                ends[DEADLINE_HEADER] = min(ends.get(DEADLINE_HEADER, math.inf), end)
        source = min(ends, key=ends.__getitem__, default=None)
        return Due(deadline=None if source is None else ends[source], source=source, ignored=tuple(ignored))

    def _read(self, headers: Headers) -> tuple[list[tuple[str, float]], list[float], float | None, list[str]]:
        """Return the timeouts, deadlines and time of sending that the headers hold, and what made no sense."""
        relative: list[tuple[str, float]] = []
        absolute: list[float] = []
        sent: list[float] = []
        ignored: list[str] = []
        for raw_name, raw_value in headers:
            name = _text(raw_name).lower()
            if name not in self.headers and not (name == SENT_HEADER and DEADLINE_HEADER in self.headers):
                continue
            if len(raw_value) > MAX_HEADER_CHARACTERS:
                ignored.append(f"{name}: longer than {MAX_HEADER_CHARACTERS} characters")
                continue
            for value in _text(raw_value).split(","):
                value = value.strip(" \t")
                try:
                    if name in TIMEOUT_HEADERS:
                        relative.append((name, TIMEOUT_HEADERS[name](value)))
                    else:
                        (sent if name == SENT_HEADER else absolute).append(parse_instant(value))
                except (ValueError, OverflowError) as error:
                    ignored.append(f"{name}: {error}")
        return relative, absolute, max(sent, default=None), ignored

    def _absolute(
        self, instant: float, sent: float | None, head_at: float, wall_at: float | None, ignored: list[str]
    ) -> float | None:
        """Return when the answer must leave for a deadline on the client's wall clock; None if it is not believed."""
        if sent is not None:
            if not instant > sent:
                ignored.append(f"{DEADLINE_HEADER}: not after {SENT_HEADER}")
                return None
            bounded = min(max(instant - sent, self.min_slo_s), self.max_slo_s)
            return head_at + bounded - self.rtt_s - self.answer_s
        if wall_at is None:
            ignored.append(f"{DEADLINE_HEADER}: the wall clock was not given")
            return None
        left_s = instant - wall_at
        if not -self.max_skew_s <= left_s <= self.max_slo_s + self.max_skew_s:
            ignored.append(f"{DEADLINE_HEADER}: {left_s:+.3g} s from here: the client's clock must be wrong")
            return None
        return head_at + min(left_s, self.max_slo_s) - self.rtt_s / 2 - self.answer_s


def _text(value: HeaderValue) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
