"""Files as data: read within bounds, written whole.

* What is read may come from anywhere. It must be a regular file (a pipe would block, a device never end), and no more
  than a limit of it is read.
* What is written is there in full or not at all, readable by this user only, and never through a link that somebody
  has put in its place: it is written beside, under a name that is new, and moved.
"""

from __future__ import annotations

import os
import stat
import tempfile
from typing import BinaryIO


def open_data(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, without waiting for anybody.

    Raises
    ------
    ValueError
        If it is no regular file.
    OSError
        If it cannot be opened.
    """
    # Looked at once it is open: between a look at the name and the opening it could be exchanged.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_data(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return the contents of a regular file of at most *most_bytes*.

    Raises
    ------
    ValueError
        If it is no regular file, or larger.
    OSError
        If it cannot be read.
    """
    with open_data(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return content


def write_data(path: str | os.PathLike[str], content: bytes) -> None:
    """Put a file of this content, for this user only, into the place of whatever has that name.

    Raises
    ------
    OSError
        If it cannot be written; what was there stays.
    """
    target = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(target)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".sponge-")  # mode 0600, and never an existing file
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
