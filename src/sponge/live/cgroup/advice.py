"""Plain words for why a quota cannot be set, and what would allow it.

The kernel answers with an error number; which setting helps depends on who made the group: systemd, a
container runtime, Kubernetes, or nobody.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import Literal

from sponge.errors import CgroupUnavailable
from sponge.live.cgroup.group import is_ours
from sponge.live.cgroup.hierarchy import Location


class Surroundings(enum.Enum):
    """What the process runs in, as far as it shows from inside."""

    KUBERNETES = "Kubernetes container"
    DOCKER = "Docker container"
    PODMAN = "Podman container"
    CONTAINER = "container"
    SYSTEMD = "systemd machine"
    PLAIN = "machine without systemd"


def surroundings() -> Surroundings:
    """Tell what the process runs in, from the marks that runtimes leave."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return Surroundings.KUBERNETES
    if os.path.exists("/.dockerenv"):
        return Surroundings.DOCKER
    if os.path.exists("/run/.containerenv"):
        return Surroundings.PODMAN
    if os.path.exists("/run/systemd/container") or "container" in os.environ:
        return Surroundings.CONTAINER
    # What sd_booted(3) tests: systemd may be installed without being the one that runs.
    return Surroundings.SYSTEMD if os.path.isdir("/run/systemd/system") else Surroundings.PLAIN


# On version 2 runc gives the group in a private namespace to the user with which the container starts; crun does not.
_WRITABLE_IN_CONTAINER = {
    Surroundings.KUBERNETES: (
        "Give the container `securityContext: {privileged: true}`; or, without privileges, a runtime class "
        "whose containerd (2.1 or later) has `cgroup_writable = true`. Run as root in it"
    ),
    Surroundings.DOCKER: (
        "Start the container with `--cgroupns=private --security-opt writable-cgroups=true` (Docker 28 or "
        "later) or with `--cgroupns=private --privileged`, and run as the user with which it starts"
    ),
    Surroundings.PODMAN: (
        "Start the container with `--cgroupns=private --security-opt unmask=/sys/fs/cgroup`, and run as root in it; "
        "or with `--runtime runc` too, and run as the user with which it starts"
    ),
    Surroundings.CONTAINER: (
        "Let the container's runtime mount /sys/fs/cgroup read-write, owned by the user of this process"
    ),
}


_WRITABLE_IN_CONTAINER_V1 = {
    # Podman passes over the option that it has for version 2.
    Surroundings.DOCKER: "Start the container with `--privileged`, and run as root in it",
    Surroundings.PODMAN: "Start the container with `--privileged`, and run as root in it",
}


def _delegation(version: Literal[1, 2], directory: str) -> str:
    """Return how an unprivileged user gets a group on a machine that is not a container."""
    user = os.geteuid()
    if version == 1:
        home = f"{directory}/sponge-home"
        return (
            f"As root: `mkdir {home} && chown -R {user} {home}`, then start the process in it "
            f"(`echo $$ > {home}/cgroup.procs`, as root, before `exec`), or run it as root"
        )
    if surroundings() is Surroundings.SYSTEMD:
        return (
            "Put `Delegate=yes` into the [Service] section of its unit, or start it with "
            "`systemd-run --user --scope -p Delegate=yes python …`; if that grants no cpu, let root put the "
            "lines `[Service]` and `Delegate=cpu memory pids` into "
            "/etc/systemd/system/user@.service.d/delegate.conf, run `systemctl daemon-reload`, and log in again"
        )
    home, make = directory.rstrip("/"), ""
    if not os.path.exists(f"{home}/cgroup.type"):  # the root of the tree: that is nobody's to be given
        make = f"echo +cpu > {home}/cgroup.subtree_control; mkdir {home}/sponge-home; "
        home += "/sponge-home"
    given = " ".join([home, *(f"{home}/{name}" for name in _DELEGATED)])
    enter = f", then start the process in it (`echo $$ > {home}/cgroup.procs` before `exec`)" if make else ""
    return f"As root: `{make}chown {user} {given}`{enter}; or run the process as root"


_DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")


def how_to_write(version: Literal[1, 2], directory: str, *, read_only: bool) -> str:
    """Return the setting that makes the group at *directory* writable for this user.

    Parameters
    ----------
    version, directory
        cgroup version and directory of the group.
    read_only
        Whether it is the mount that forbids it, or else the permissions.
    """
    where = surroundings()
    if where in _WRITABLE_IN_CONTAINER and (read_only or version == 2):
        known = _WRITABLE_IN_CONTAINER_V1 if version == 1 else {}
        return known.get(where, _WRITABLE_IN_CONTAINER[where])
    if read_only:
        # `bind` changes the mount alone: version 1 refuses to change the hierarchy, version 2 would lose its options.
        remount = f"as root: `mount -o remount,bind,rw {_mount_point(directory)}`"
        if where is Surroundings.SYSTEMD:
            return f"Take `ProtectControlGroups=` out of the [Service] section of its unit; without a unit, {remount}"
        return _sentence(remount)
    return _delegation(version, directory)


def _mount_point(directory: str) -> str:
    while not os.path.ismount(directory):
        directory = os.path.dirname(directory)
    return directory


def unreachable(reason: str) -> CgroupUnavailable:
    """Return the error for a CPU controller that is not there or not mounted where we can see it."""
    where = surroundings()
    if where in _WRITABLE_IN_CONTAINER:
        return CgroupUnavailable(_sentence(reason), _WRITABLE_IN_CONTAINER[where])
    return CgroupUnavailable(
        _sentence(reason),
        "As root: `mount -t cgroup2 none /sys/fs/cgroup` (systemd does it at boot); the kernel needs "
        "CONFIG_CFS_BANDWIDTH",
    )


def refused(error: OSError, version: Literal[1, 2], parent: str, location: Location | None) -> CgroupUnavailable:
    """Return the error for a set-up that the kernel refused.

    Parameters
    ----------
    error
        What the kernel answered; its file name, if any, is the file that was written.
    version, parent
        cgroup version, and directory of the group below which ours was to be made.
    location
        Where the process itself is, if known.
    """
    path = _text(error.filename) or parent
    if error.errno == errno.EROFS:
        return CgroupUnavailable(f"{parent} is mounted read-only", how_to_write(version, parent, read_only=True))
    if error.errno in (errno.EACCES, errno.EPERM):
        # Our own group was never there, so it is its parent that could not be written.
        place = parent if is_ours(os.path.basename(path)) else path
        reason = f"user {os.geteuid()} may not write {place}"
        return CgroupUnavailable(reason, how_to_write(version, parent, read_only=False))
    if version == 2:
        known = _refused_v2(error, parent, location)
        if known is not None:
            return known
    return CgroupUnavailable(f"the kernel refused to set up {path}: {error.strerror}", "")


def _refused_v2(error: OSError, parent: str, location: Location | None) -> CgroupUnavailable | None:
    if "cpu" not in _words(os.path.join(parent, "cgroup.controllers")):
        above = os.path.dirname(parent.rstrip("/"))
        advice = f"As root: `echo +cpu > {above}/cgroup.subtree_control`"
        if surroundings() is not Surroundings.PLAIN:
            advice = how_to_write(2, parent, read_only=False)
        return CgroupUnavailable(f"the CPU controller is not granted to the group {parent}", advice)
    own = location.directory.rstrip("/") + "/" if location else ""
    inside = location is not None and (parent.rstrip("/") + "/").startswith(own)
    if not inside:
        return CgroupUnavailable(
            f"cgroup v2 moves single threads only within the group of their process, and this process is not "
            f"in {parent}",
            f"Start the process in it: `echo $$ > {parent}/cgroup.procs` before `exec`",
        )
    if error.errno in (errno.EOPNOTSUPP, errno.EBUSY):
        on = sorted(_words(os.path.join(parent, "cgroup.subtree_control")))
        return CgroupUnavailable(
            f"the group {parent} cannot hold groups of single threads: it has ordinary child groups with "
            f"processes, or controllers that know no threads are on for its children ({', '.join(on) or 'none'})",
            "Start the process in a group of its own, for example with `systemd-run --scope -p Delegate=yes python …`",
        )
    return None


def _words(path: str) -> set[str]:
    try:
        with open(path) as file:
            return set(file.read().split())
    except OSError:
        return set()


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
