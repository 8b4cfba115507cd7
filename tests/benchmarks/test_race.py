"""The race's own parts: its client must send open loop, read every form of answer, and judge by the schedule."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


@pytest.fixture
def part(monkeypatch):
    """Imports one of the race's modules, as its programs do; other benchmarks have modules of the same names."""
    ours = {path.stem for path in PEERS.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in ours & set(sys.modules)}
    monkeypatch.syspath_prepend(str(PEERS))
    monkeypatch.setenv("RACE_CONTENDER", json.dumps({"protocol": "kserve", "port": 1, "model": "m.onnx", "shape": [2]}))
    yield importlib.import_module
    for name in ours & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


class FewPictures:
    bodies = (b"first", b"second")
    poison = b"poison"


def test_next_request_is_sent_before_the_last_is_answered(part):
    """Open loop: a client that waited for answers would ask less of a slow service, and never see it fail."""
    replay = part("replay")
    asked = []

    async def run():
        all_sent = asyncio.Event()

        async def send(body, left_s):
            asked.append((body, left_s))
            if len(asked) == 3:
                all_sent.set()
            await all_sent.wait()
            return replay.OK, b""

        command = {"at_s": [0, 0, 0.001], "budget_s": [1, 2, 3], "poison": [2], "patience_s": 30}
        return await replay.replay(send, FewPictures, command)

    reply = asyncio.run(run())
    assert [ended for _, ended, _ in reply["requests"]] == ["ok"] * 3
    assert [body for body, _ in asked] == [b"first", b"second", b"poison"]
    assert all(left_s <= budget_s for (_, left_s), budget_s in zip(asked, (1, 2, 3), strict=True))


def test_service_that_never_answers_is_given_up(part):
    """A run is bounded in time, and who was not answered is counted."""
    replay = part("replay")

    async def send(body, left_s):
        await asyncio.Event().wait()

    command = {"at_s": [0], "budget_s": [0.01], "patience_s": 0.02}
    reply = asyncio.run(replay.replay(send, FewPictures, command))
    assert [ended for _, ended, _ in reply["requests"]] == ["none"]


ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nserver: x\r\n\r\nhello", 200, b"hello"),
    "empty": (b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n", 504, b""),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n",
        200,
        b"hello",
    ),
}


@pytest.mark.parametrize("form", ANSWERS)
def test_answer_is_read_however_it_is_cut(part, form):
    """A socket may end a read anywhere, in the middle of the head too."""
    parse = part("over_http")._parse
    raw, status, body = ANSWERS[form]
    assert all(parse(bytearray(raw[:cut])) is None for cut in range(len(raw)))
    assert parse(bytearray(raw))[::2] == (status, body)


def test_judged_by_the_schedule_and_each_own_deadline(part):
    """An answer after its deadline is worth nothing, an early refusal is not too late, and silence is."""
    figures = part("figures")
    reply = {
        "requests": [(0.0, "ok", 0.1), (0.05, "ok", 0.3), (0.0, "rejected", 0.01), (0.0, "none", 5.0)],
        "took_s": 2.0,
        "cpu_s": 0.5,
        "client_cpu_s": 0.1,
    }
    run = figures.judge(reply, [0.2, 0.2, 0.2, 0.2])
    assert (run["met_pct"], run["told_in_time_pct"], run["too_late_pct"]) == (25, 25, 50)
    assert run["met_per_core_s"] == 2
    assert run["cpu_cores"] == 0.25
    assert run["response_ms_p50"] == pytest.approx(200)


def test_requests_repeat_and_can_be_served(part):
    """Every contender gets the same requests, and none that the network has spent already."""
    workload = part("workload")
    first, again = (workload.requests(50.0, 4.0, seed=3) for _ in range(2))
    other = workload.requests(50.0, 4.0, seed=4)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert len(first[0]) != len(other[0]) or not np.array_equal(first[0], other[0])
    at_s, budget_s = first
    assert np.all(np.diff(at_s) >= 0)
    assert at_s[0] >= 0
    assert at_s[-1] < 4
    assert budget_s.min() >= workload.LEAST_BUDGET_S
