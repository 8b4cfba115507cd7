"""What a scaler has taken and must give back: its group, and threads with the groups they came from.

It lives apart from the scaler so that it outlasts it: a finalizer gives back when the scaler is closed, dropped, or
left open until the interpreter ends.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading

import attrs

from sponge.errors import CpuControlError
from sponge.live.cgroup.group import MIN_QUOTA_US, QuotaGroup
from sponge.live.cgroup.hierarchy import Location, group_of_thread

_log = logging.getLogger("sponge.cgroup")


@attrs.define(eq=False)
class Holding:
    """A group of ours, and where its threads were found."""

    group: QuotaGroup
    location: Location | None
    home: str
    """Where threads go whose origin is not known: the group of the process."""
    origins: dict[int, str] = attrs.field(factory=dict)
    pid: int = attrs.field(factory=os.getpid)
    lock: threading.RLock = attrs.field(factory=threading.RLock)
    lost: bool = False
    """Whether the group is gone: removed by somebody else, or the way to it closed."""


def try_thread(holding: Holding) -> None:
    """Move a thread in and out, and write a quota: permissions alone do not tell whether the kernel agrees."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="sponge-cgroup-trial", daemon=True)
    thread.start()
    assert thread.native_id is not None
    try:
        bring_in(holding, thread.native_id)
        holding.group.write_quota(MIN_QUOTA_US)
        holding.group.write_quota(None)
        send_home(holding, thread.native_id)
    finally:
        done.set()
        thread.join()


def bring_in(holding: Holding, thread_id: int) -> None:
    """Move a thread in and remember where it was; one that has ended is passed over."""
    origin = group_of_thread(thread_id, holding.location) if holding.location else None
    try:
        holding.group.add_thread(thread_id)
    except ProcessLookupError:
        return
    holding.origins.setdefault(thread_id, origin or holding.home)


def send_home(holding: Holding, thread_id: int) -> None:
    """Move a thread back to where it was found; if that group is gone meanwhile, to that of the process."""
    origin = holding.origins.pop(thread_id, holding.home)
    try:
        holding.group.move_thread(thread_id, origin)
    except ProcessLookupError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV) or origin == holding.home:
            raise
        holding.group.move_thread(thread_id, holding.home)


def make_again(holding: Holding, name: str) -> None:
    """Make a group of another name in the place of one that is gone, and bring the threads in that were in that one.

    Raises
    ------
    OSError
        If that is not allowed (any more); nothing is left behind.
    """
    old = holding.group
    group = type(old)(old.parent, name, period_us=old.period_us)
    group.switches_back |= old.switches_back
    holding.group, holding.lost = group, False
    try:
        for thread_id in list(holding.origins):
            bring_in(holding, thread_id)
    except OSError:
        holding.group, holding.lost = old, True
        with contextlib.suppress(OSError):
            for thread_id in group.thread_ids():
                group.move_thread(thread_id, holding.home)
            group.remove()
        group.close_descriptors()
        raise
    # Version 2: with the controller switched off, only the files of the old one are gone.
    with contextlib.suppress(OSError):
        old.remove()
    old.close_descriptors()


def give_back(holding: Holding) -> None:
    """Undo everything; what cannot be undone is made harmless (no limit) and logged, for nobody can act on it now."""
    if os.getpid() != holding.pid:
        return
    with holding.lock:
        group = holding.group
        try:
            # Removed under us, it has no thread any more: then whoever did it has moved them.
            with contextlib.suppress(FileNotFoundError):
                for thread_id in group.thread_ids():
                    send_home(holding, thread_id)
            group.remove()
        except OSError as error:
            # For example version 1 with a group owned by this user below one that is not: in is allowed, out is not.
            try:
                group.write_quota(None)
            except CpuControlError as failure:
                _log.warning("the CPU limit of %s could not be lifted: %s", group.directory, failure)
            group.close_descriptors()
            _log.info("%s stays, without a limit, until this process ends: %s", group.directory, error)
