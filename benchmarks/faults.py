"""Faults for the soak: what clients, neighbours, the kernel and people do to a service that goes on.

Each is a function ``(target, length_s)`` that does it, for so long, and returns whether it could be done here. What is
done to requests is done to those of the load, by the flags of `Target`; who is hit is told there, so that everything
else can be held to its answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import attrs
import numpy as np
from load_models import TURNS, Inputs, work_inputs
from openloop import Neighbour

from sponge.live.cgroup import CgroupScaler
from sponge.live.scheduler import Scheduler

BROKEN_SHARE, MALFORMED_SHARE = 0.2, 0.2
BURST = 200
NEIGHBOUR_CORES = 0.5
SLOW = 2.0
STOPPED_S = 1.0
_CANCEL_AFTER_S = 0.03
_PAUSE = """
import os, signal, sys, time
pid, length_s = int(sys.argv[1]), float(sys.argv[2])
os.kill(pid, signal.SIGSTOP)
try:
    time.sleep(length_s)
finally:
    os.kill(pid, signal.SIGCONT)
"""


@attrs.define
class Target:
    """The service, and what is being done to its clients now."""

    scheduler: Scheduler
    scaler: Any
    extra: Callable[[Inputs], None]
    """Hands in a request besides the load."""
    broken: bool = False
    """A share of the requests makes the model raise, with whatever shares their batch."""
    malformed: bool = False
    cancelled: bool = False
    unread: bool = False
    """Clients drop their futures."""
    slow: bool = False
    """The model has more to do for every request."""
    in_flight: deque[Future[Any]] = attrs.field(factory=lambda: deque(maxlen=64))
    """Requests that may be cancelled."""

    def turns(self) -> int:
        """How much the model has to do for a request now."""
        return round(SLOW * TURNS) if self.slow else TURNS


def _while(name: str) -> Callable[[Target, float], bool]:
    def do(target: Target, length_s: float) -> bool:
        setattr(target, name, True)
        try:
            time.sleep(length_s)
        finally:
            setattr(target, name, False)
        return True

    return do


def cancels(target: Target, length_s: float) -> bool:
    """Clients give up some time after asking, while their request waits or runs."""
    rng = np.random.default_rng(0)
    target.cancelled = True
    end = time.monotonic() + length_s
    while time.monotonic() < end:
        time.sleep(_CANCEL_AFTER_S * rng.random())
        if target.in_flight:
            target.in_flight.popleft().cancel()
    target.cancelled = False
    target.in_flight.clear()
    return True


def burst(target: Target, length_s: float) -> bool:
    """Many more at once than can be served in time."""
    for k in range(BURST):
        target.extra(work_inputs(k, TURNS))
    time.sleep(length_s)
    return True


def neighbour(_: Target, length_s: float) -> bool:
    """Another process takes half of a core."""
    now = time.monotonic()
    other = Neighbour(NEIGHBOUR_CORES, now, now + length_s)
    time.sleep(length_s)
    other.end()
    return True


def hog(_: Target, length_s: float) -> bool:
    """A thread of this process computes in Python, without a pause."""

    def spin() -> None:
        end = time.monotonic() + length_s
        while time.monotonic() < end:
            pass

    thread = threading.Thread(target=spin, name="hog")
    thread.start()
    thread.join()
    return True


def stopped(_: Target, length_s: float) -> bool:
    """This process is stopped for a second, as by a debugger, a suspended laptop or a migrated machine."""
    subprocess.run([sys.executable, "-S", "-c", _PAUSE, str(os.getpid()), str(min(length_s, STOPPED_S))], check=True)
    return True


def quota_cut(target: Target, length_s: float) -> bool:
    """Somebody else sets our group's quota to a small part of a core."""
    return _write_quota(target, "1500", length_s)


def quota_lifted(target: Target, length_s: float) -> bool:
    """Somebody else lifts our group's quota."""
    return _write_quota(target, None, length_s)


def group_removed(target: Target, length_s: float) -> bool:
    """Somebody else moves our threads out of our group, and removes it."""
    if not isinstance(target.scaler, CgroupScaler):
        return False
    directory = target.scaler.directory
    v2 = os.path.exists(f"{directory}/cpu.max")
    threads = "cgroup.threads" if v2 else "tasks"
    try:
        with open(f"{directory}/{threads}") as file:
            ids = file.read().split()
        for thread_id in ids:
            with open(f"{os.path.dirname(directory)}/{threads}", "w") as file:
                file.write(thread_id)
        os.rmdir(directory)
    except OSError:  # a thread was brought back meanwhile, or has ended
        return False
    time.sleep(length_s)
    return True


def _write_quota(target: Target, quota_us: str | None, length_s: float) -> bool:
    if not isinstance(target.scaler, CgroupScaler):
        return False
    directory = target.scaler.directory
    try:
        if os.path.exists(f"{directory}/cpu.max"):
            with open(f"{directory}/cpu.max", "w") as file:
                file.write(quota_us or "max")
        else:
            with open(f"{directory}/cpu.cfs_quota_us", "w") as file:
                file.write(quota_us or "-1")
    except OSError:  # the group is not there just now
        return False
    time.sleep(length_s)
    return True


FAULTS: dict[str, Callable[[Target, float], bool]] = {
    "inputs that make the model raise": _while("broken"),
    "malformed inputs": _while("malformed"),
    "cancels": cancels,
    "clients that never read": _while("unread"),
    "a slower model": _while("slow"),
    "burst": burst,
    "neighbour": neighbour,
    "hog of the interpreter": hog,
    "stopped process": stopped,
    "quota cut": quota_cut,
    "quota lifted": quota_lifted,
    "group removed": group_removed,
}
"""By name, as the soak draws them."""


def malformed_inputs(kind: int) -> Inputs:
    """A request that must be refused at the door."""
    return _MALFORMED[kind % len(_MALFORMED)]


def _malformed() -> list[Inputs]:
    good = dict(work_inputs(0, 1))
    return [
        {**good, "image": good["image"][:, :, :7]},
        {**good, "image": good["image"].astype(np.float64)},
        {**good, "k": good["k"][:0]},
        {"image": good["image"], "turns": good["turns"]},
        {**good, "more": good["k"]},
        {name: np.repeat(value, 100, axis=0) for name, value in good.items()},
        {**good, "k": [0]},  # type: ignore[dict-item]
    ]


_MALFORMED = _malformed()
"""Wrong shape, dtype and number of rows; an input missing, and one too many; too many rows; no array. Made once: large
arrays that come and go would move the memory that is measured."""


_NOT_NUMBERS = np.full((1, 1, 32, 32), np.nan, dtype=np.float32)


def poisoned_inputs(k: int, turns: int) -> Inputs:
    """A request whose numbers are not numbers: it must be answered like any other, and spoil nobody's answer."""
    return work_inputs(k, turns, _NOT_NUMBERS)
