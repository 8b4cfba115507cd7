"""What CPU control this machine allows to this process: facts, and an attempt.

The attempt is the set-up of a `CgroupScaler` itself (make a group, move a short-lived thread in and out,
write a quota, read it back, remove the group), so that the answer cannot differ from what happens when
serving.
"""

from __future__ import annotations

import math
import os
import platform
from typing import Any, Literal

import attrs

from sponge.errors import CgroupUnavailable, SpongeError
from sponge.live.cgroup.advice import surroundings
from sponge.live.cgroup.group import Ceiling
from sponge.live.cgroup.hierarchy import Location, locate
from sponge.live.cgroup.leftovers import find_leftovers


@attrs.frozen(kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str


@attrs.frozen(kw_only=True)
class Probe:
    """What was found, what sponge will use, and what would allow more."""

    uses: Literal["quota", "threads"]
    """What ``best_scaler("auto")`` gives here."""
    how: str
    """The scaler's own name for it, such as ``"cgroup v2 quota"``."""
    reason: str
    """Why no quota is allowed; empty if one is."""
    advice: str
    """The command or setting that would allow one; empty if one is allowed."""
    cgroup_version: Literal[1, 2] | None
    """Version of the hierarchy that has the CPU controller; ``None`` if it was not found."""
    group: str | None
    """Directory of the group in which this process is."""
    cpus: int
    """CPUs on which this process may run."""
    container_quota_cores: float
    """Smallest quota of the groups in which this process is [cores]; ``inf`` for none."""
    min_cores: float
    """Smallest share that a quota can give, with the default period [cores]."""
    burst: bool
    """Whether unused quota can be carried over (``cpu.max.burst``)."""
    kernel: str
    runs_in: str
    user_id: int
    leftovers: tuple[str, ...]
    """Groups of killed processes that were found; where a quota is allowed they are removed by now."""

    @property
    def quota_allowed(self) -> bool:
        """Whether a CPU quota can be set."""
        return self.uses == "quota"

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was looked at, one line each."""
        version = f"version {self.cgroup_version}, {self.group}" if self.cgroup_version else "not found"
        limited = not math.isinf(self.container_quota_cores)
        quota = f"{self.container_quota_cores:g} cores" if limited else "none"
        lines = [
            Check(what="Linux kernel", ok=True, found=self.kernel),
            Check(what="looks like", ok=True, found=f"{self.runs_in}, as user {self.user_id}"),
            Check(what="CPUs allowed", ok=True, found=str(self.cpus)),
            Check(what="CPU control group", ok=self.cgroup_version is not None, found=version),
            Check(
                what="quota of the container or group",
                ok=self.container_quota_cores >= self.cpus,
                found=quota,
            ),
            Check(what="quota for single threads", ok=self.quota_allowed, found=self._tried()),
        ]
        if self.quota_allowed:
            burst = "yes" if self.burst else "no (the kernel has it since 5.14)"
            lines.append(Check(what="unused quota carried over", ok=self.burst, found=burst))
        if self.leftovers:
            found = f"{', '.join(self.leftovers)} ({'removed' if self.quota_allowed else 'left in place'})"
            lines.append(Check(what="groups of killed processes", ok=self.quota_allowed, found=found))
        return tuple(lines)

    def _tried(self) -> str:
        if self.quota_allowed:
            return f"allowed, from {self.min_cores:g} cores; tried with a thread and read back"
        return f"not allowed: {self.reason}"

    def explain(self) -> str:
        """Return it in plain words: what was found, what will be used, and what would allow more."""
        width = max(len(check.what) for check in self.checks)
        lines = [f"{'ok' if check.ok else '--'}  {check.what:<{width}}  {check.found}" for check in self.checks]
        lines.append("")
        if self.quota_allowed:
            lines.append(
                f"sponge will limit the model's threads by {self.how}, in fractions of a core, while they run; "
                "other threads of the process are not touched."
            )
        else:
            lines.append(
                "sponge will limit the model by its number of threads alone: whole cores only, and the kernel does "
                "not enforce it."
            )
            if self.advice:
                lines.append(f"To allow a quota: {self.advice}.")
        if self.container_quota_cores < self.cpus:
            lines.append(
                f"The quota of {self.container_quota_cores:g} cores above this process is the most it can get: "
                f"do not plan with its {self.cpus} CPUs."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values (an unlimited quota is ``None``)."""
        found = attrs.asdict(self, value_serializer=lambda _, __, value: list(value) if type(value) is tuple else value)
        found["container_quota_cores"] = None if math.isinf(self.container_quota_cores) else self.container_quota_cores
        return found | {"quota_allowed": self.quota_allowed}


def probe(path: str | os.PathLike[str] | None = None) -> Probe:
    """Return what this machine allows; see `CgroupScaler.probe`."""
    from sponge.live.cgroup.scaler import CgroupScaler

    location, _ = locate()
    parent = os.fspath(path) if path is not None else location.directory if location else None
    leftovers = tuple(find_leftovers(parent)) if parent else ()
    try:
        with CgroupScaler(path=path) as scaler:
            how, burst, refusal = scaler.how, scaler.burst_us > 0, None
    except CgroupUnavailable as error:
        how, burst, refusal = "threads", False, error
    return Probe(
        uses="threads" if refusal else "quota",
        how=how,
        reason=refusal.reason if refusal else "",
        advice=refusal.advice if refusal else "",
        cgroup_version=location.version if location else None,
        group=location.directory if location else None,
        cpus=len(os.sched_getaffinity(0)),
        container_quota_cores=_quota_above(location),
        min_cores=0.1,
        burst=burst,
        kernel=platform.release(),
        runs_in=surroundings().value,
        user_id=os.geteuid(),
        leftovers=leftovers,
    )


def _quota_above(location: Location | None) -> float:
    """Return the smallest quota of the groups that hold this process [cores].

    What cannot be read counts as none.
    """
    if location is None:
        return math.inf
    try:
        if location.version == 1:
            from sponge.live.cgroup.v1 import V1Group

            ceiling = Ceiling(V1Group, location.directory)
        else:
            from sponge.live.cgroup.v2 import V2Group

            ceiling = Ceiling(V2Group, location.directory)
    except OSError:
        return math.inf
    try:
        return ceiling.cores()
    except SpongeError:
        return math.inf
    finally:
        ceiling.close()
