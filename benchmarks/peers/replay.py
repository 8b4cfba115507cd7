"""The open-loop client: sends when it is due, whatever the service does, and judges by its own clock.

Rules, and why they hold:

* A response is timed from the *scheduled* instant, so that a client or a socket that falls behind costs the service
  that made it so, and nobody is spared by asking later (co-ordinated omission).
* A request states the time that it has left when it really leaves: deadlines stay where they were.
* The client has a process of its own (`over_http`, `over_grpc`), or, for what is called in process, is this same loop.
* Commands come as lines of JSON on standard input, answers leave as lines on standard output.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

LEAD_S = 0.05
CHECK_PATIENCE_S = 20.0
OK, REJECTED, FAILED, NONE = "ok", "rejected", "failed", "none"
Send = Callable[[bytes, float], Awaitable[tuple[str, bytes]]]
"""Body and seconds left, to how it ended and the answer's bytes."""


class Pictures:
    """What is sent, taken in turn, and what must come back."""

    def __init__(self, stem: str) -> None:
        pictures = np.load(f"{stem}-pictures.npy")
        self.bodies = [picture.tobytes() for picture in pictures]
        poisonous = pictures[0].copy()
        poisonous.flat[0] = 255
        self.poison = poisonous.tobytes()
        self.answers = np.load(f"{stem}-answers.npy")

    def wrong(self, index: int, answer: bytes) -> str | None:
        """Say what is wrong with an answer; batches round differently, by a unit or two."""
        expected = self.answers[index]
        if len(answer) != expected.size:
            return f"{len(answer)} bytes where {expected.size} were due"
        got = np.frombuffer(answer, np.uint8).reshape(expected.shape)
        far = int(np.abs(got.astype(int) - expected).max())
        return f"off by {far}" if far > 3 else None


async def _one(send: Send, body: bytes, due: float, deadline: float, patience_s: float) -> tuple[float, str, float]:
    sent = time.monotonic()
    try:
        ended, _ = await asyncio.wait_for(send(body, deadline - sent), patience_s)
    except (TimeoutError, asyncio.TimeoutError, OSError):
        ended = NONE
    return sent - due, ended, time.monotonic() - due


async def replay(send: Send, pictures: Pictures, command: dict[str, Any]) -> dict[str, Any]:
    """Send each request at its instant; return lag, ending and response of each, and what the client itself took.

    Parameters
    ----------
    send
        Of the contender.
    pictures
        Sent in turn.
    command
        ``at_s`` and ``budget_s`` of each request, ``poison`` (indices), ``patience_s``.
    """
    poison = set(command.get("poison", ()))
    gc.collect()
    gc.disable()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    zero = time.monotonic() + LEAD_S
    tasks = []
    for index, (at_s, budget_s) in enumerate(zip(command["at_s"], command["budget_s"], strict=True)):
        due = zero + at_s
        while (early := due - time.monotonic()) > 0:
            await asyncio.sleep(early)
        body = pictures.poison if index in poison else pictures.bodies[index % len(pictures.bodies)]
        tasks.append(asyncio.ensure_future(_one(send, body, due, due + budget_s, command["patience_s"])))
    ends = await asyncio.gather(*tasks)
    took_s = time.monotonic() - zero
    now = resource.getrusage(resource.RUSAGE_SELF)
    gc.enable()
    client_cpu_s = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    return {"requests": ends, "took_s": took_s, "client_cpu_s": client_cpu_s}


async def closed_loop(send: Send, pictures: Pictures, command: dict[str, Any]) -> dict[str, Any]:
    """Keep so many requests in flight for a while, without deadlines; count the answers."""
    end = time.monotonic() + command["duration_s"]
    counts = {OK: 0, REJECTED: 0, FAILED: 0, NONE: 0}

    async def keep_asking(offset: int) -> None:
        index = offset
        while time.monotonic() < end:
            _, ended, _ = await _one(send, pictures.bodies[index % len(pictures.bodies)], end, end + 60, 30)
            counts[ended] += 1
            index += 1

    started = time.monotonic()
    await asyncio.gather(*(keep_asking(offset) for offset in range(command["in_flight"])))
    return {"counts": counts, "took_s": time.monotonic() - started}


async def check(send: Send, pictures: Pictures, command: dict[str, Any]) -> dict[str, Any]:
    """Ask for every picture, one by one and all at once; compare what is answered."""
    wrong, unanswered = [], []

    async def ask(index: int) -> None:
        try:
            ended, answer = await asyncio.wait_for(send(pictures.bodies[index], 30.0), CHECK_PATIENCE_S)
        except (asyncio.TimeoutError, OSError) as error:
            ended, answer = str(error) or type(error).__name__, b""
        if ended != OK:
            unanswered.append(f"picture {index}: {ended}")
        elif fault := pictures.wrong(index, answer):
            wrong.append(f"picture {index}: {fault}")

    for index in range(len(pictures.bodies)):
        await ask(index)
    await asyncio.gather(*(ask(index) for index in range(len(pictures.bodies))))
    return {"wrong": wrong, "unanswered": unanswered}


async def obey(send: Send, stem: str) -> None:
    """Answer commands until standard input ends."""
    pictures = Pictures(stem)
    operations = {"replay": replay, "closed_loop": closed_loop, "check": check}
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        print(json.dumps(await operations[command["do"]](send, pictures, command)), flush=True)


def stem_of(model: str) -> str:
    """Return where a model's pictures lie."""
    return str(Path(model).with_suffix(""))
