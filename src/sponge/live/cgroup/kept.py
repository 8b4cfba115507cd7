"""Files of control groups that are kept open: a quota is then written and read back in microseconds.

A descriptor is a number, and something else in the process may close it (a library that turns the process into a
daemon closes them all); the number may then stand for a file of the user's. So before it is written to or closed it is
looked at whose it is. A read does no harm: what it brings is compared with what was written.
"""

from __future__ import annotations

import errno
import math
import os

from sponge.errors import CpuControlError

_MOST_BYTES = 64


class KeptFile:
    """A file, or a directory, of a control group.

    Raises
    ------
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        self.descriptor = os.open(path, flags | os.O_CLOEXEC)
        self._identity = _identity(self.descriptor)

    def read(self) -> bytes:
        """Return its contents, without the newline.

        Raises
        ------
        CpuControlError
            If that fails.
        """
        try:
            return os.pread(self.descriptor, _MOST_BYTES, 0).rstrip()
        except OSError as error:
            raise failure(self.path, "?", error, "reading it back failed: ") from error

    def write(self, line: bytes) -> None:
        """Write a value.

        Raises
        ------
        CpuControlError
            If the kernel refuses it, or the group is gone.
        """
        try:
            self._require()
            os.pwrite(self.descriptor, line, 0)
        except OSError as error:
            raise failure(self.path, line.decode(), error) from error

    def check(self) -> None:
        """Raise `CpuControlError` if the descriptor stands for something else by now."""
        try:
            self._require()
        except OSError as error:
            raise failure(self.path, "?", error) from error

    def close(self) -> None:
        """Close it, if it is still ours."""
        try:
            self._require()
            os.close(self.descriptor)
        except OSError:
            pass

    def _require(self) -> None:
        if _identity(self.descriptor) != self._identity:
            raise OSError(errno.EBADF, "something else in this process has closed it")


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def failure(path: str, value: str, error: OSError, what: str = "") -> CpuControlError:
    """Return the error for a file that cannot be read or written.

    A group that is gone limits nothing any more: whoever removed it has moved its threads out before.
    """
    left_cores = math.inf if is_gone(error) and error.errno != errno.EBADF else None
    return CpuControlError(path, value, f"{what}{error.strerror}", left_cores=left_cores)


def is_gone(error: BaseException | None) -> bool:
    """Tell whether an error means that the group, or our way to it, is not there any more."""
    return isinstance(error, OSError) and error.errno in (errno.ENODEV, errno.ENOENT, errno.EBADF)
