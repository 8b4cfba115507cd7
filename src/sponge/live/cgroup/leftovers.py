"""Groups of processes that were killed before they could remove them.

A group's name says which process made it, by number and start time; a number alone is given out again. A
group is a leftover if that process is gone, nobody holds its lock (the owner may live in another pid
namespace, where its number means something else) and no thread is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os

from sponge.live.cgroup.group import child_groups, directory_lock
from sponge.live.cgroup.hierarchy import OWN_NAME, start_ticks

_log = logging.getLogger("sponge.cgroup")


def find_leftovers(parent: str) -> list[str]:
    """Return the names of abandoned groups directly below a group.

    Parameters
    ----------
    parent
        Directory of the group; one that cannot be read has none that we could remove.
    """
    try:
        names = child_groups(parent)
    except OSError:
        return []
    return [name for name in names if _is_abandoned(parent, name)]


def _is_abandoned(parent: str, name: str) -> bool:
    match = OWN_NAME.match(name)
    if match is None or start_ticks(int(match[1])) == int(match[2]):
        return False
    directory = os.path.join(parent, name)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(os.path.join(directory, _threads_file(directory))) as file:
            return not file.read().strip()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _threads_file(directory: str) -> str:
    return "cgroup.threads" if os.path.exists(os.path.join(directory, "cgroup.threads")) else "tasks"


def remove_leftovers(parent: str) -> list[str]:
    """Remove abandoned groups directly below a group and return their names.

    One that cannot be removed (another user's, or a thread was just put into it) stays: it holds no thread
    back.
    """
    removed = []
    with contextlib.suppress(OSError), directory_lock(parent):
        for name in find_leftovers(parent):
            try:
                os.rmdir(os.path.join(parent, name))
            except OSError as error:
                _log.debug("the abandoned group %s in %s stays: %s", name, parent, error.strerror)
            else:
                removed.append(name)
    if removed:
        _log.info("removed groups of killed processes from %s: %s", parent, ", ".join(removed))
    return removed
