"""cgroup v2: its files as descriptors, and what only version 2 has: threaded groups, delegation, namespaces.

The tests of the kernel run where the CPU controller is in version 2; ``make stress`` boots such a kernel.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sponge import CgroupScaler, CgroupUnavailable
from sponge.live.cgroup.v2 import CpuControllerV2, CpuMaxFile, V2Group
from tests.live.cgroup_here import HOME, PROBE, burners, native_ids, needs_root, run_python

ON_V2 = PROBE.cgroup_version == 2 and PROBE.quota_allowed
if not ON_V2:
    warnings.warn("the CPU controller is not in cgroup v2 here: `make stress` boots a kernel where it is", stacklevel=1)
on_v2 = pytest.mark.skipif(not ON_V2, reason="the CPU controller is not in cgroup v2 here; see `make stress`")


# --- the files ---


@given(st.one_of(st.none(), st.integers(1_000, 2**40)), st.integers(1_000, 1_000_000))
def test_cpu_max_is_read_as_it_was_written(quota_us: int | None, period_us: int) -> None:
    """``max`` is no number."""
    file = CpuMaxFile("cpu.max")
    assert file.sanitize_get(file.sanitize_set((quota_us, period_us)) + "\n") == (quota_us, period_us)


def test_controller_reads_and_writes_the_files_of_a_directory(tmp_path: Path) -> None:
    """The descriptors, without a kernel: names and formats as in cgroup-v2.rst."""
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nnr_periods 2\n")
    controller = CpuControllerV2(str(tmp_path))
    assert controller.cpu_max == (None, 100_000)
    controller.cpu_max = (5_000, 10_000)
    assert (tmp_path / "cpu.max").read_text() == "5000 10000"
    assert controller.controllers == {"cpuset", "cpu", "io"}
    assert controller.stat == {"usage_usec": 5, "nr_periods": 2}
    controller.subtree_control = frozenset({"+cpu"})
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    controller.cpu_max_burst = 700
    assert controller.cpu_max_burst == 700
    with pytest.raises(AttributeError, match=r"cpu\.stat"):
        controller.stat = {}
    with pytest.raises(FileNotFoundError):
        _ = controller.group_type


def test_limit_of_a_group_in_cores() -> None:
    """What the ceiling is computed from."""
    assert V2Group.limit_cores([b"150000 100000\n"]) == 1.5
    assert V2Group.limit_cores([b"max 100000\n"]) == float("inf")


# --- the kernel ---


@pytest.fixture
def controller() -> Iterator[CpuControllerV2]:
    """Give the group of this process; it must be afterwards as it was before."""
    here = CpuControllerV2(HOME)
    before = here.subtree_control
    yield here
    assert here.subtree_control == before


@on_v2
def test_group_is_threaded_and_the_controller_is_switched_back(controller: CpuControllerV2) -> None:
    """The only way in version 2 to limit some threads of a process."""
    before = controller.subtree_control
    with CgroupScaler() as scaler:
        assert CpuControllerV2(scaler.directory).group_type == "threaded"
        assert "cpu" in controller.subtree_control
        assert scaler.how == "cgroup v2 quota"
    assert controller.subtree_control == before


@on_v2
def test_switch_stays_on_while_another_scaler_needs_it(controller: CpuControllerV2) -> None:
    """Whoever switched it on may be the first to leave, also in another process."""
    with CgroupScaler() as first:
        second = CgroupScaler()
        first.close()
        assert second.scale(0.5) == 0.5
        second.close()


@on_v2
def test_switch_of_a_killed_process_is_turned_back_by_the_next(controller: CpuControllerV2) -> None:
    """Its group tells that it was one of us who turned it on."""
    script = "import os; from sponge import CgroupScaler; scaler = CgroupScaler(); os.kill(os.getpid(), 9)"
    with pytest.raises(AssertionError):
        run_python(script)
    with CgroupScaler():
        pass
    # The fixture compares with what was there before.


@on_v2
def test_burst_is_set_and_never_above_the_quota(controller: CpuControllerV2) -> None:
    """The kernel refuses a quota below the burst, so every share must still be accepted."""
    with CgroupScaler() as scaler, CgroupScaler(burst=False) as without:
        files = CpuControllerV2(scaler.directory)
        assert files.cpu_max_burst == scaler.burst_us == 1_000
        assert scaler.scale(0.1) == pytest.approx(0.1)
        assert files.cpu_max == (1_000, 10_000)
        assert CpuControllerV2(without.directory).cpu_max_burst == without.burst_us == 0


@on_v2
def test_group_outside_of_the_process_is_explained(controller: CpuControllerV2) -> None:
    """Version 2 moves single threads only within their process's group."""
    if HOME == "/sys/fs/cgroup":
        pytest.skip("everything is below the group of this process")
    with pytest.raises(CgroupUnavailable, match=r"this process is not in /sys/fs/cgroup|may not write"):
        CgroupScaler(path="/sys/fs/cgroup")


@on_v2
def test_group_with_ordinary_children_is_explained(controller: CpuControllerV2) -> None:
    """A process next to child groups with processes: the kernel makes no thread groups there."""
    if HOME == "/sys/fs/cgroup":
        pytest.skip("the root is exempt from this rule")
    out = run_python(
        f"""
import os, subprocess
from sponge import CgroupScaler
home = {HOME!r}
os.mkdir(home + "/ordinary")
other = subprocess.Popen(["sleep", "60"])
try:
    open(home + "/ordinary/cgroup.procs", "w").write(str(other.pid))
    print(CgroupScaler.probe().explain())
finally:
    other.kill()
    other.wait()
    os.rmdir(home + "/ordinary")
"""
    )
    assert "cannot hold groups of single threads" in out
    assert "systemd-run" in out


@on_v2
@needs_root
def test_group_without_the_cpu_controller_is_explained(controller: CpuControllerV2) -> None:
    """What an unprivileged login session gets from many distributions: memory and pids only."""
    out = run_python(
        f"""
import os
from sponge import CgroupScaler
home, inner = {HOME!r}, {HOME!r} + "/inner"
os.mkdir(inner)
open(inner + "/cgroup.procs", "w").write(str(os.getpid()))
try:
    print(CgroupScaler.probe().explain())
finally:
    open(home + "/cgroup.procs", "w").write(str(os.getpid()))
    os.rmdir(inner)
"""
    )
    assert "the CPU controller is not granted to the group" in out
    assert "cgroup.subtree_control" in out


@on_v2
@needs_root
def test_cgroup_namespace_of_a_container(controller: CpuControllerV2) -> None:
    """Inside, the container's group is the root of what is mounted; a quota set from outside is seen."""
    if HOME != "/sys/fs/cgroup":
        pytest.skip("only the root may have processes next to an ordinary child group")
    out = run_python(
        """
import ctypes, os, subprocess
home, inner = "/sys/fs/cgroup", "/sys/fs/cgroup/container"
switch = home + "/cgroup.subtree_control"
switched = "cpu" not in open(switch).read().split()
open(switch, "w").write("+cpu")
os.mkdir(inner)
open(inner + "/cpu.max", "w").write("50000 100000")
child = os.fork()
if child == 0:
    open(inner + "/cgroup.procs", "w").write(str(os.getpid()))
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000 | 0x02000000) == 0  # mounts and cgroups
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["umount", "/sys/fs/cgroup"], check=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    from sponge import CgroupScaler
    probe = CgroupScaler.probe()
    print(probe.group, probe.quota_allowed, probe.container_quota_cores, probe.reason, flush=True)
    with CgroupScaler() as scaler:
        print(scaler.scale(2), flush=True)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os.rmdir(inner)
if switched:
    open(switch, "w").write("-cpu")
raise SystemExit(code)
"""
    )
    assert out.split() == ["/sys/fs/cgroup", "True", "0.5", "0.5"]


@on_v2
def test_threads_of_a_process_in_the_group_stay_in_one_domain(controller: CpuControllerV2) -> None:
    """A thread that is moved away and back is where all others are."""
    with burners(1) as threads, CgroupScaler() as scaler:
        scaler.adopt(native_ids(threads))
        with open(f"/proc/self/task/{native_ids(threads)[0]}/cgroup") as file:
            assert os.path.basename(scaler.directory) in file.read()
        scaler.adopt([])
        with open(f"/proc/self/task/{native_ids(threads)[0]}/cgroup") as moved, open("/proc/self/cgroup") as main:
            assert moved.read() == main.read()
    assert threading.get_native_id() == os.getpid()
