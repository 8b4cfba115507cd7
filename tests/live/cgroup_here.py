"""What the control-group tests share: is there a quota to test on this machine, and how to look at groups.

The tests run on the real kernel, on whichever cgroup version it has. Where none is allowed they cannot run; a warning
in pytest's summary then says why.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sponge.live.cgroup import CgroupScaler

PROBE = CgroupScaler.probe()
if not PROBE.quota_allowed:
    warnings.warn(f"no CPU quota to test here: {PROBE.reason}. {PROBE.advice}", stacklevel=1)

needs_quota = pytest.mark.skipif(not PROBE.quota_allowed, reason=f"no CPU quota here: {PROBE.reason}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or remount")

HOME = PROBE.group or ""
QUOTA_FILE = "cpu.max" if PROBE.cgroup_version == 2 else "cpu.cfs_quota_us"
THREADS_FILE = "cgroup.threads" if PROBE.cgroup_version == 2 else "tasks"


def quota_in_force(directory: str) -> int | None:
    """Return the quota of a group [µs], ``None`` for no limit."""
    with open(f"{directory}/{QUOTA_FILE}") as file:
        word = file.read().split()[0]
    return None if word in ("max", "-1") else int(word)


def read_if_there(path: str) -> str:
    """Return a file's text, empty if there is no such file."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def threads_in(directory: str) -> set[int]:
    """Return the native ids of the threads in a group."""
    with open(f"{directory}/{THREADS_FILE}") as file:
        return {int(line) for line in file}


def groups_of(pid: int) -> set[str]:
    """Return the groups that a process has made beside its own; others may come and go at any time."""
    return {name for name in os.listdir(HOME) if name.startswith(f"sponge-{pid}-")} if HOME else set()


def write_quota(directory: str, quota_us: int) -> None:
    """Set a group's quota behind a scaler's back."""
    with open(f"{directory}/{QUOTA_FILE}", "w") as file:
        file.write(f"{quota_us} 10000" if PROBE.cgroup_version == 2 else str(quota_us))


def remove_group(directory: str) -> str:
    """Remove a group as an administrator would: its threads first. Returns the directory."""
    for thread_id in threads_in(directory):
        with open(f"{HOME}/{THREADS_FILE}", "w") as file:
            file.write(str(thread_id))
    os.rmdir(directory)
    return directory


class Burner(threading.Thread):
    """A thread that computes without holding the interpreter lock, as a model does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end = False
        self.start()

    def run(self) -> None:
        block = bytes(1 << 16)
        while not self._end:
            hashlib.sha256(block)

    def cpu_s(self) -> float:
        """Return the CPU time that the thread has used so far [s]."""
        assert self.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self.ident))

    def stop(self) -> None:
        """End the thread."""
        self._end = True
        self.join()


@contextmanager
def burners(number: int) -> Iterator[list[Burner]]:
    """Run threads that compute, and end them."""
    threads = [Burner() for _ in range(number)]
    try:
        yield threads
    finally:
        for thread in threads:
            thread.stop()


def native_ids(threads: list[Burner]) -> list[int]:
    """Return the native ids of running threads."""
    return [one.native_id for one in threads if one.native_id is not None]


@contextmanager
def group_above(quota_us: int) -> Iterator[str]:
    """Make a group with a quota below that of this process, as a container's limit would be, and remove it."""
    directory = f"{HOME}/test-{os.getpid()}"
    os.mkdir(directory)
    switched = False
    try:
        if PROBE.cgroup_version == 2:
            with open(f"{directory}/cgroup.type", "w") as file:
                file.write("threaded")
            with open(f"{HOME}/cgroup.subtree_control", "r+") as file:
                switched = "cpu" not in file.read().split()
                file.write("+cpu")
        else:
            with open(f"{directory}/cpu.cfs_period_us", "w") as file:
                file.write("10000")
        write_quota(directory, quota_us)
        yield directory
    finally:
        os.rmdir(directory)
        if switched:
            with open(f"{HOME}/cgroup.subtree_control", "w") as file:
                file.write("-cpu")


def run_python(script: str, *, prefix: tuple[str, ...] = ()) -> str:
    """Run a script in another process and return what it printed; its failure is ours."""
    done = subprocess.run(
        [*prefix, sys.executable, "-X", "faulthandler", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2_000:]}\n{done.stderr}"
    return done.stdout.strip()
