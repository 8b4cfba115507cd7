"""What a shell needs of a controller: ours, and those it is compared with."""

from __future__ import annotations

from typing import Protocol

from sponge.core.actions import Action
from sponge.core.events import Event


class ControllerProtocol(Protocol):
    """What a shell needs of a controller; baselines implement it too."""

    def handle(self, event: Event, *, now: float) -> list[Action]:
        """Take in what happened at *now* [s] and return what to do, in order."""

    def next_wakeup(self) -> float | None:
        """Return when a `Tick` is due if nothing happens before [s], or None."""

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing runs."""

    @property
    def max_lanes(self) -> int:
        """Batches that it may start side by side, on lanes 0 to ``max_lanes - 1``."""

    @property
    def max_batch_size(self) -> int:
        """Rows of a batch at most."""

    @property
    def max_queue(self) -> int:
        """Requests that may wait."""
