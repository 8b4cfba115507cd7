"""Watching a scheduler: who looks on, and what they are told.

Rules, and why they hold:

* Nobody watches by default, and then watching costs a scheduler the reading of an empty tuple, a few times a request.
* A served batch is told once, by its lane, after its clients have their answers: they never wait for an observer. The
  lane does, so what takes long belongs on a thread of the observer's own.
* An observer cannot break what it observes: when one raises, that is logged and it is told nothing more.
* Each request that is submitted is told once as submitted, and once as answered by a run or as having left.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import attrs

from sponge.core.values import Batch, RejectReason, Request

_log = logging.getLogger("sponge")


@attrs.define(kw_only=True, eq=False)
class ModelRun:
    """One run of the model; instants are on the scheduler's clock [s].

    Not to be changed, and not frozen only because that would double the time of making one, on the lane's thread.
    """

    requests: tuple[Request, ...]
    rows: int
    started_at: float
    """When the inputs began to be joined."""
    finished_at: float
    """When the outputs were there; deadlines are judged by it."""
    answered: bool
    """Whether the requests ended with this run; False if it is repeated in smaller parts, to find who is at fault."""
    error: BaseException | None = None
    """What the model raised, or None."""


@attrs.define(kw_only=True, eq=False)
class ServedBatch:
    """What a lane made of a batch: one run, or several where the model raised. Not to be changed, like its runs."""

    batch: Batch
    """As it was planned; requests that were cancelled in the meantime are in no run."""
    started_at: float
    """When the lane took it [s]."""
    runs: tuple[ModelRun, ...]

    @property
    def as_planned(self) -> bool:
        """Whether the whole batch was answered by one run, so that its duration compares with the prediction."""
        return len(self.runs) == 1 and self.runs[0].error is None and self.runs[0].rows == self.batch.rows


class Observer:
    """Watches a scheduler; override what is of interest. The methods may be called by several threads at a time.

    They must be quick and must not wait for the scheduler.
    """

    def submitted(self, request: Request) -> None:
        """Take note of a request, on its client's thread and before anything is done with it."""

    def left(self, request: Request, reason: RejectReason | None, now: float) -> None:
        """Take note of a request that will not run: why it was turned away, or None if its client gave it up."""

    def served(self, served: ServedBatch) -> None:
        """Take note of a batch, on its lane's thread and after its requests were answered."""

    def resized(self, cores: float, now: float) -> None:
        """Take note of another allocation that is in force [cores]; told once when watching begins, too."""


class Observers:
    """Those who watch one scheduler."""

    def __init__(self) -> None:
        self.watching: tuple[Observer, ...] = ()
        """Replaced, never changed: it is read without a lock, and while it is empty nothing need be told."""
        self._lock = threading.Lock()

    def add(self, observer: Observer) -> None:
        """Tell *observer* from now on."""
        with self._lock:
            self.watching = (*self.watching, observer)

    def remove(self, observer: Observer) -> None:
        """Tell *observer* no more; one that is not told anyway is passed over."""
        with self._lock:
            self.watching = tuple(other for other in self.watching if other is not observer)

    def submitted(self, request: Request) -> None:
        """Tell all of them; see `Observer`."""
        self.tell(lambda observer: observer.submitted(request))

    def left(self, request: Request, reason: RejectReason | None, now: float) -> None:
        """Tell all of them; see `Observer`."""
        self.tell(lambda observer: observer.left(request, reason, now))

    def served(self, served: ServedBatch) -> None:
        """Tell all of them; see `Observer`."""
        self.tell(lambda observer: observer.served(served))

    def resized(self, cores: float, now: float) -> None:
        """Tell all of them; see `Observer`."""
        self.tell(lambda observer: observer.resized(cores, now))

    def tell(self, what: Callable[[Observer], None]) -> None:
        """Call *what* with each observer, and drop those that raise."""
        for observer in self.watching:
            try:
                what(observer)
            except Exception:
                _log.exception("the observer %r failed and is told nothing any more", observer)
                self.remove(observer)
