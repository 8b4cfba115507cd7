"""Compressed bodies: Triton's clients over HTTP and gRPC, bombs, damaged streams, and how encodings are agreed on."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import given
from hypothesis import strategies as st

from sponge.integrations.oip.compression import (
    MIN_ANSWER_BYTES,
    BodyTooLong,
    UnknownEncoding,
    accepted_encoding,
    deflate,
    encoding_of,
    inflate,
)
from sponge.integrations.oip.http import LENGTH_HEADER
from sponge.integrations.outcomes import InvalidRequest
from tests.integrations import test_oip_grpc as over_grpc
from tests.integrations.test_oip_http import Served, document, served, tensor
from tests.live import models

__all__ = ["served"]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
COLUMNS = 4096
WIDE = np.arange(COLUMNS, dtype=np.float32)[None]
grpc_served = over_grpc.served


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_compresses_both_ways(served: Served, encoding: str, binary: bool) -> None:
    """Either direction alone, and both; the client inflates what it asked for."""
    served.start(models.identity(columns=COLUMNS), slo_s=30.0)
    for request, response in ((encoding, None), (None, encoding), (encoding, encoding)):
        result = served.client.infer(
            "model",
            [tensor(WIDE, binary=binary)],
            outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
            request_compression_algorithm=request,
            response_compression_algorithm=response,
        )
        assert np.array_equal(result.as_numpy("y"), WIDE)


@pytest.mark.parametrize("encoding", COMPRESS)
def test_answers_are_compressed_on_the_wire(served: Served, encoding: str) -> None:
    """The encoding is named, the length of the document is that before compression, and bytes are saved."""
    served.start(models.identity(columns=COLUMNS), slo_s=30.0)
    body = {
        **document(x={"shape": [1, COLUMNS], "data": WIDE[0].tolist()}),
        "parameters": {"binary_data_output": True},
    }
    answer = served.post(body, accept_encoding=f"br, {encoding}")
    assert answer.headers["content-encoding"] == encoding
    assert len(answer.body) < WIDE.nbytes
    whole = inflate(answer.body, encoding, 10 * WIDE.nbytes)
    length = int(answer.headers[LENGTH_HEADER])
    assert json.loads(whole[:length])["outputs"][0]["shape"] == [1, COLUMNS]
    assert whole[length:] == WIDE.tobytes()
    assert "content-encoding" not in served.post(body).headers


def test_short_answers_stay_as_they_are(served: Served) -> None:
    """So do refusals, whatever the client accepts."""
    served.start(models.identity(), slo_s=30.0)
    for body, status in ((document(), 200), ({}, 400)):
        answer = served.post(body, accept_encoding="gzip")
        assert answer.status == status
        assert "content-encoding" not in answer.headers
        assert len(answer.body) < MIN_ANSWER_BYTES
        assert answer.json()


def test_a_service_can_leave_answers_as_they_are(served: Served) -> None:
    """Many clients always say that they accept gzip, and the service knows its network."""
    served.start(models.identity(columns=COLUMNS), slo_s=30.0, compress_answers=False)
    body = document(x={"shape": [1, COLUMNS], "data": WIDE[0].tolist()})
    answer = served.post(gzip.compress(json.dumps(body).encode()), content_encoding="gzip", accept_encoding="gzip")
    assert "content-encoding" not in answer.headers
    assert answer.json()["outputs"][0]["data"] == WIDE[0].tolist()


def test_the_asyncio_client(served: Served) -> None:
    """Its HTTP library accepts gzip without being told to, and does not inflate what is no inference."""
    served.start(models.identity(columns=COLUMNS), slo_s=30.0)

    async def run() -> Any:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            assert (await client.get_model_metadata("model"))["name"] == "model"
            plain = await client.infer("model", [tensor(WIDE)])
            asked = await client.infer("model", [tensor(WIDE + 1)], response_compression_algorithm="deflate")
            return plain.as_numpy("y"), asked.as_numpy("y")

    plain, asked = asyncio.run(run())
    assert np.array_equal(plain, WIDE)
    assert np.array_equal(asked, WIDE + 1)


@pytest.mark.parametrize("encoding", COMPRESS)
def test_bombs_are_refused(served: Served, encoding: str) -> None:
    """A few kilobytes that stand for many more than the service takes: 413; what just fits is read."""
    served.start(models.identity(), slo_s=30.0, max_body_bytes=100_000)
    fits = json.dumps(document()).encode().ljust(100_000)
    assert served.post(COMPRESS[encoding](fits), content_encoding=encoding).status == 200
    for size in (100_001, 50_000_000):
        bomb = COMPRESS[encoding](fits.ljust(size))
        assert len(bomb) < 100_000
        answer = served.post(bomb, content_encoding=encoding)
        assert answer.status == 413
        assert "at most 100000 bytes" in answer.json()["error"]
    assert served.scheduler.statistics().submitted == 1


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_bomb_is_not_inflated_whole(encoding: str) -> None:
    """Memory stays near the bound while a hundred times as much is in the stream."""
    bomb = COMPRESS[encoding](bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLong, match="at most 1000000 bytes"):
            inflate(bomb, encoding, 1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("encoding", COMPRESS)
def test_damaged_streams_are_told(served: Served, encoding: str) -> None:
    """Truncated anywhere, with a wrong checksum, followed by something, or no stream at all: 400."""
    served.start(models.identity(), slo_s=30.0)
    whole = COMPRESS[encoding](json.dumps(document()).encode())
    other = COMPRESS["deflate" if encoding == "gzip" else "gzip"](json.dumps(document()).encode())
    flipped = bytearray(whole)
    flipped[-1 if encoding == "deflate" else -5] ^= 1  # of the checksum
    cases = {
        "ends early": [b"", *(whole[:size] for size in (1, len(whole) // 2, len(whole) - 1))],
        "no intact": [bytes(flipped), other, json.dumps(document()).encode()],
        "after the end": [whole + b"{", whole * 2],
    }
    for text, bodies in cases.items():
        for body in bodies:
            answer = served.post(body, content_encoding=encoding)
            assert answer.status == 400, (text, body)
            assert text in answer.json()["error"]
    assert served.scheduler.statistics().submitted == 0
    assert served.post(whole, content_encoding=encoding.upper()).status == 200


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, gzip", "gzip;q=1", "nonsense" * 100])
def test_unknown_encodings_are_refused(served: Served, header: str) -> None:
    """415, and what is understood."""
    served.start(models.identity(), slo_s=30.0)
    answer = served.post(document(), content_encoding=header)
    assert answer.status == 415
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    assert "must be one of identity, gzip, deflate" in answer.json()["error"]


def test_how_a_body_is_compressed() -> None:
    """Names in any case, gzip's old one, and none."""
    for header, encoding in {
        b"": None,
        b"identity": None,
        b" GZip ": "gzip",
        b"x-gzip": "gzip",
        b"deflate": "deflate",
    }.items():
        assert encoding_of(header) == encoding
    with pytest.raises(UnknownEncoding, match="'br'"):
        encoding_of(b"br")


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        (b"", None),
        (b"gzip", "gzip"),
        (b"deflate", "deflate"),
        (b"br, Deflate, gzip", "deflate"),
        (b"deflate;q=0.5, gzip;q=0.8", "gzip"),
        (b"gzip;q=0", None),
        (b"gzip;q=0, deflate ; q=0.1", "deflate"),
        (b"identity, gzip;q=0.5", None),
        (b"gzip;q=0.5, identity;q=0.1", "gzip"),
        (b"gzip;q=nan, deflate;q=2, x-gzip;q=, *", None),
        (b";;,,=\xff", None),
    ],
)
def test_how_an_answer_is_compressed(header: bytes, encoding: str | None) -> None:
    """What the client likes best of what there is; what makes no sense asks for nothing."""
    assert accepted_encoding(header) == encoding


@pytest.mark.parametrize("encoding", COMPRESS)
def test_what_is_deflated_is_inflated(encoding: str) -> None:
    """In parts or whole, also nothing; bounds count bytes."""
    data = np.random.default_rng(7).bytes(10_000)
    assert inflate(deflate([data[:100], data[100:]], encoding), encoding, 10_000) == data
    assert inflate(deflate([], encoding), encoding, 0) == b""
    with pytest.raises(BodyTooLong):
        inflate(deflate([data], encoding), encoding, 9_999)
    with pytest.raises(InvalidRequest):
        inflate(data, encoding, 10_000)


@given(data=st.binary(max_size=200), whole=st.binary(max_size=2000), at=st.integers(0, 100), bound=st.integers(0, 300))
def test_nothing_that_a_client_sends_is_a_surprise(data: bytes, whole: bytes, at: int, bound: int) -> None:
    """Any bytes as a header or as a body, and a stream damaged anywhere: refused, or within the bound and as it was."""
    assert accepted_encoding(data) in (None, *COMPRESS)
    with suppress(UnknownEncoding):
        assert encoding_of(data) in (None, *COMPRESS)
    for encoding, compress in COMPRESS.items():
        stream = compress(whole)
        damaged = stream[:at] + data + stream[at + len(data) :]
        for body in (data, damaged, stream[:at]):
            with suppress(InvalidRequest, BodyTooLong):
                inflated = inflate(body, encoding, bound)
                assert len(inflated) <= bound
                assert body != stream or inflated == whole


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_grpc_clients_may_compress(grpc_served: over_grpc.Served, algorithm: str) -> None:
    """grpcio inflates by itself, on both kinds of servers, and keeps to the server's bound on messages."""
    grpc_served.start(models.identity(columns=COLUMNS), slo_s=30.0)
    result = grpc_served.client.infer("model", [over_grpc.tensor(WIDE)], compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy("y"), WIDE)
    bomb = over_grpc.message(np.zeros((1, 17 << 20), dtype=np.float32))  # 68 MiB
    compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}[algorithm]
    with pytest.raises(grpc.RpcError) as caught:
        grpc_served.stub.ModelInfer(bomb, compression=compression)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert grpc_served.scheduler.statistics().submitted == 1
