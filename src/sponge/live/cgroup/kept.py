"""Files of control groups that are kept open: a quota is then written and read back in microseconds.

A descriptor is a number, and something else in the process may close it (a library that turns the process into a
daemon closes them all); the number may then stand for a file of the user's. So before it is written to it is seen
whether it holds what was last written, and if not, and before it is closed, whose it is. A read does no harm: what it
brings is compared with what was written.

Reading and writing keep the interpreter's lock. They take a microsecond or two, but whoever gives the lock away in a
process that is busy may wait milliseconds until it is his again, and here the engine would wait with him.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
from typing import Any

from sponge.errors import CpuControlError

_MOST_BYTES = 64


@functools.cache
def _libc() -> Any:
    """Return the C library, for calls that keep the interpreter's lock."""
    libc = ctypes.PyDLL(None)
    for call in (libc.pread, libc.pwrite):
        # An ``off_t`` is a long under these names.
        call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
        call.restype = ctypes.c_ssize_t
    return libc


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
        self._pread, self._pwrite = _libc().pread, _libc().pwrite
        self._buffer = ctypes.create_string_buffer(_MOST_BYTES)
        self._written: bytes | None = None

    def read(self) -> bytes:
        """Return its contents, without the newline.

        Raises
        ------
        CpuControlError
            If that fails.
        """
        try:
            return self._read()
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
            if self._written is None or self._read() != self._written:
                self._require()
            if self._pwrite(self.descriptor, line, len(line), 0) != len(line):
                os.pwrite(self.descriptor, line, 0)  # says what is wrong
        except OSError as error:
            raise failure(self.path, line.decode(), error) from error
        self._written = line

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

    def _read(self) -> bytes:
        count = self._pread(self.descriptor, self._buffer, _MOST_BYTES, 0)
        if count < 0:
            return os.pread(self.descriptor, _MOST_BYTES, 0).rstrip()  # says what is wrong
        return self._buffer.raw[:count].rstrip()

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
