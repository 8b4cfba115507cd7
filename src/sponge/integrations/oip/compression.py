"""Compressed bodies of HTTP requests and answers: gzip and deflate.

Rules, and why they hold:

* What a body inflates to is bounded before it is inflated: a kilobyte can stand for a megabyte, and a client must not
  make the service hold more than it would have taken uncompressed.
* A body is one complete stream, whose checksum is right, and nothing else. Streams in a row are allowed by gzip, but
  millions of empty ones fit into a body that is allowed, and no client of the protocol sends them.
* Answers are compressed as fast as can be (level 1): the higher levels take several times as long for a few percent,
  from the cores that the model would use.

References
----------
RFC 9110, "Content-Encoding", "Accept-Encoding": deflate is the zlib format (RFC 1950), and x-gzip is gzip.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from sponge.errors import SpongeError
from sponge.integrations.outcomes import InvalidRequest

_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_ALIASES = {"": "identity", "x-gzip": "gzip"}
ENCODINGS = tuple(_WINDOW_BITS)
"""What is understood, and what answers are compressed with."""
LEVEL = 1
MIN_ANSWER_BYTES = 1024
"""A shorter answer fits into a packet as it is."""


class UnknownEncoding(SpongeError):
    """A request's body is compressed in a way that is not understood."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        super().__init__(f"content-encoding must be one of identity, {', '.join(ENCODINGS)}, got {encoding[:60]!r}")


class BodyTooLong(SpongeError):
    """A request's body is longer than the service takes, as it came or inflated."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        super().__init__(f"a body must be at most {max_bytes} bytes long, compressed and inflated")


def encoding_of(header: bytes) -> str | None:
    """Return how a body is compressed by its ``Content-Encoding``; None: not at all.

    Raises
    ------
    UnknownEncoding
        If it is in another way, or in several.
    """
    text = header.decode("latin-1").strip().lower()
    encoding = _ALIASES.get(text, text)
    if encoding == "identity":
        return None
    if encoding not in _WINDOW_BITS:
        raise UnknownEncoding(text)
    return encoding


def accepted_encoding(header: bytes) -> str | None:
    """Return how an answer is to be compressed by ``Accept-Encoding``: what the client likes best; None: not at all."""
    best, liked = "identity", 0.0
    for item in header.decode("latin-1").lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        encoding = _ALIASES.get(name, name)
        weight = _weight(parameters)
        if encoding in (*ENCODINGS, "identity") and weight > liked:
            best, liked = encoding, weight
    return None if best == "identity" else best


def _weight(parameters: list[str]) -> float:
    """Return what ``q`` says; 0, not acceptable, if it makes no sense."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0 <= weight <= 1 else 0.0
    return 1.0


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return what *body* was before it was compressed.

    Raises
    ------
    BodyTooLong
        If that is more than *max_bytes*; no more than a byte beyond them was inflated.
    InvalidRequest
        If the stream is damaged, ends early, or is not all of the body.
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        inflated = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is no intact {encoding} stream: {error}") from error
    if len(inflated) > max_bytes:
        raise BodyTooLong(max_bytes)
    if not inflater.eof:
        raise InvalidRequest(f"the {encoding} stream of the body ends early, after {len(inflated)} bytes inflated")
    if inflater.unused_data:
        raise InvalidRequest(
            f"{len(inflater.unused_data)} bytes of the body come after the end of its {encoding} stream"
        )
    return inflated


def deflate(parts: Iterable[bytes], encoding: str) -> bytes:
    """Return *parts*, one after the other, compressed."""
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return b"".join([*map(deflater.compress, parts), deflater.flush()])
