"""A control group around a contender's processes: what CPU they took, how much they may take, and their end.

Needs the ``cpu`` and ``cpuacct`` controllers of cgroup v1, or v2 with ``cpu``, and the right to make groups there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

V1_CPU, V1_ACCOUNT, V2 = (Path("/sys/fs/cgroup") / name for name in ("cpu", "cpuacct", ""))
PERIOD_US = 10_000
KILL_PATIENCE_S = 10.0
PREFIX = "race"


class Group:
    """One group, made empty; `close` kills what is left in it.

    Raises
    ------
    OSError
        If it cannot be made.
    """

    def __init__(self, contender: str, *, owner: int | None = None) -> None:
        name = f"{PREFIX}-{owner or os.getpid()}-{contender}"
        self._v2 = (V2 / "cgroup.controllers").exists()
        roots = {V2} if self._v2 else {V1_CPU.resolve(), V1_ACCOUNT.resolve()}
        self._folders = [root / name for root in roots]
        if self._v2:
            (V2 / "cgroup.subtree_control").write_text("+cpu")
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
        self._cpu = (V2 if self._v2 else V1_CPU.resolve()) / name
        self._account = (V2 if self._v2 else V1_ACCOUNT.resolve()) / name

    def enter(self) -> None:
        """Put the calling process in; for ``preexec_fn``."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def cpu_s(self) -> float:
        """CPU time of all that ever ran in it [s]."""
        if self._v2:
            return int((self._account / "cpu.stat").read_text().split()[1]) / 1e6
        return int((self._account / "cpuacct.usage").read_text()) / 1e9

    def limit(self, cores: float | None) -> None:
        """Allow so many cores; None: all."""
        quota = "max" if cores is None else str(round(cores * PERIOD_US))
        if self._v2:
            (self._cpu / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        else:
            (self._cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._cpu / "cpu.cfs_quota_us").write_text("-1" if cores is None else quota)

    def close(self) -> None:
        """Kill all that is in it, groups below included, and remove it."""
        with contextlib.suppress(OSError):
            self.limit(None)
        end = time.monotonic() + KILL_PATIENCE_S
        while (alive := self._processes()) and time.monotonic() < end:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        for folder in self._folders:
            for below in [*sorted(folder.rglob("*/"), reverse=True), folder]:
                with contextlib.suppress(OSError):
                    below.rmdir()

    def _processes(self) -> set[int]:
        found = set()
        for folder in self._folders:
            for listed in folder.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    found.update(map(int, listed.read_text().split()))
        return found


def sweep() -> None:
    """End what a race left behind that was killed itself: the groups of processes that are no more."""
    for folder in (V2 if (V2 / "cgroup.controllers").exists() else V1_ACCOUNT.resolve()).glob(f"{PREFIX}-*-*"):
        _, owner, contender = folder.name.split("-", 2)
        if owner.isdigit() and not Path("/proc", owner).exists():
            Group(contender, owner=int(owner)).close()
