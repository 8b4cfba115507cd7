"""Events and actions in few words, for histories that are written down by hand."""

from __future__ import annotations

from sponge.core.actions import Action, StartBatch
from sponge.core.events import Arrived
from sponge.core.values import Batch, Request, intra_op_threads


def arrived(request_id: int, at: float, deadline: float, *, rows: int = 1, group: int = 0) -> Arrived:
    return Arrived(Request(request_id=request_id, arrived_at=at, deadline=deadline, rows=rows, group=group))


def start(batch_id: int, *request_ids: int, lane: int = 0, cores: float = 2.0, **fields: float) -> StartBatch:
    """Make a batch of single rows, unless *fields* say otherwise."""
    return StartBatch(
        Batch(
            batch_id=batch_id,
            request_ids=request_ids,
            rows=int(fields.get("rows", len(request_ids))),
            group=int(fields.get("group", 0)),
            lane=lane,
            cores=cores,
            threads=intra_op_threads(cores),
            expected_s=fields.get("expected_s", 0.0),
        )
    )


def started(actions: list[Action]) -> list[tuple[int, ...]]:
    return [action.batch.request_ids for action in actions if isinstance(action, StartBatch)]
