"""cgroup v2: ``cpu.max`` of a threaded group below the group of the process.

The classes have the form of cgroupspy's, which knows version 1 only: a file of a group is a descriptor on a
controller class, which reads and writes it through ``get_property``/``set_property``.

Rules of the kernel that shape the set-up (cgroup-v2.rst, "Threads"):

- A thread can be moved alone only between groups of one *threaded domain*. So our group lies directly below
  the group in which the process already is, and is made ``threaded``; that one then becomes the domain's root
  by itself, and turns back into an ordinary group when the last threaded child is gone.
- The CPU controller must be switched on for the children of that group (``+cpu`` in its
  ``cgroup.subtree_control``). A group that has processes may not do that for controllers such as memory, but
  may for cpu as long as it can be the root of a threaded domain: none of its children is an ordinary group
  with processes, and no controller that cannot handle threads (memory, io, …) is switched on for its
  children. The root of the whole tree is exempt from both.
- The switch is turned back by the last of us to leave, and only if no other child group is left that may rely
  on it. Groups further up are not ours to change: without ``cpu`` in ``cgroup.controllers`` there is no
  quota, and the probe says who can grant it.
"""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar, overload

from sponge.live.cgroup.group import QuotaGroup, QuotaStatistics, child_groups, is_ours

T = TypeVar("T")


class FileInterface(Generic[T]):
    """A file of a control group as a descriptor, like cgroupspy's ``BaseFileInterface``."""

    def __init__(self, filename: str, *, readonly: bool = False) -> None:
        self.filename = filename
        self.readonly = readonly

    @overload
    def __get__(self, instance: None, owner: type[CpuControllerV2]) -> FileInterface[T]: ...
    @overload
    def __get__(self, instance: CpuControllerV2, owner: type[CpuControllerV2]) -> T: ...

    def __get__(self, instance: CpuControllerV2 | None, owner: type[CpuControllerV2]) -> T | FileInterface[T]:
        if instance is None:
            return self
        return self.sanitize_get(instance.get_property(self.filename))

    def __set__(self, instance: CpuControllerV2, value: T) -> None:
        if self.readonly:
            raise AttributeError(f"{self.filename} can only be read")
        instance.set_property(self.filename, self.sanitize_set(value))

    def sanitize_get(self, value: str) -> T:
        """Return the file's text as a value."""
        raise NotImplementedError

    def sanitize_set(self, value: T) -> str:
        """Return the text to write for a value."""
        return str(value)


class TextFile(FileInterface[str]):
    """One word, such as ``cgroup.type``."""

    def sanitize_get(self, value: str) -> str:
        """Return the text as it is."""
        return value


class IntegerFile(FileInterface[int]):
    """One integer."""

    def sanitize_get(self, value: str) -> int:
        """Return the integer."""
        return int(value)


class WordSetFile(FileInterface[frozenset[str]]):
    """Blank-separated words, such as ``cgroup.controllers``."""

    def sanitize_get(self, value: str) -> frozenset[str]:
        """Return the words."""
        return frozenset(value.split())

    def sanitize_set(self, value: frozenset[str]) -> str:
        """Return the words in one line (for ``cgroup.subtree_control`` each begins with ``+`` or ``-``)."""
        return " ".join(sorted(value))


class DictFile(FileInterface[dict[str, int]]):
    """Lines ``key integer``, such as ``cpu.stat``."""

    def sanitize_get(self, value: str) -> dict[str, int]:
        """Return the numbers by key."""
        return {key: int(number) for key, number in (line.split() for line in value.splitlines())}


class CpuMaxFile(FileInterface["tuple[int | None, int]"]):
    """``cpu.max``: ``(quota_us, period_us)``, the quota ``None`` where the file says ``max``."""

    def sanitize_get(self, value: str) -> tuple[int | None, int]:
        """Return quota and period [µs]."""
        quota, period = value.split()
        return (None if quota == "max" else int(quota)), int(period)

    def sanitize_set(self, value: tuple[int | None, int]) -> str:
        """Return the line ``"<quota> <period>"``."""
        quota_us, period_us = value
        return f"{'max' if quota_us is None else quota_us} {period_us}"


class CpuControllerV2:
    """The files of a version 2 group that concern CPU time and threads."""

    group_type = TextFile("cgroup.type")
    controllers = WordSetFile("cgroup.controllers", readonly=True)
    subtree_control = WordSetFile("cgroup.subtree_control")
    cpu_max = CpuMaxFile("cpu.max")
    cpu_max_burst = IntegerFile("cpu.max.burst")
    stat = DictFile("cpu.stat", readonly=True)

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def get_property(self, filename: str) -> str:
        """Return the text of a file of the group, stripped."""
        with open(os.path.join(self.directory, filename)) as file:
            return file.read().strip()

    def set_property(self, filename: str, value: Any) -> None:
        """Write a file of the group."""
        with open(os.path.join(self.directory, filename), "w") as file:
            file.write(str(value))


class V2Group(QuotaGroup):
    """A threaded child group of the version 2 hierarchy."""

    how = "cgroup v2 quota"
    quota_file = "cpu.max"
    threads_file = "cgroup.threads"
    burst_file = "cpu.max.burst"
    limit_files = ("cpu.max",)

    def _make(self) -> None:
        parent = CpuControllerV2(self.parent)
        others = child_groups(self.parent)
        enabled = "cpu" in parent.subtree_control
        # Switched on by one of us who left (or was killed) without being the last: whoever is last turns it
        # back.
        self.switches_back = not enabled or (bool(others) and all(is_ours(name) for name in others))
        os.mkdir(self.directory)
        self._controller = CpuControllerV2(self.directory)
        # First the type: made an ordinary group with the controller on, it could no longer take single
        # threads.
        self._controller.group_type = "threaded"
        if not enabled:
            parent.subtree_control = frozenset({"+cpu"})

    def _set_period(self) -> None:
        self._controller.cpu_max = (None, self.period_us)
        self._written = self._line(None)

    def _restore_parent(self) -> None:
        parent = CpuControllerV2(self.parent)
        if self.switches_back and "cpu" in parent.subtree_control and not child_groups(self.parent):
            parent.subtree_control = frozenset({"-cpu"})

    def _line(self, quota_us: int | None) -> bytes:
        return CpuMaxFile("").sanitize_set((quota_us, self.period_us)).encode()

    def cores(self) -> float:
        """Return the quota in force [cores], read now; ``inf`` for none."""
        return self.limit_cores([self._quota.read()])

    @staticmethod
    def limit_cores(texts: list[bytes]) -> float:
        """Return quota / period [cores]; ``inf`` for ``max``."""
        quota_us, period_us = CpuMaxFile("").sanitize_get(texts[0].decode())
        return float("inf") if quota_us is None else quota_us / period_us

    def statistics(self) -> QuotaStatistics:
        """Return the kernel's counts (``cpu.stat``; it gives the time in µs)."""
        counts = self._controller.stat
        return QuotaStatistics(
            nr_periods=counts["nr_periods"],
            nr_throttled=counts["nr_throttled"],
            throttled_s=counts["throttled_usec"] / 1e6,
        )
