"""Frozen values that travel between the core and its shells.

They are validated once, where they are made; the code that receives them does not check again. The values that are
made for every request skip validation: the shell has checked the numbers before.
"""

from __future__ import annotations

import enum
import math

import attrs

ONE_THREAD_BELOW_CORES = 1.5
"""Below this many cores one intra-op thread is faster than two: a second thread under a quota that cannot feed it
makes the caller wait for a throttled worker (measured; see docs/design.md)."""


def intra_op_threads(cores: float) -> int:
    """Return the intra-op thread count that serves a CPU share best.

    Parameters
    ----------
    cores
        CPU share of one lane [cores], > 0.

    Returns
    -------
    int
        1 below 1.5 cores, else ``ceil(cores)``: more threads than the quota feeds are slower than fewer.
    """
    return 1 if cores < ONE_THREAD_BELOW_CORES else math.ceil(cores - 1e-9)


@attrs.frozen(kw_only=True, slots=True)
class Request:
    """One request as the core sees it: what it is about, not what it contains."""

    request_id: int
    """Sequence number given by the shell; breaks ties between equal deadlines."""
    arrived_at: float
    """Instant of arrival [s on the shell's monotonic clock]."""
    deadline: float
    """Instant by which the answer is due [s, same clock]; ``inf`` for none."""
    rows: int = 1
    """Rows along the batch axis; a request is never split."""
    group: int = 0
    """Requests share a batch only within a group (same shapes and dtypes)."""


@attrs.frozen(kw_only=True, slots=True)
class Batch:
    """Requests that run together on one lane."""

    batch_id: int
    request_ids: tuple[int, ...]
    rows: int
    """Batch size of the run: total rows of the requests."""
    group: int
    lane: int
    cores: float
    """CPU share that was planned for this lane [cores]."""
    threads: int
    """Intra-op threads of the run."""
    expected_s: float
    """Typical service time predicted [s], including drift correction."""


@attrs.frozen(kw_only=True, slots=True)
class Plan:
    """What the optimiser chose for a queue of budgets.

    ``feasible=False`` means that no choice meets every deadline and the arrival rate: the other fields then hold the
    best effort, the choice that meets the most deadlines at the largest allocation.
    """

    cores: float
    """Total over all lanes [cores]."""
    batch_size: int
    lanes: int = 1
    feasible: bool

    @property
    def lane_cores(self) -> float:
        """Cores of one lane."""
        return self.cores / self.lanes


class RejectReason(enum.Enum):
    """Why the core turned a request away."""

    DEADLINE = "deadline"
    QUEUE_FULL = "queue_full"
    CLOSED = "closed"
