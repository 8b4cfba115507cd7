"""`CgroupScaler` on the real kernel: what is written is in force, for the adopted threads only, and given back."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sponge import CgroupScaler, CgroupUnavailable, CpuControlError
from sponge.live.cgroup.v1 import V1Group
from sponge.live.cgroup.v2 import V2Group
from tests.live.cgroup_here import (
    HOME,
    PROBE,
    THREADS_FILE,
    burners,
    group_above,
    groups_of,
    native_ids,
    needs_quota,
    needs_root,
    quota_in_force,
    read_if_there,
    remove_group,
    run_python,
    threads_in,
    write_quota,
)

pytestmark = needs_quota


@pytest.fixture
def scaler() -> Iterator[CgroupScaler]:
    """Give a scaler with default settings, and look afterwards that nothing of it is left."""
    before = groups_of(os.getpid())
    with CgroupScaler() as one:
        yield one
    assert groups_of(os.getpid()) == before


# --- the value ---


def test_nothing_is_limited_before_the_first_scale(scaler: CgroupScaler) -> None:
    """Profiling and warm-up must run at full speed until somebody decides."""
    assert scaler.cores == math.inf
    assert quota_in_force(scaler.directory) is None


@pytest.mark.parametrize(("cores", "quota_us"), [(0.25, 2_500), (0.5, 5_000), (1.5, 15_000), (1.99, 19_900)])
def test_fractional_share_is_written_exactly(scaler: CgroupScaler, cores: float, quota_us: int) -> None:
    """A fraction is meant as a limit: no headroom on top."""
    assert scaler.scale(cores) == cores == scaler.cores
    assert quota_in_force(scaler.directory) == quota_us


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_whole_share_gets_headroom(scaler: CgroupScaler, cores: int) -> None:
    """With as many threads as cores, a quota of just as much throttles them now and then."""
    assert scaler.scale(cores) == cores
    assert quota_in_force(scaler.directory) == round((cores + 0.2) * 10_000)


def test_headroom_and_period_are_settings() -> None:
    """Both are trade-offs that a user may see differently."""
    with CgroupScaler(period_us=50_000, headroom_cores=0.0) as scaler:
        scaler.scale(1)
        assert quota_in_force(scaler.directory) == 50_000
        scaler.scale(0.02)
        assert quota_in_force(scaler.directory) == 1_000


def test_too_small_a_share_is_raised_to_the_kernels_minimum(scaler: CgroupScaler) -> None:
    """The kernel takes no quota below a millisecond; the caller is told what is in force instead."""
    assert scaler.scale(0.001) == pytest.approx(0.1)
    assert quota_in_force(scaler.directory) == 1_000
    with CgroupScaler(min_cores=0.5) as other:
        assert other.scale(0.1) == 0.5


def test_infinity_lifts_the_limit(scaler: CgroupScaler) -> None:
    """The way back to where it began."""
    scaler.scale(0.5)
    assert scaler.scale(math.inf) == math.inf
    assert quota_in_force(scaler.directory) is None


@pytest.mark.parametrize("cores", [0, -1, math.nan])
def test_share_must_be_positive(scaler: CgroupScaler, cores: float) -> None:
    """A mistake in the caller's arithmetic must not stop the service."""
    with pytest.raises(ValueError, match="cores must be"):
        scaler.scale(cores)


@pytest.mark.parametrize(
    "arguments",
    [
        {"period_us": 999},
        {"period_us": 2_000_000},
        {"headroom_cores": -0.1},
        {"min_cores": 0.01},
        {"min_cores": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    """The message names the argument and its value."""
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        CgroupScaler(**arguments)  # type: ignore[arg-type]


def test_value_changed_by_somebody_else_is_reported_once_and_then_repaired(scaler: CgroupScaler) -> None:
    """Two masters of one quota is a fault of the set-up: to be known, not to be papered over or to stop the service."""
    scaler.scale(1)
    write_quota(scaler.directory, 3_000)
    with pytest.raises(CpuControlError, match="something else wrote it") as caught:
        scaler.scale(1)
    assert caught.value.path.startswith(scaler.directory)
    assert quota_in_force(scaler.directory) == 3_000, "an unchanged share is not written"
    assert scaler.scale(1) == 1
    assert quota_in_force(scaler.directory) == 12_000


def test_quota_above_is_the_most_that_can_be_had_and_may_change() -> None:
    """A container's own limit, which Kubernetes changes in place; version 1 would refuse a larger quota below it."""
    with group_above(5_000) as parent, CgroupScaler(path=parent) as scaler:
        assert scaler.scale(2) == 0.5
        assert scaler.scale(0.25) == 0.25
        write_quota(parent, 10_000)
        assert scaler.scale(2) == 1.0
        write_quota(parent, 20_000)
        assert scaler.scale(2) == 2.0, "asked for again, it is looked at again"


@pytest.mark.skipif(PROBE.cgroup_version != 2, reason="version 1 refuses a quota below that of a group inside")
def test_quota_above_that_falls_below_ours_is_what_is_in_force() -> None:
    """An in-place resize of the container while we serve."""
    with group_above(20_000) as parent, CgroupScaler(path=parent) as scaler:
        assert scaler.scale(2) == 2
        write_quota(parent, 5_000)
        assert scaler.scale(2) == 0.5
        write_quota(parent, 20_000)
        assert scaler.scale(2) == 2


@pytest.mark.skipif(PROBE.cgroup_version != 1, reason="version 2 allows it")
def test_version_1_refuses_a_quota_above_that_is_below_ours() -> None:
    """What docs/cpu-control.md says of resizing a pod."""
    with group_above(30_000) as parent, CgroupScaler(path=parent) as scaler:
        assert scaler.scale(2) == 2
        with pytest.raises(OSError, match="Invalid argument"):
            write_quota(parent, 5_000)
        assert scaler.scale(2) == 2


# --- the threads ---


def test_exactly_the_adopted_threads_are_in_the_group(scaler: CgroupScaler) -> None:
    """The service's own threads must not wait for the model's quota."""
    with burners(3) as threads:
        first, second, third = native_ids(threads)
        scaler.adopt([first, second])
        assert threads_in(scaler.directory) == {first, second}
        scaler.adopt([second, third])
        assert threads_in(scaler.directory) == {second, third} == set(scaler.thread_ids())
        assert {first, threading.get_native_id()} <= threads_in(HOME)


def test_thread_of_another_process_is_refused(scaler: CgroupScaler) -> None:
    """Root could limit anybody's thread by a mistaken id."""
    with pytest.raises(ValueError, match="thread_ids"):
        scaler.adopt([os.getppid()])


@pytest.mark.parametrize("thread_id", [0, -1, "1", 1.5, None])
def test_thread_id_that_is_none_is_refused(scaler: CgroupScaler, thread_id: Any) -> None:
    """Written to the kernel's file, a 0 would move the thread that asks."""
    with pytest.raises(ValueError, match="thread_ids"):
        scaler.adopt([thread_id])
    assert scaler.thread_ids() == []


def test_thread_that_has_ended_is_passed_over(scaler: CgroupScaler) -> None:
    """A session may be closed between the listing of its workers and the move."""
    with burners(1) as threads:
        (ended,) = native_ids(threads)
    while os.path.exists(f"/proc/self/task/{ended}"):  # join() returns a moment before the kernel is done with it
        time.sleep(0.001)
    scaler.adopt([ended])
    assert scaler.thread_ids() == []


def test_thread_started_by_an_adopted_one_is_limited_with_it_until_the_next_adopt(scaler: CgroupScaler) -> None:
    """So ONNX Runtime's workers need not be searched for, and yet `adopt` says who is limited."""
    begin, started, end = threading.Event(), threading.Event(), threading.Event()
    inner = threading.Thread(target=end.wait)

    def start_inner() -> None:
        begin.wait()
        inner.start()
        started.set()
        end.wait()

    outer = threading.Thread(target=start_inner)
    outer.start()
    assert outer.native_id is not None
    scaler.adopt([outer.native_id])
    begin.set()
    started.wait()
    assert set(scaler.thread_ids()) == {outer.native_id, inner.native_id}
    scaler.adopt([outer.native_id])
    assert scaler.thread_ids() == [outer.native_id]
    end.set()
    outer.join()
    inner.join()


def test_adopted_threads_are_held_to_the_quota_and_others_are_not(scaler: CgroupScaler) -> None:
    """The point of it all. CPU time used per time passed, with wide bounds: other work shares this machine."""
    with burners(3) as threads:
        limited, free = threads[:2], threads[2]
        scaler.scale(0.3)
        scaler.adopt(native_ids(limited))
        time.sleep(0.05)  # the periods before the move are over
        begin, used, used_free = time.monotonic(), sum(one.cpu_s() for one in limited), free.cpu_s()
        while (passed := time.monotonic() - begin) < 0.6:
            time.sleep(0.05)
        share = (sum(one.cpu_s() for one in limited) - used) / passed
        share_free = (free.cpu_s() - used_free) / passed
        counts = scaler.statistics()
    assert share < 0.5, "two computing threads under 0.3 cores; unlimited they use 1 to 2"
    assert share_free > share / 2, "one free thread gets more than either limited one"
    assert counts.nr_throttled > 0
    assert counts.nr_periods >= counts.nr_throttled
    assert scaler.throttled_s() > 0


def test_two_scalers_do_not_know_each_other() -> None:
    """Two schedulers in one process each limit their own threads."""
    with burners(2) as threads, CgroupScaler() as one:
        first, second = native_ids(threads)
        one.adopt([first])
        one.scale(1)
        with CgroupScaler() as other:
            other.adopt([second])
            other.scale(0.5)
            assert (quota_in_force(one.directory), quota_in_force(other.directory)) == (12_000, 5_000)
        assert threads_in(one.directory) == {first}
        assert second in threads_in(HOME)
        assert quota_in_force(one.directory) == 12_000


def test_scaler_made_by_an_adopted_main_thread_is_a_sibling() -> None:
    """Else the second would be limited by the first, and block its removal."""
    with CgroupScaler() as one:
        one.adopt([threading.get_native_id()])
        with CgroupScaler() as other:
            assert os.path.dirname(other.directory) == os.path.dirname(one.directory)
        assert threading.get_native_id() in one.thread_ids()
    assert threading.get_native_id() in threads_in(HOME)


# --- giving back ---


def test_close_sends_threads_home_removes_the_group_and_may_be_repeated() -> None:
    """After close the machine is as it was found."""
    switches = f"{HOME}/cgroup.subtree_control"
    before = read_if_there(switches)
    files = len(os.listdir("/proc/self/fd"))
    with burners(1) as threads:
        scaler = CgroupScaler()
        scaler.adopt(native_ids(threads))
        scaler.scale(0.5)
        scaler.close()
        scaler.close()
        assert not os.path.exists(scaler.directory)
        assert set(native_ids(threads)) <= threads_in(HOME)
    assert before == read_if_there(switches)
    assert files == len(os.listdir("/proc/self/fd"))
    for use in (lambda: scaler.scale(1), lambda: scaler.adopt([]), scaler.statistics, scaler.thread_ids):
        with pytest.raises(CpuControlError, match="closed"):
            use()


def test_exception_in_the_block_gives_back() -> None:
    """A failing service must not leave its threads limited."""
    with burners(1) as threads:
        scaler = CgroupScaler()
        scaler.adopt(native_ids(threads))
        with pytest.raises(ZeroDivisionError), scaler:
            scaler.scale(1 / 0)
        assert not os.path.exists(scaler.directory)
        assert set(native_ids(threads)) <= threads_in(HOME)


def test_garbage_collection_gives_back() -> None:
    """A scaler that was simply dropped."""
    with burners(1) as threads:
        scaler = CgroupScaler()
        directory = scaler.directory
        scaler.adopt(native_ids(threads))
        del scaler
        gc.collect()
        assert not os.path.exists(directory)
        assert set(native_ids(threads)) <= threads_in(HOME)


START = """
import threading
from sponge import CgroupScaler
scaler = CgroupScaler()
scaler.adopt([threading.get_native_id()])
scaler.scale(0.5)
print(scaler.directory, flush=True)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "import sys; sys.exit()"])
def test_interpreter_exit_gives_back(end: str) -> None:
    """Nobody called close."""
    directory = run_python(START + end)
    assert "sponge-" in directory
    assert not os.path.exists(directory)


def test_group_of_a_killed_process_is_removed_by_the_next_scaler() -> None:
    """SIGKILL leaves no time to tidy up; an empty group per crash would pile up."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + "import signal; signal.pause()"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    directory = process.stdout.readline().strip()
    with CgroupScaler():
        assert os.path.exists(directory), "the process lives: its group is not a leftover"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with CgroupScaler():
        assert not os.path.exists(directory)


def test_abandoned_name_that_somebody_still_holds_is_left_alone() -> None:
    """A process in another pid namespace has a number that means nothing here; its lock does."""
    name = f"sponge-4194304-{os.getpid()}-0"
    holder = f"""
import fcntl, os
os.mkdir({f"{HOME}/{name}"!r})
fcntl.flock(os.open({f"{HOME}/{name}"!r}, os.O_RDONLY), fcntl.LOCK_SH)
print("held", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with CgroupScaler():
        assert os.path.exists(f"{HOME}/{name}")
    process.communicate("\n")
    with CgroupScaler():
        assert not os.path.exists(f"{HOME}/{name}")


def test_group_removed_under_us_is_reported_once_and_made_again_with_its_threads(scaler: CgroupScaler) -> None:
    """An administrator, or a container runtime that tidies up. Close then removes the new group as it would the old."""
    with burners(1) as threads:
        scaler.adopt(native_ids(threads))
        scaler.scale(1)
        removed = remove_group(scaler.directory)
        with pytest.raises(CpuControlError) as caught:
            scaler.scale(0.5)
        assert caught.value.path.startswith(removed)
        assert caught.value.left_cores == math.inf
        assert scaler.cores == 1, "the last value that took"
        for look in (scaler.statistics, scaler.thread_ids):
            with pytest.raises(CpuControlError, match="No such"):
                look()
        assert scaler.scale(0.5) == 0.5
        assert scaler.directory != removed
        assert quota_in_force(scaler.directory) == 5_000
        assert scaler.burst_us == (1_000 if PROBE.burst else 0)
        assert threads_in(scaler.directory) == set(native_ids(threads)) == set(scaler.thread_ids())
    assert not os.path.exists(removed)


def test_close_of_a_scaler_whose_group_is_gone(scaler: CgroupScaler) -> None:
    """Nothing is left to give back, and that is fine."""
    remove_group(scaler.directory)


def test_adopting_after_the_group_was_removed_is_reported_once_too(scaler: CgroupScaler) -> None:
    """A lane that joins later finds it out first."""
    remove_group(scaler.directory)
    with burners(1) as threads:
        with pytest.raises(CpuControlError, match="No such file"):
            scaler.adopt(native_ids(threads))
        scaler.adopt(native_ids(threads))
        assert threads_in(scaler.directory) == set(native_ids(threads))


def test_closed_descriptors_are_not_written_to_and_are_opened_anew(tmp_path: Path) -> None:
    """Libraries that make a daemon close all descriptors: the number then stands for a file of the user's."""
    before = groups_of(os.getpid())
    scaler = CgroupScaler()
    scaler.scale(1)
    kept = [int(name) for name in os.listdir("/proc/self/fd") if _target(name).startswith(scaler.directory)]
    assert kept
    path = tmp_path / "database"
    path.write_bytes(b"precious")
    for descriptor in kept:
        os.close(descriptor)
    reused = [os.open(path, os.O_RDWR) for _ in kept]
    assert set(reused) & set(kept)
    with pytest.raises(CpuControlError, match="closed"):
        scaler.scale(0.5)
    assert scaler.scale(0.5) == 0.5
    assert quota_in_force(scaler.directory) == 5_000
    scaler.close()
    for descriptor in reused:
        os.close(descriptor)  # fails if it was closed as if it were ours
    assert path.read_bytes() == b"precious"
    assert groups_of(os.getpid()) == before


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


@pytest.mark.skipif(PROBE.cgroup_version != 1, reason="in version 2 the period stands beside the quota, see above")
def test_period_changed_by_somebody_else_is_reported_once_and_then_repaired(scaler: CgroupScaler) -> None:
    """The same quota in a period of ten times the length is a tenth of the share."""
    scaler.scale(0.5)
    with open(f"{scaler.directory}/cpu.cfs_period_us", "w") as file:
        file.write("100000")
    with pytest.raises(CpuControlError, match="something else wrote it") as caught:
        scaler.scale(0.5)
    assert caught.value.left_cores == 0.05
    assert scaler.scale(0.5) == 0.5
    with open(f"{scaler.directory}/cpu.cfs_period_us") as file:
        assert file.read() == "10000\n"
    assert quota_in_force(scaler.directory) == 5_000


def test_group_that_cannot_be_removed_is_left_without_a_limit() -> None:
    """Something else has put a group into ours: not ours to remove, but no thread may stay limited."""
    with burners(1) as threads:
        scaler = CgroupScaler()
        scaler.adopt(native_ids(threads))
        scaler.scale(0.5)
        os.mkdir(f"{scaler.directory}/foreign")
        scaler.close()
        assert quota_in_force(scaler.directory) is None
        assert set(native_ids(threads)) <= threads_in(HOME)
    with CgroupScaler():
        os.rmdir(f"{scaler.directory}/foreign")
        os.rmdir(scaler.directory)


def test_forked_child_neither_scales_nor_gives_back() -> None:
    """The group and its threads are the parent's; a pre-forking server must not take them away."""
    out = run_python(
        START
        + """
import os, sys
from sponge import CpuControlError
pid = os.fork()
if pid == 0:
    try:
        scaler.scale(0.7)
    except CpuControlError as error:
        assert "fork" in str(error)
        scaler.close()
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert os.path.exists(scaler.directory)
assert scaler.thread_ids() == [threading.get_native_id()]
assert scaler.scale(0.7) == 0.7
"""
    )
    assert not os.path.exists(out)


def test_child_forked_by_an_adopted_thread_goes_home_with_the_others() -> None:
    """It inherits the group; were it left there, the group could not be removed."""
    out = run_python(
        START
        + """
import os, signal
pid = os.fork()
if pid == 0:
    signal.pause()
assert pid in scaler.thread_ids()
scaler.close()
assert not os.path.exists(scaler.directory)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""
    )
    assert "sponge-" in out


# --- where it is not allowed ---


def test_path_that_is_not_a_group() -> None:
    """A mistaken path is explained, not a traceback from deep inside."""
    with pytest.raises(CgroupUnavailable, match="not a control group"):
        CgroupScaler(path="/tmp")


@pytest.mark.parametrize("name", ["..", "sponge-1-2-3/..", "/tmp/x", "a\nb", "sponge-1-2-3\n", "", "sponge-1-2-x"])
def test_name_of_a_group_leads_nowhere_else(name: str) -> None:
    """What is made, written to and removed is one directory of our form, in the group asked for."""
    kind = V1Group if PROBE.cgroup_version == 1 else V2Group
    before = os.listdir(HOME)
    with pytest.raises(ValueError, match="name must be"):
        kind(HOME, name, period_us=10_000)
    assert os.listdir(HOME) == before


def test_directory_with_the_files_of_a_group_is_none(tmp_path: Path) -> None:
    """Who can write to /tmp could else have threads listed, and quotas written, wherever links there lead."""
    for name in ("cgroup.controllers", "cgroup.procs", "cgroup.threads", "cpu.cfs_quota_us", "tasks"):
        (tmp_path / name).write_text("")
    with pytest.raises(CgroupUnavailable, match="not a control group"):
        CgroupScaler(path=tmp_path)
    assert sorted(os.listdir(tmp_path))[0] == "cgroup.controllers"


def test_link_to_a_group_is_followed_once(tmp_path: Path) -> None:
    """What it leads to later does not matter any more."""
    (tmp_path / "link").symlink_to(HOME)
    with CgroupScaler(path=tmp_path / "link") as scaler:
        assert os.path.dirname(scaler.directory) == os.path.realpath(HOME)
        (tmp_path / "link").unlink()
        assert scaler.scale(1) == 1
    assert not os.path.exists(scaler.directory)


@needs_root
def test_unprivileged_user_is_told_why_and_leaves_nothing() -> None:
    """The permissions are the kernel's own: a real process of another user tries."""
    out = run_python(
        """
import os, logging, sys
from sponge import CgroupScaler, CgroupUnavailable
from sponge.live.scalers import best_scaler
import sponge.live.cgroup.v1, sponge.live.cgroup.v2
os.setgroups([]); os.setgid(65534); os.setuid(65534)
logging.basicConfig(stream=sys.stdout)
try:
    CgroupScaler()
except CgroupUnavailable as error:
    assert "65534" in error.reason and error.advice, error
else:
    raise SystemExit("allowed")
assert best_scaler("auto").how == "threads"
print(CgroupScaler.probe().explain())
print(os.getpid())
"""
    )
    assert "WARNING:sponge.scalers:no CPU quota: user 65534 may not write" in out
    assert "not allowed: user 65534 may not write" in out
    assert "To allow a quota:" in out
    assert groups_of(int(out.split()[-1])) == set()


@needs_root
def test_read_only_mount_is_told_with_the_setting_that_helps() -> None:
    """What an ordinary container gets; the remedy is that of whoever started it."""
    mount = HOME if PROBE.cgroup_version == 1 else "/sys/fs/cgroup"
    shell = f'mount -o remount,bind,ro {mount} && exec "$@"'
    out = run_python(
        """
import os
os.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
from sponge import CgroupScaler
probe = CgroupScaler.probe()
assert not probe.quota_allowed
print(probe.reason, probe.advice)
""",
        prefix=("unshare", "-m", "sh", "-c", shell, "sh"),
    )
    assert "is mounted read-only" in out
    assert "cgroup_writable" in out


def _advice_on_a_read_only_mount(surroundings: str) -> tuple[str, str]:
    """Return the advice that a process gets in a group below a read-only mount, and whether it is read-only still.

    Only the marks by which a process tells its surroundings are made up (this machine has its own). Where the advice
    has a command for root, it is carried out.
    """
    with group_above(10_000) as directory:
        out = run_python(
            f"""
import os, re, subprocess, threading
from sponge import CgroupScaler
from sponge.live.cgroup import advice
advice.surroundings = lambda: advice.Surroundings.{surroundings}
mount = {directory!r}
while not os.path.ismount(mount):
    mount = os.path.dirname(mount)
with open({f"{directory}/{THREADS_FILE}"!r}, "w") as file:
    file.write(str(threading.get_native_id()))
subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
probe = CgroupScaler.probe()
assert "is mounted read-only" in probe.reason, probe
for command in re.findall("`(mount[^`]*)`", probe.advice):
    subprocess.run(command.split(), check=True)
print(probe.advice)
print(bool(os.statvfs({directory!r}).f_flag & os.ST_RDONLY))
""",
            prefix=("unshare", "-m"),
        )
    advice, read_only = out.splitlines()
    return advice, read_only


@needs_root
def test_remounting_as_advised_makes_the_group_writable() -> None:
    """It is the mount that can be remounted, not the group in it."""
    advice, read_only = _advice_on_a_read_only_mount("PLAIN")
    assert advice.startswith("As root: `mount ")
    assert read_only == "False"


@needs_root
def test_read_only_groups_of_a_hardened_unit_are_told() -> None:
    """systemd's ``ProtectControlGroups=yes`` wins over ``Delegate=yes``; Delegate is not what is missing."""
    advice, read_only = _advice_on_a_read_only_mount("SYSTEMD")
    assert "ProtectControlGroups=" in advice
    assert read_only == "False"


@needs_root
@pytest.mark.parametrize(("engine", "option"), [("DOCKER", "writable-cgroups"), ("PODMAN", "unmask=/sys/fs/cgroup")])
def test_a_container_has_another_remedy_for_each_cgroup_version(engine: str, option: str) -> None:
    """With version 1 the engines' options for a writable mount are of no use, or no boundary."""
    advice, _ = _advice_on_a_read_only_mount(engine)
    assert (option in advice) == (PROBE.cgroup_version == 2)
    assert "--privileged" in advice or PROBE.cgroup_version == 2
