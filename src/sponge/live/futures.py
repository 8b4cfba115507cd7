"""The futures that clients hold, and how they are settled.

Rules, and why they hold:

* A future is settled once, by whoever took the request's entry; a client that has settled it by itself is left alone.
* No thread of the scheduler waits for a lock that a client may hold for ever. ``Future`` guards itself with a
  ``threading.Condition``, and a client that is interrupted by a signal while it enters or leaves one may leave it
  locked. Such a future is settled by a thread of its own, whenever its client lets go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from sponge.errors import SpongeError

_log = logging.getLogger("sponge")

_HELD_S = 0.1
"""How long a future's lock is waited for; its holders need it for microseconds."""

Outputs = list[np.ndarray[Any, Any]]


class RequestFuture(Future[Outputs]):
    """A future whose cancellation takes the request out of the queue."""

    gave_up = False
    """Whether it was cancelled; asked without a lock."""

    def __init__(self, cancelled: Callable[[], object]) -> None:
        super().__init__()
        self._cancelled = cancelled

    def cancel(self) -> bool:
        """Cancel the request unless it runs already or is done; return whether it is cancelled."""
        already = self.cancelled()
        cancelled = super().cancel()
        if cancelled and not already:
            self.gave_up = True
            self._cancelled()
        return cancelled

    def fail_after_fork(self, error: SpongeError) -> None:
        """In a forked child: end it with an error, unless it is done, and call nobody back."""
        # Whoever held the lock at the fork, or waited for it, is not here.
        self._condition = threading.Condition()
        self._done_callbacks: list[Any] = []
        if not self.done():
            self.set_exception(error)

    def is_stuck(self) -> bool:
        """Tell whether its lock cannot be had."""
        if self._condition.acquire(timeout=_HELD_S):
            self._condition.release()
            return False
        return True


def claim(future: RequestFuture) -> bool:
    """Mark as running; return whether the request is still to be run: not cancelled, nor settled by its client."""
    if future.is_stuck():
        return not future.gave_up
    if future.cancelled():
        future.gave_up = True  # its client may have been interrupted before it said so
    elif future.done():
        return False
    try:
        return future.set_running_or_notify_cancel()
    except (InvalidStateError, RuntimeError):  # the client was faster, just now
        return False


def settle(future: RequestFuture, outcome: Outputs | Exception | None) -> None:
    """Give a future its outcome, None for a cancelled one; called once, by whoever took the request's entry."""
    if future.is_stuck():
        threading.Thread(target=_settle, args=(future, outcome), name="sponge-settle", daemon=True).start()
    else:
        _settle(future, outcome)


def _settle(future: RequestFuture, outcome: Outputs | Exception | None) -> None:
    try:
        if outcome is None or future.cancelled():
            future.set_running_or_notify_cancel()  # or those who wait for it by `concurrent.futures.wait` never hear
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except (InvalidStateError, RuntimeError):
        if outcome is not None and future.cancelled():  # between the question and the answer
            _settle(future, None)
    except BaseException:  # a callback that raises SystemExit, say, must not end a lane, nor cost others theirs
        _log.exception("a callback of a future failed")
