"""CPU quota in place through Linux control groups, version 1 and 2.

See `CgroupScaler` and docs/cpu-control.md.
"""

from sponge.live.cgroup.group import QuotaStatistics
from sponge.live.cgroup.probe import Check, Probe
from sponge.live.cgroup.scaler import CgroupScaler

__all__ = ["CgroupScaler", "Check", "Probe", "QuotaStatistics"]
