"""What becomes of a scheduler that nobody closes: garbage, the end of the interpreter, a fork.

Rules, and why they hold:

* A scheduler that nobody refers to any more serves what it has accepted, and then ends: its clients hold futures. The
  garbage collector runs on whatever thread it likes, at any instant, so it only starts a thread that waits for that.
* At the end of the interpreter what waits is told at once, and what runs is given a few seconds and then broken off: a
  thread that comes back from a run into an interpreter that is gone aborts the process, with another exit code.
* A forked child has none of the threads, and nothing of the parent's is its own. Whatever waits in the copy is failed,
  so that nobody waits for ever, but silently: callbacks belong to the parent, and one that answered a client over a
  socket that both processes hold would answer twice.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import warnings
import weakref

from sponge.live.service import Service

_log = logging.getLogger("sponge")

EXIT_TIMEOUT_S = 5.0
"""Time for the running batches of all schedulers at the end of the interpreter, before they are broken off [s]."""

_open: weakref.WeakSet[Service] = weakref.WeakSet()


def look_after(scheduler: object, service: Service) -> None:
    """End *service* when *scheduler* is garbage, at the interpreter's end, and as far as need be after a fork."""
    _open.add(service)
    weakref.finalize(scheduler, _abandon, service).atexit = False


def _abandon(service: Service) -> None:
    """End a service whose scheduler was garbage collected; returns at once."""
    if service.ended:
        return
    closing = service.closing
    try:
        threading.Thread(target=service.close, args=(True, None), name=f"{service.name}-end", daemon=True).start()
    except RuntimeError:  # the interpreter is about to end: then `_close_all` does it, or has done it
        pass
    if not closing:  # the last, since a filter may make an error of it
        warnings.warn(
            f"the scheduler {service.name!r} was not closed: it serves what it has accepted, and ends. "
            "Call close(), or use it in a with statement",
            ResourceWarning,
            stacklevel=2,
        )


@atexit.register
def _close_all() -> None:
    services = [service for service in list(_open) if not service.ended]
    for service in services:  # all who wait are told before any batch is waited for
        service.turn_away()
    late = _close_by(services, time.monotonic() + EXIT_TIMEOUT_S)
    for service in late:
        _log.warning("the scheduler %r still runs a batch at the exit: it is broken off", service.name)
        service.break_off()
    _close_by(late, time.monotonic() + EXIT_TIMEOUT_S)


def _close_by(services: list[Service], until: float) -> list[Service]:
    """Close these; return those whose batches still run at that instant."""
    return [service for service in services if not service.close(False, max(0.0, until - time.monotonic()))]


def _leave_to_parent() -> None:
    for service in list(_open):
        service.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
