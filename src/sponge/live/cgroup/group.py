"""What cgroup v1 and v2 have in common: a child group, its quota written through a kept descriptor.

Rules
-----
- Set-up may be slow; `QuotaGroup.write_quota` is on the serving path: a ``pwrite`` and ``pread``s of kept
  descriptors, each about a microsecond, so every value is read back.
- Every failure surfaces as `CpuControlError` (a value did not take) or `OSError` (set-up; the caller explains
  it). Nothing fails silently.
- Creation and removal happen under a lock on the parent directory, since several processes may share the
  parent (version 2 has a switch there that the last user turns back), and each group is locked by its owner
  as long as the owner lives, so that nobody takes a fresh, still empty group for a leftover.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import ClassVar

import attrs

from sponge.errors import CpuControlError
from sponge.live.cgroup.hierarchy import OWN_NAME
from sponge.live.cgroup.kept import KeptFile

MIN_QUOTA_US = 1_000
"""The kernel refuses quotas (and periods) below one millisecond."""
MAX_PERIOD_US = 1_000_000


@attrs.frozen(kw_only=True)
class QuotaStatistics:
    """Snapshot of what the kernel counted for the group since it was made."""

    nr_periods: int
    """Enforcement periods in which the group had something to run."""
    nr_throttled: int
    """Periods in which it used up its quota and was stopped."""
    throttled_s: float
    """Time for which its run queues were stopped [s], summed over CPUs."""


class QuotaGroup(abc.ABC):
    """A child group of ours with a CPU quota; subclasses know the files of one cgroup version."""

    how: ClassVar[str]
    quota_file: ClassVar[str]
    threads_file: ClassVar[str]
    burst_file: ClassVar[str]
    limit_files: ClassVar[tuple[str, ...]]

    def __init__(self, parent: str, name: str, *, period_us: int) -> None:
        """Make the group; its quota is unlimited at first.

        Raises
        ------
        OSError
            If the kernel or the permissions do not allow it; nothing is left behind.
        ValueError
            If *name* is not of our form: it must not lead elsewhere.
        """
        if not is_ours(name):
            raise ValueError(f"name must be of the form sponge-<pid>-<start time>-<n>, not {name!r}")
        self.parent = parent
        self.name = name
        self.directory = os.path.join(parent, name)
        self.period_us = period_us
        self.quota_path = os.path.join(self.directory, self.quota_file)
        self.burst_us = 0
        self.switches_back = False
        """Whether something in the parent is to be undone when the last of us leaves."""
        self._kept: list[KeptFile] = []
        self._written = b""
        with directory_lock(parent):
            try:
                self._make()
                self._set_period()
                self._quota = self._open(self.quota_path, os.O_RDWR)
                self._open_more()
                own = self._open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(own.descriptor, fcntl.LOCK_SH)
            except BaseException:
                try:
                    self._discard()
                finally:
                    self._close()
                raise
        self._ceiling = Ceiling(type(self), parent)

    # --- what the versions differ in ---

    @abc.abstractmethod
    def _make(self) -> None:
        """Create the directory and whatever makes it a group that takes threads and a quota."""

    @abc.abstractmethod
    def _set_period(self) -> None:
        """Write the enforcement period."""

    def _open_more(self) -> None:  # noqa: B027 - version 2 has it all in one file
        """Open what else is needed while serving."""

    def _restore_parent(self) -> None:  # noqa: B027 - version 1 has nothing to undo
        """Undo what `_make` changed in the parent; called under the parent's lock, with the group gone."""

    @abc.abstractmethod
    def _line(self, quota_us: int | None) -> bytes:
        """Return what the quota file holds when *quota_us* is in force, without the newline."""

    @staticmethod
    @abc.abstractmethod
    def limit_cores(texts: list[bytes]) -> float:
        """Return the quota [cores] that the contents of a group's `limit_files` say; ``inf`` for none."""

    @abc.abstractmethod
    def statistics(self) -> QuotaStatistics:
        """Return the kernel's counts of this group."""

    # --- the serving path ---

    def write_quota(self, quota_us: int | None) -> None:
        """Put a quota in force and read it back.

        Parameters
        ----------
        quota_us
            CPU time per period [µs], >= 1_000; ``None`` for no limit.

        Raises
        ------
        CpuControlError
            If the kernel refuses the value, the group is gone, or another value is found in force afterwards.
        """
        line = self._line(quota_us)
        self._write(line)
        self._written = line
        QuotaGroup.check(self)  # the rest of what a version checks is not written here

    def _write(self, line: bytes) -> None:
        self._quota.write(line)

    def check(self) -> None:
        """Raise `CpuControlError` if another value than the last written one is in force."""
        found = self._quota.read()
        if found != self._written:
            raise self._foreign(self._quota, self._written, found)

    def _foreign(self, file: KeptFile, wanted: bytes, found: bytes) -> CpuControlError:
        """Return the error for a value that we did not write; raises if it was read from something else."""
        file.check()
        reason = f"{found.decode(errors='replace')!r} is in force: something else wrote it"
        return CpuControlError(file.path, wanted.decode(), reason, left_cores=self.cores())

    @abc.abstractmethod
    def cores(self) -> float:
        """Return the quota in force [cores], read now; ``inf`` for none."""

    def ceiling_cores(self) -> float:
        """Return the smallest quota of the groups above [cores], read now; ``inf`` if none is limited."""
        return self._ceiling.cores()

    # --- threads ---

    def add_thread(self, thread_id: int) -> None:
        """Move one thread into the group (about 50 µs, at times milliseconds).

        Raises
        ------
        OSError
            ``ESRCH`` if the thread has ended, ``EACCES``/``EPERM`` if it may not be moved.
        """
        self.move_thread(thread_id, self.directory)

    @classmethod
    def move_thread(cls, thread_id: int, directory: str) -> None:
        """Move one thread into any group of the same hierarchy; raises as `add_thread`."""
        with open(os.path.join(directory, cls.threads_file), "w") as file:
            file.write(str(thread_id))

    def thread_ids(self) -> list[int]:
        """Return the native ids of the threads that are in the group now."""
        with open(os.path.join(self.directory, self.threads_file)) as file:
            return [int(line) for line in file.read().split()]

    # --- set-up and removal ---

    def set_burst(self, burst_us: int) -> None:
        """Let unused quota of earlier periods be used later, up to *burst_us* [µs].

        Kernels before 5.14 cannot.
        """
        try:
            with open(os.path.join(self.directory, self.burst_file), "w") as file:
                file.write(str(burst_us))
        except FileNotFoundError:
            return
        self.burst_us = burst_us

    def remove(self) -> None:
        """Remove the empty group.

        Raises
        ------
        OSError
            ``EBUSY`` if threads are still in it after some milliseconds (one that ends leaves a moment later);
            the group is usable then.
        """
        with directory_lock(self.parent):
            self._discard()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the kept files; the group itself stays."""
        self._ceiling.close()
        self._close()

    def _discard(self) -> None:
        for attempt in range(20):
            if not os.path.isdir(self.directory):
                break
            try:
                os.rmdir(self.directory)
            except OSError:
                if attempt == 19:
                    raise
                time.sleep(0.001)
        self._restore_parent()

    def _open(self, path: str, flags: int) -> KeptFile:
        file = KeptFile(path, flags)
        self._kept.append(file)
        return file

    def _close(self) -> None:
        while self._kept:
            self._kept.pop().close()


class Ceiling:
    """The quotas of the groups above ours: the smallest is the most that our own quota can give.

    Their files are kept open, since a container's quota may be changed while it runs (Kubernetes' in-place
    resize).
    """

    def __init__(self, group: type[QuotaGroup], parent: str) -> None:
        """Find the groups from *parent* up to the top of what is mounted that can have a quota."""
        self._group = group
        self._files: list[list[KeptFile]] = []
        directory = parent
        while os.path.exists(os.path.join(directory, "cgroup.procs")):
            # The root of the tree has no quota, nor has a group for which the controller is off. One that we
            # may not read cannot be taken into account: the kernel still enforces it.
            with contextlib.suppress(OSError):
                self._files.append(self._open(directory))
            directory = os.path.dirname(directory)

    def _open(self, directory: str) -> list[KeptFile]:
        return [KeptFile(os.path.join(directory, name), os.O_RDONLY) for name in self._group.limit_files]

    def cores(self) -> float:
        """Return the smallest of the quotas [cores], read now; ``inf`` if none is set."""
        lowest = float("inf")
        for files in self._files:
            texts = [file.read() for file in files]
            try:
                lowest = min(lowest, self._group.limit_cores(texts))
            except ValueError as error:  # another file by now: the next write of ours finds that out
                raise CpuControlError(files[0].path, "?", f"no quota is read there, but {texts!r}") from error
        return lowest

    def close(self) -> None:
        """Close the files."""
        while self._files:
            for file in self._files.pop():
                file.close()


@contextlib.contextmanager
def directory_lock(directory: str) -> Iterator[None]:
    """Hold the lock that sponge processes share on a parent group while they add or remove children.

    It is waited for one second at most: a stopped process must not stop others, and the worst that happens
    without it is a quota that another process finds gone and reports.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(200):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.005)
            else:
                break
        yield
    finally:
        os.close(descriptor)


def child_groups(directory: str) -> list[str]:
    """Return the names of the groups directly below a group."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def is_ours(name: str) -> bool:
    """Tell whether a group's name has the form that sponge gives."""
    return OWN_NAME.match(name) is not None
