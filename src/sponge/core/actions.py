"""What to do: the only way out of a controller. The shell carries actions out in the order given."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from sponge.core.values import Batch, RejectReason


@attrs.frozen(slots=True)
class StartBatch:
    """Run this batch on its lane; answered by `BatchFinished`."""

    batch: Batch


@attrs.frozen(slots=True)
class SetCpu:
    """Allocate this many cores to all lanes together; answered by `CpuApplied`."""

    cores: float


@attrs.frozen(slots=True)
class Reject:
    """Tell the client now that the request will not be run."""

    request_id: int
    reason: RejectReason


Action: TypeAlias = StartBatch | SetCpu | Reject
