"""Where the process stands in the group tree: the two texts of /proc, as real machines and hostile ones write them."""

from __future__ import annotations

import doctest
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge.live.cgroup import hierarchy
from sponge.live.cgroup.hierarchy import (
    CgroupMount,
    directory_of,
    find_cpu_mount,
    parse_memberships,
    parse_mounts,
    start_ticks,
)

HYBRID_CGROUP = """\
9:name=systemd:/
3:cpuset:/
1:cpu,cpuacct:/web
0::/
"""
HYBRID_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:2 - cgroup2 cgroup2 rw
"""


def located(cgroup: str, mountinfo: str) -> tuple[str, int, bool]:
    location, reason = find_cpu_mount(parse_memberships(cgroup), parse_mounts(mountinfo))
    assert location is not None, reason
    return location.directory, location.version, location.mount.read_only


def refused(cgroup: str, mountinfo: str) -> str:
    location, reason = find_cpu_mount(parse_memberships(cgroup), parse_mounts(mountinfo))
    assert location is None
    return reason


def test_hybrid_machine_has_the_cpu_controller_in_version_1() -> None:
    """A mounted version 2 tree without cpu must not draw us away from where the controller is."""
    assert located(HYBRID_CGROUP, HYBRID_MOUNTS) == ("/sys/fs/cgroup/cpu,cpuacct/web", 1, False)


def test_systemd_machine_with_version_2() -> None:
    """The common case of today's distributions."""
    cgroup = "0::/system.slice/web.service\n"
    mounts = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    assert located(cgroup, mounts) == ("/sys/fs/cgroup/system.slice/web.service", 2, False)


def test_container_with_its_own_namespace_mounted_read_only() -> None:
    """Docker's default on version 2: our group is the mount itself, and read-only."""
    mounts = "650 640 0:30 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
    assert located("0::/\n", mounts) == ("/sys/fs/cgroup", 2, True)


def test_container_without_namespace_sees_its_subtree_only() -> None:
    """Docker's default on version 1: the mount's root is the container's group, and the paths overlap."""
    mounts = "650 640 0:30 /docker/4f /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
    assert located("4:cpu:/docker/4f/x\n", mounts) == ("/sys/fs/cgroup/cpu/x", 1, True)


def test_group_above_the_namespace_is_told_not_guessed() -> None:
    """``/..`` would lead out of the mount to whatever directory lies there."""
    mounts = "650 640 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    assert "shows another part" in refused("0::/../other\n", mounts)
    shifted = "650 640 0:30 /.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    assert located("0::/../other\n", shifted)[0] == "/sys/fs/cgroup/other"
    assert "shows another part" in refused("0::/\n", shifted)


def test_no_cgroup_and_not_mounted_are_told_apart() -> None:
    """They call for different remedies."""
    assert "no CPU control groups" in refused("", HYBRID_MOUNTS)
    assert "not mounted" in refused("0::/x\n", "")


def test_writable_mount_is_preferred() -> None:
    """A container may have a read-only view at the usual place and a writable one elsewhere."""
    mounts = "1 0 0:30 / /rw rw - cgroup2 cgroup rw\n2 0 0:30 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    assert located("0::/a\n", mounts) == ("/rw/a", 2, False)


def test_file_system_that_is_read_only_as_a_whole() -> None:
    """The option may stand in the last field instead."""
    assert located("0::/\n", "1 0 0:30 / /c rw - cgroup2 cgroup ro\n")[2]


def test_paths_with_colons_and_blanks() -> None:
    """Group names may hold anything but newline and slash; mountinfo writes blanks as octal."""
    mounts = "1 0 0:30 / /my\\040mount\\134x rw - cgroup2 cgroup rw\n"
    assert located("0::/a:b c\n", mounts)[0] == "/my mount\\x/a:b c"


@given(st.text(), st.text())
def test_any_text_is_parsed_without_an_error(cgroup: str, mountinfo: str) -> None:
    """A kernel or sandbox that writes something else must lead to an explanation, not to a traceback."""
    location, reason = find_cpu_mount(parse_memberships(cgroup), parse_mounts(mountinfo))
    assert (location is None) == bool(reason)


FRAGMENTS = st.sampled_from(["0", "1", "-", "cgroup", "cgroup2", "/", "/..", "rw", "ro", "cpu", "rw,cpu", "", "\\040"])


@given(
    st.lists(st.lists(FRAGMENTS, max_size=14).map(" ".join), max_size=4).map("\n".join),
    st.lists(st.lists(FRAGMENTS, max_size=5).map(":".join), max_size=4).map("\n".join),
)
def test_nearly_right_lines_never_lead_out_of_the_mount(mountinfo: str, cgroup: str) -> None:
    """Fragments in the wrong places: whatever is found lies below a mount point that was listed."""
    mounts = parse_mounts(mountinfo)
    location, _ = find_cpu_mount(parse_memberships(cgroup), mounts)
    if location is not None:
        assert ".." not in location.directory[len(location.mount.mount_point) :].split("/")
        assert location.mount in mounts


NAMES = st.text(st.characters(exclude_characters="/\n", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, max_size=4)


def octal(path: str) -> str:
    return "".join(f"\\{ord(one):03o}" if one in " \t\n\\" else one for one in path)


@given(PATHS, PATHS, PATHS)
def test_written_as_the_kernel_writes_it_comes_back(point: list[str], root: list[str], below: list[str]) -> None:
    """Any names, also with colons, blanks and backslashes, survive the two formats."""
    point_path, root_path = "/" + "/".join(point), "/" + "/".join(root)
    group = "/" + "/".join([*root, *below])
    mounts = parse_mounts(f"31 23 0:28 {octal(root_path)} {octal(point_path)} rw,x shared:1 - cgroup2 none rw")
    (membership,) = parse_memberships(f"0::{group}")
    assert membership.group == group
    assert [(one.mount_point, one.root) for one in mounts] == [(point_path, root_path)]
    assert directory_of(membership.group, mounts[0]) == "/" + "/".join([*point, *below])


def test_sibling_with_a_common_beginning_is_outside() -> None:
    """Names are compared whole: ``/docker/4f`` does not hold ``/docker/4f2``."""
    mount = CgroupMount(version=2, mount_point="/c", root="/docker/4f", controllers=frozenset(), read_only=False)
    assert directory_of("/docker/4f2", mount) is None


def test_start_time_tells_processes_apart() -> None:
    """Our own is stable, a pid that cannot exist has none."""
    assert start_ticks(os.getpid()) == start_ticks(os.getpid()) is not None
    assert start_ticks(2**22 + 1) is None


def test_start_time_of_a_process_with_a_misleading_name() -> None:
    """The name is in the middle of the line and may look like the rest of it."""
    before = start_ticks(os.getpid())
    found: list[int | None] = []

    def rename() -> None:
        with open("/proc/thread-self/comm", "w") as file:
            file.write(") S 1 2 (3")
        found.append(start_ticks(threading.get_native_id()))

    thread = threading.Thread(target=rename)
    thread.start()
    thread.join()
    assert before is not None
    assert found[0] is not None
    assert found[0] >= before


def test_examples_in_docstrings() -> None:
    """What the documentation shows is true."""
    failures, tried = doctest.testmod(hierarchy)
    assert tried > 0
    assert failures == 0


@pytest.mark.parametrize("name", ["sponge-1-2-3", "sponge-4194304-18446744073709551615-0"])
def test_own_names_are_recognised(name: str) -> None:
    """Leftovers are found by name alone."""
    assert hierarchy.OWN_NAME.match(name)


@pytest.mark.parametrize(
    "name", ["sponge", "sponge-1-2", "sponge-1-2-3-4", "sponge-1-2-x", "my-sponge-1-2-3", "sponge-1-2-3\n"]
)
def test_foreign_names_are_not(name: str) -> None:
    """Removing somebody else's group would be far worse than leaving one of ours."""
    assert not hierarchy.OWN_NAME.match(name)
