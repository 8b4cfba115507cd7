"""A scheduler whose control group fails: it serves on, says so once, and recovers when the fault is gone.

Everything is real: the model, the threads, the kernel's groups, the users and the mounts. The faults are those that
this kernel can show; where a descriptor that is open keeps working (another user, a read-only mount), that is the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sponge import CgroupScaler
from tests.live.cgroup_here import (
    HOME,
    PROBE,
    group_above,
    groups_of,
    needs_quota,
    needs_root,
    quota_in_force,
    remove_group,
    run_python,
    threads_in,
    write_quota,
)
from tests.live.service_here import Service

pytestmark = needs_quota

BEGINS, ENDS = "CPU control fails", "CPU control works again"
TWO_CORES_US = 22_000


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Serve, and look afterwards that nothing is left."""
    before = groups_of(os.getpid())
    with Service(tmp_path) as one:
        assert one.serve().cores == 2
        yield one
    assert groups_of(os.getpid()) == before


# --- in one process ---


def test_removed_group_is_made_again_while_serving(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """An allocation that does not change for hours: the loss is noticed all the same, and all threads are back."""
    removed = remove_group(service.scaler.directory)
    statistics = service.serve_until(lambda one: one.cpu_control_errors > 0 and not one.cpu_control_fault)
    assert service.scaler.directory != removed
    assert threads_in(service.scaler.directory) == service.thread_ids
    assert quota_in_force(service.scaler.directory) == TWO_CORES_US
    assert statistics.cores == 2
    service.serve(100)
    assert (caplog.text.count(BEGINS), caplog.text.count(ENDS)) == (1, 1)
    assert "No such device" in caplog.text


def test_quota_changed_by_somebody_else_is_put_right_while_serving(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours is the only hand on our own group: another value is told and written over. Told less and less often."""
    for time in range(1, 6):
        write_quota(service.scaler.directory, 30_000)
        service.serve_until(lambda one: one.cpu_control_errors == time and not one.cpu_control_fault)  # noqa: B023
        assert quota_in_force(service.scaler.directory) == TWO_CORES_US
    assert "'30000' is in force: something else wrote it" in caplog.text.replace("30000 10000", "30000")
    assert (caplog.text.count(BEGINS), caplog.text.count(ENDS)) == (3, 3), "the first, second and fourth"


def test_fault_after_a_quiet_minute_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One a day is news each day."""
    offset_s = 0.0
    with Service(tmp_path, offset_s=lambda: offset_s) as service:
        for time in range(1, 4):
            write_quota(service.scaler.directory, 30_000)
            service.serve_until(lambda one: one.cpu_control_errors == time and not one.cpu_control_fault)  # noqa: B023
            offset_s += 61.0
    assert (caplog.text.count(BEGINS), caplog.text.count(ENDS)) == (3, 3)


def test_quota_above_changes_while_serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An in-place resize of the container, down and up: known and planned with, and no fault."""
    with group_above(5_000) as parent, Service(tmp_path, CgroupScaler(path=parent)) as service:
        assert service.serve().cores == 0.5
        write_quota(parent, 40_000)
        service.serve_until(lambda one: one.cores == 2)
        assert quota_in_force(service.scaler.directory) == TWO_CORES_US
        if PROBE.cgroup_version == 1:  # which refuses it otherwise
            write_quota(service.scaler.directory, 3_000)
        write_quota(parent, 5_000)
        statistics = service.serve_until(lambda one: one.cores == 0.5)
        assert not statistics.cpu_control_fault
    assert caplog.text.count(BEGINS) == (PROBE.cgroup_version == 1)


@pytest.mark.skipif(PROBE.cgroup_version != 2, reason="in version 1 there is no such switch")
def test_controller_switched_off_by_somebody_else_is_switched_on_again(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """The group is still there, with our threads, but has no quota any more."""
    before = service.scaler.directory
    with open(f"{HOME}/cgroup.subtree_control", "w") as file:
        file.write("-cpu")
    assert not os.path.exists(f"{before}/cpu.max")
    service.serve_until(lambda one: one.cpu_control_errors > 0 and not one.cpu_control_fault)
    assert not os.path.exists(before)
    assert threads_in(service.scaler.directory) == service.thread_ids
    assert quota_in_force(service.scaler.directory) == TWO_CORES_US
    assert (caplog.text.count(BEGINS), caplog.text.count(ENDS)) == (1, 1)


def test_two_schedulers_in_one_process_fail_alone(service: Service, tmp_path: Path) -> None:
    """Each has its own group; what befalls one does not touch the other."""
    with Service(tmp_path / "other") as other:
        assert threads_in(service.scaler.directory).isdisjoint(threads_in(other.scaler.directory))
        directory = other.scaler.directory
        remove_group(service.scaler.directory)
        service.serve_until(lambda one: one.cpu_control_errors > 0 and not one.cpu_control_fault)
        statistics = other.serve_until(lambda one: one.submitted > 20)
        assert statistics.cpu_control_errors == 0
        assert other.scaler.directory == directory
        assert quota_in_force(directory) == TWO_CORES_US
    assert not os.path.exists(directory)
    assert service.serve().cpu_control_fault == ""


# --- in several ---

SERVE = """
import ctypes, os, signal, subprocess, sys, tempfile, threading
from tests.live.cgroup_here import HOME, groups_of, quota_in_force, remove_group, threads_in
from tests.live.service_here import Service
import logging
logging.basicConfig(stream=sys.stdout)
cache = tempfile.mkdtemp(prefix="sponge-test-")
service = Service(cache)
directory = service.scaler.directory
print(directory, flush=True)
service.serve()
"""


def test_group_of_a_service_that_was_killed_is_removed_by_the_next(service: Service, tmp_path: Path) -> None:
    """In the middle of its work, while another serves on beside it."""
    script = SERVE + "print('serving', flush=True)\nwhile True: service.serve()"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    directory = process.stdout.readline().strip()
    assert process.stdout.readline() == "serving\n"
    assert len(threads_in(directory)) > 1
    assert quota_in_force(directory) == TWO_CORES_US
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert service.serve().cpu_control_errors == 0
    with Service(tmp_path / "next") as following:
        assert not os.path.exists(directory)
        assert following.serve().cores == 2
    assert service.serve().cpu_control_errors == 0
    assert quota_in_force(service.scaler.directory) == TWO_CORES_US


def test_forked_child_makes_a_scaler_of_its_own() -> None:
    """A server that forks its workers after start: theirs are not their parent's."""
    out = run_python(
        SERVE
        + """
from sponge import CgroupScaler, CpuControlError
pid = os.fork()
if pid == 0:
    try:
        service.scaler.scale(1)
    except CpuControlError as error:
        assert "make another one after a fork" in str(error), error
    with CgroupScaler() as own:
        own.adopt([threading.get_native_id()])
        own.scale(0.5)
        assert own.directory != directory and quota_in_force(directory) == 22_000
        assert os.path.exists(directory) and len(threads_in(directory)) > 1
    service.scaler.close()
    os._exit(0 if os.path.exists(directory) and not groups_of(os.getpid()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert threads_in(directory) == service.thread_ids
assert service.serve().cpu_control_errors == 0
service.close()
"""
    )
    assert not os.path.exists(out.split()[0])


@needs_root
def test_unprivileged_user_is_served_by_threads(tmp_path: Path) -> None:
    """All of ``wrap`` as another user: no group, no private cache at home, and the statistics say so."""
    out = run_python(
        """
import os, sys, logging, tempfile
import numpy as np, numpy.random, onnxruntime  # what the other user may not find
import sponge, sponge.live.wrap, sponge.live.cgroup.v1, sponge.live.cgroup.v2
from tests.live import models
model = models.identity()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
logging.basicConfig(stream=sys.stdout)
with sponge.wrap(model, max_cores=1, profile_budget_s=0.3, slo_s=60) as scheduler:
    for value in range(20):
        (answer,) = scheduler.submit({"x": np.full((1, 4), value, np.float32)}).result(60)
        assert (answer == value).all()
    print(scheduler.statistics())
"""
    )
    assert "no CPU quota: user 65534 may not write" in out
    assert "cpu_control='threads', cpu_control_errors=0" in out


@needs_root
def test_service_that_gives_up_its_rights_keeps_its_quota(tmp_path: Path) -> None:
    """Started as root, then another user, as servers do: open files still work. The group is left without a limit."""
    out = run_python(
        SERVE
        + """
os.setgroups([]); os.setgid(65534); os.setuid(65534)
statistics = service.serve(50)
assert (statistics.cpu_control_errors, statistics.cpu_control_fault) == (0, ""), statistics
assert service.scaler.scale(0.5) == 0.5 and quota_in_force(directory) == 5_000
service.serve_until(lambda one: one.cores == 2 and quota_in_force(directory) == 22_000)
service.close()
assert quota_in_force(directory) is None
"""
    )
    directory = out.split()[0]
    assert os.path.exists(directory), "as another user it cannot be removed"
    with Service(tmp_path):
        assert not os.path.exists(directory), "the next one can"


@needs_root
def test_lost_group_and_lost_rights_are_served_without_until_they_are_back() -> None:
    """Nothing limits the threads but their number; it is told once, tried again, and right again with the rights."""
    out = run_python(
        SERVE
        + """
os.seteuid(65534)
child = os.fork()  # root again, as an administrator would be
if child == 0:
    os.seteuid(0)
    remove_group(directory)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
statistics = service.serve_until(lambda one: one.cpu_control_errors >= 4)
assert "could not be made again: Permission denied" in statistics.cpu_control_fault, statistics
assert statistics.cores == 2
os.seteuid(0)
statistics = service.serve_until(lambda one: not one.cpu_control_fault)
assert threads_in(service.scaler.directory) == service.thread_ids
assert quota_in_force(service.scaler.directory) == 22_000
service.close()
"""
    )
    assert (out.count(BEGINS), out.count(ENDS)) == (1, 1)
    assert "what is left is the number of threads" in out


@needs_root
def test_mount_made_read_only_while_serving(tmp_path: Path) -> None:
    """A runtime that hardens its containers: what is open goes on; a group lost then is back when it may be made."""
    out = run_python(
        SERVE
        + f"""
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
home, behind = HOME, {str(tmp_path)!r}
mount("-o", "bind", home, behind)
mount("-o", "bind", home, home)
mount("-o", "remount,bind,ro", home)
statistics = service.serve(50)
assert (statistics.cpu_control_errors, statistics.cpu_control_fault) == (0, "")
assert service.scaler.scale(0.5) == 0.5 and quota_in_force(directory) == 5_000
service.serve_until(lambda one: quota_in_force(directory) == 22_000)
name = "cgroup.threads" if os.path.exists(behind + "/cgroup.threads") else "tasks"
for thread_id in threads_in(directory):
    open(behind + "/" + name, "w").write(str(thread_id))
os.rmdir(behind + "/" + os.path.basename(directory))
statistics = service.serve_until(lambda one: one.cpu_control_errors >= 4)
assert "could not be made again: Read-only file system" in statistics.cpu_control_fault, statistics
subprocess.run(["umount", home], check=True)
service.serve_until(lambda one: not one.cpu_control_fault)
assert threads_in(service.scaler.directory) == service.thread_ids
service.close()
""",
        prefix=("unshare", "-m"),
    )
    assert (out.count(BEGINS), out.count(ENDS)) == (1, 1)
    assert groups_left_by(out) == []


def groups_left_by(out: str) -> list[str]:
    """Return the groups of the process that printed its directory first."""
    pid = os.path.basename(out.split()[0]).split("-")[1]
    return sorted(groups_of(int(pid))) if HOME else []
