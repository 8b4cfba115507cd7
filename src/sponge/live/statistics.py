"""What a scheduler has done: a snapshot for people and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class Statistics:
    """What a scheduler has done so far: a snapshot of counts since it was started.

    Every submitted request is in exactly one of *met*, *late*, *failed*, *rejected* (by reason), *cancelled*,
    *waiting* and *running*, up to those that change hands during the snapshot.
    """

    submitted: int
    met: int
    """Answered by their deadline."""
    late: int
    """Answered after their deadline."""
    failed: int
    """Ended by an error of the model."""
    rejected: Mapping[str, int]
    """Turned away, by reason (`sponge.core.values.RejectReason`)."""
    cancelled: int
    waiting: int
    running: int
    batches: int
    mean_batch_size: float
    cores: float
    """Allocation now in force [cores]."""
    allocated_core_s: float
    """Integral of the allocation over time [core-seconds]."""
    resizes: int
    """Changes of the allocation."""
    cpu_s: float
    """CPU time used by the lanes and the sessions' workers [s]."""
    cpu_control: str
    """By what the allocation is enforced."""
    cpu_control_errors: int
    """Attempts to put the allocation in force, or to find it in force, that failed."""
    cpu_control_fault: str = ""
    """Why the allocation asked for is not in force now, as far as known; empty if it is. *cores* is what is left."""
    failure: str | None = None
    """What the controller raised, if it did; nothing is served since."""

    @property
    def slo_attainment(self) -> float:
        """Share of the ended requests that were answered by their deadline; 1 before the first ended."""
        ended = self.met + self.late + self.failed + sum(self.rejected.values())
        return self.met / ended if ended else 1.0
