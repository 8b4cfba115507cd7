"""Where this process stands in the tree of control groups, read from ``/proc``.

Two texts say it: ``/proc/self/cgroup`` names our group in each hierarchy, as seen from our cgroup namespace,
and ``/proc/self/mountinfo`` says which part of which hierarchy is mounted where. Neither is enough alone: in
a container the mount usually shows only the container's own subtree, and the group's name then begins with
the root of the mount. A name may begin with ``/..`` (the group lies above the root of our namespace); such a
group cannot be reached through the mount and that is told, never guessed around.

The parsers take any text and never raise: a line that does not have the kernel's form is passed over.

References
----------
Linux, Documentation/admin-guide/cgroup-v1/cgroups.rst and cgroup-v2.rst; proc(5); cgroup_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Literal

import attrs

_OCTAL = re.compile(r"\\([0-7]{3})")


@attrs.frozen(kw_only=True)
class Membership:
    """One line of ``/proc/<pid>/cgroup``."""

    controllers: frozenset[str]
    """Controllers of a version 1 hierarchy; empty for the version 2 one."""
    group: str
    """Path of the group, as seen from the reader's cgroup namespace."""
    unified: bool
    """Whether it is the version 2 hierarchy."""


@attrs.frozen(kw_only=True)
class CgroupMount:
    """One mounted (part of a) cgroup hierarchy."""

    version: Literal[1, 2]
    mount_point: str
    root: str
    """Which group the mount point shows, as seen from the reader's cgroup namespace."""
    controllers: frozenset[str]
    """Controllers bound to it (version 1 only)."""
    read_only: bool


@attrs.frozen(kw_only=True)
class Location:
    """The group of this process in the hierarchy that has the CPU controller, and how to reach it."""

    mount: CgroupMount
    group: str
    directory: str

    @property
    def version(self) -> Literal[1, 2]:
        """cgroup version of the hierarchy."""
        return self.mount.version


def parse_memberships(text: str) -> list[Membership]:
    """Return what ``/proc/<pid>/cgroup`` says, line by line.

    Parameters
    ----------
    text
        Contents of the file: lines ``<id>:<controllers>:<path>``; the path may hold colons.
    """
    found = []
    for line in text.split("\n"):
        parts = line.split(":", 2)
        if len(parts) != 3 or not parts[0].isdecimal() or not parts[2].startswith("/"):
            continue
        names = frozenset(name for name in parts[1].split(",") if name)
        found.append(Membership(controllers=names, group=parts[2], unified=parts[0] == "0" and not names))
    return found


def parse_mounts(text: str) -> list[CgroupMount]:
    """Return the cgroup mounts that ``/proc/<pid>/mountinfo`` lists, in its order.

    Parameters
    ----------
    text
        Contents of the file: ``id parent major:minor root mount_point options [optional …] - type source
        super``.
    """
    found = []
    for line in text.split("\n"):
        fields = line.split(" ")
        if len(fields) < 10 or "-" not in fields[6:]:
            continue
        separator = fields.index("-", 6)
        if len(fields) < separator + 4 or fields[separator + 1] not in ("cgroup", "cgroup2"):
            continue
        root, mount_point = _unescape(fields[3]), _unescape(fields[4])
        super_options = fields[separator + 3].split(",")
        # Bound read-only and read-only as a whole are written in different fields; either forbids writing.
        read_only = "ro" in fields[5].split(",") or "ro" in super_options
        if root.startswith("/") and mount_point.startswith("/"):
            found.append(
                CgroupMount(
                    version=1 if fields[separator + 1] == "cgroup" else 2,
                    mount_point=mount_point,
                    root=root,
                    controllers=frozenset(super_options) if fields[separator + 1] == "cgroup" else frozenset(),
                    read_only=read_only,
                )
            )
    return found


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), field)


def directory_of(group: str, mount: CgroupMount) -> str | None:
    """Return the directory that shows *group* through *mount*, or ``None`` if it lies outside of it.

    >>> mount = CgroupMount(
    ...     version=1, mount_point="/cgroup", root="/docker/4f", controllers=frozenset(), read_only=False
    ... )
    >>> directory_of("/docker/4f/web", mount)
    '/cgroup/web'
    >>> directory_of("/../other", mount) is None
    True
    """
    names = [name for name in group.split("/") if name and name != "."]
    root = [name for name in mount.root.split("/") if name and name != "."]
    rest = names[len(root) :]
    # ".." stands for a group above our namespace. Equal prefixes may hold it, the rest may not: that would
    # climb out of the mount into whatever directory lies there.
    if names[: len(root)] != root or ".." in rest:
        return None
    return "/".join([mount.mount_point.rstrip("/"), *rest]) or "/"


def find_cpu_mount(memberships: list[Membership], mounts: list[CgroupMount]) -> tuple[Location | None, str]:
    """Return where the CPU controller can be reached for a process, or ``None`` and the reason.

    Parameters
    ----------
    memberships, mounts
        As parsed from ``/proc/self/cgroup`` and ``/proc/self/mountinfo``.

    Returns
    -------
    location : Location or None
        Of several mounts that show the group a writable one is preferred, then the latest (it may cover the
        others).
    reason : str
        Why there is none; empty if there is one.
    """
    mine = next((one for one in memberships if "cpu" in one.controllers), None)
    version: Literal[1, 2] = 1
    if mine is None:
        mine, version = next((one for one in memberships if one.unified), None), 2
    if mine is None:
        return (
            None,
            "this kernel has no CPU control groups (neither version 1 nor 2 is listed in /proc/self/cgroup)",
        )
    fitting = [one for one in mounts if one.version == version and (version == 2 or "cpu" in one.controllers)]
    if not fitting:
        return None, f"the cgroup v{version} hierarchy with the CPU controller is not mounted here"
    reached = [
        Location(mount=mount, group=mine.group, directory=directory)
        for mount in fitting
        if (directory := directory_of(mine.group, mount)) is not None
    ]
    if not reached:
        shown = ", ".join(f"{one.root} at {one.mount_point}" for one in fitting)
        return (
            None,
            f"this process is in the group {mine.group}, but what is mounted shows another part: {shown}",
        )
    writable = [one for one in reached if not one.mount.read_only]
    return (writable or reached)[-1], ""


def locate() -> tuple[Location | None, str]:
    """Return the location of this process's own group (see `find_cpu_mount`).

    Groups of ours are stepped out of.
    """
    try:
        with open("/proc/self/cgroup") as memberships, open("/proc/self/mountinfo") as mounts:
            location, reason = find_cpu_mount(parse_memberships(memberships.read()), parse_mounts(mounts.read()))
    except OSError as error:
        return None, f"/proc cannot be read ({error.strerror}), so the process's group is not known"
    if location is None:
        return None, reason
    # The main thread may have been adopted by an earlier scaler; a second one is its sibling, not its child.
    top = location.mount.mount_point
    while location.directory != top and OWN_NAME.match(os.path.basename(location.directory)):
        location = attrs.evolve(
            location, directory=os.path.dirname(location.directory), group=os.path.dirname(location.group)
        )
    return location, ""


def version_at(directory: str) -> Literal[1, 2] | None:
    """Return the version of the hierarchy of which *directory* is a group, None if of none that may have CPU control.

    The file system says it, not the files that are found: those anybody could make in a directory of their own.
    """
    try:
        device = os.stat(directory).st_dev
        with open("/proc/self/mountinfo") as file:
            mounts = parse_mounts(file.read())
    except OSError:
        return None
    for mount in mounts:
        with contextlib.suppress(OSError):
            if (mount.version == 2 or "cpu" in mount.controllers) and os.stat(mount.mount_point).st_dev == device:
                return mount.version
    return None


def group_of_thread(thread_id: int, location: Location) -> str | None:
    """Return the directory of the group in which a thread of this process is, ``None`` if it has ended."""
    try:
        with open(f"/proc/self/task/{thread_id}/cgroup") as file:
            memberships = parse_memberships(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None
    for one in memberships:
        if one.unified if location.version == 2 else "cpu" in one.controllers:
            return directory_of(one.group, location.mount)
    return None


# --- the names of our groups ---

OWN_NAME = re.compile(r"sponge-(\d{1,10})-(\d{1,20})-(\d{1,10})\Z", re.ASCII)
"""``sponge-<pid>-<start time of the process in clock ticks after boot>-<n>``; pids are given out again."""


def start_ticks(pid: int) -> int | None:
    """Return when a process started [clock ticks after boot], or ``None`` if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may hold blanks and parentheses: count from the last one.
    return int(text[text.rindex(b")") + 2 :].split()[19])
