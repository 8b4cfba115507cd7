"""cgroup v1: ``cpu.cfs_quota_us`` of a group of the CPU hierarchy, through cgroupspy's nodes and controllers.

A thread moves on its own here (file ``tasks``), wherever the rest of its process is, so a group may be made
anywhere in the hierarchy. A child's quota may not exceed its parent's: the kernel answers ``EINVAL``, so
callers stay below `QuotaGroup.ceiling_cores`.
"""

from __future__ import annotations

import os

from cgroupspy.controllers import CpuController
from cgroupspy.nodes import Node

from sponge.live.cgroup.group import QuotaGroup, QuotaStatistics


class V1Group(QuotaGroup):
    """A child group of the version 1 CPU hierarchy."""

    how = "cgroup v1 quota"
    quota_file = "cpu.cfs_quota_us"
    threads_file = "tasks"
    burst_file = "cpu.cfs_burst_us"
    limit_files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")

    def _make(self) -> None:
        # A node without a parent is taken for the root of all hierarchies, so the type of controller is not
        # guessed from directory names (which are "cpu,cpuacct" on many machines): the controller is attached
        # by hand.
        self._controller = CpuController(Node(self.parent).create_cgroup(self.name))

    def _set_period(self) -> None:
        self._controller.cfs_quota_us = None
        self._controller.cfs_period_us = self.period_us
        self._written = self._line(None)

    def _open_more(self) -> None:
        self._period = self._open(os.path.join(self.directory, "cpu.cfs_period_us"), os.O_RDWR)
        self._period_line = b"%d" % self.period_us
        self._period_is_ours = True

    def _write(self, line: bytes) -> None:
        if not self._period_is_ours:
            # Without a quota every period is allowed, whatever the groups above have.
            self._quota.write(self._line(None))
            self._period.write(self._period_line)
            self._period_is_ours = True
        super()._write(line)

    def check(self) -> None:
        """Raise `CpuControlError` if another quota, or another period, than ours is in force."""
        super().check()
        found = self._period.read()
        if found != self._period_line:
            self._period_is_ours = False
            raise self._foreign(self._period, self._period_line, found)

    def cores(self) -> float:
        """Return the quota in force [cores], read now; ``inf`` for none."""
        return self.limit_cores([self._quota.read(), self._period.read()])

    def _line(self, quota_us: int | None) -> bytes:
        return b"%d" % (-1 if quota_us is None else quota_us)

    @staticmethod
    def limit_cores(texts: list[bytes]) -> float:
        """Return quota / period [cores]; ``inf`` for a quota of -1."""
        quota_us, period_us = (int(text) for text in texts)
        return float("inf") if quota_us < 0 else quota_us / period_us

    def statistics(self) -> QuotaStatistics:
        """Return the kernel's counts (``cpu.stat``; it gives the time in ns)."""
        counts = self._controller.stat
        return QuotaStatistics(
            nr_periods=counts["nr_periods"],
            nr_throttled=counts["nr_throttled"],
            throttled_s=counts["throttled_time"] / 1e9,
        )
