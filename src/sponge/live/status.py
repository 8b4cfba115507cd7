"""What ``sponge top`` reads: a scheduler's state on a Unix socket that only its owner can open.

Rules, and why they hold:

* It is opened only when asked for, in a directory of the user's own, as a file that nobody else may open; whoever
  connects is asked by the kernel who it is, too. Nothing is told but numbers and names: no inputs, no results.
* Whoever connects gets one line of JSON and the end of the stream. There is nothing to parse on our side.
* The thread refers to the scheduler weakly, so that one that nobody holds any more can end.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

import sponge
from sponge.errors import SpongeError
from sponge.live.cache import directory_problem
from sponge.live.recorder import RunRecorder
from sponge.measure import Ending, Recording

if TYPE_CHECKING:
    from sponge.live.observed import Observed

_log = logging.getLogger("sponge")

RECENT = 1000
"""Requests of which distributions are told."""
_SEND_TIMEOUT_S = 2.0
_LONGEST_PATH = 107
_numbers = itertools.count()
_open: weakref.WeakSet[StatusServer] = weakref.WeakSet()


def runtime_directory() -> Path:
    """Return the folder ``sponge`` in ``$XDG_RUNTIME_DIR``, or one of the user's own in the temporary directory."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_absolute() and Path(base).is_dir():
        return Path(base) / "sponge"
    return Path(tempfile.gettempdir()) / f"sponge-{os.getuid()}"


def is_served(path: Path) -> bool:
    """Tell whether somebody listens on a socket; one that a killed process left behind is not served."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_SEND_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # busy, or not ours
            return True
    return True


class StatusServer:
    """Serves a scheduler's status until it is closed.

    Parameters
    ----------
    scheduler
        Not kept alive.
    path
        Of the socket; by default one with the process's id in `runtime_directory`.

    Raises
    ------
    OSError
        If the directory is not safe to use, the path is taken or too long, or no socket can be made there.
    """

    def __init__(self, scheduler: Observed, path: str | os.PathLike[str] | None = None) -> None:
        self.path = _default_path() if path is None else Path(path).absolute()
        self._scheduler = weakref.ref(scheduler)
        self._pid = os.getpid()
        self._since = time.monotonic()
        self._recent = RunRecorder(RECENT)
        self._closed = threading.Lock()
        self._socket = _listen(self.path)
        self._inode = self.path.stat().st_ino
        self._stop: Callable[[], None] = scheduler.observe(self._recent)
        self._thread = threading.Thread(target=self._serve, name=f"{scheduler.name}-status", daemon=True)
        self._thread.start()
        _open.add(self)

    def close(self) -> None:
        """Close and remove the socket; again, or in a forked child, it does nothing."""
        if os.getpid() != self._pid or not self._closed.acquire(blocking=False):
            return
        self._stop()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        with self._socket:
            while True:
                try:
                    connection, _ = self._socket.accept()
                except OSError as error:
                    if self._closed.locked() or error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                        return
                    time.sleep(0.1)  # out of descriptors: somebody will close one
                    continue
                try:
                    with connection:
                        self._answer(connection)
                except OSError:  # the other side has gone
                    pass
                except Exception:
                    _log.exception("the status could not be told")

    def _answer(self, connection: socket.socket) -> None:
        if _peer(connection) not in (0, os.getuid()):
            return
        scheduler = self._scheduler()
        if scheduler is None:
            return
        try:
            status = snapshot(scheduler, self._recent, self._since)
        except SpongeError:
            return
        connection.settimeout(_SEND_TIMEOUT_S)
        connection.sendall(json.dumps(status, allow_nan=False).encode() + b"\n")


def snapshot(scheduler: Observed, recent: RunRecorder, since: float) -> dict[str, Any]:
    """Return what is told, as JSON types; what there is not becomes None."""
    found, now = scheduler.statistics(), scheduler.now()
    run = recent.recording(scheduler.name, now, fastest_s=scheduler.fastest_s(), facts={})
    status = {
        "version": sponge.__version__,
        "pid": os.getpid(),
        "name": scheduler.name,
        "command": " ".join(sys.argv)[:200],
        "now": now,
        "watched_s": time.monotonic() - since,
        "statistics": attrs.asdict(found),
        "condition": scheduler.condition(),
        "max_lanes": scheduler.controller.max_lanes,
        "max_batch_size": scheduler.controller.max_batch_size,
        "fastest_s": run.fastest_s,
        "recent": _recent(run),
    }
    return _plain(status)  # type: ignore[no-any-return]


def _recent(run: Recording) -> dict[str, Any]:
    return {
        "requests": len(run),
        "met": run.count(Ending.MET),
        "missed": int(np.count_nonzero(run.missed)),
        "budget_s": _spread(run.budget_s),
        "queue_delay_s": _spread(run.queue_delay_s),
        "response_s": _spread(run.response_s),
        "batch_rows": _spread(run.batch_rows),
        "measured_over_predicted": _spread(run.batch_s / run.batch_expected_s),
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float] | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    percentiles = np.percentile(known, [1, 50, 95, 99]).tolist()
    return dict(zip(("p1", "p50", "p95", "p99"), percentiles, strict=True))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _default_path() -> Path:
    directory = runtime_directory()
    problem = directory_problem(directory)
    if problem:
        raise PermissionError(errno.EACCES, f"the status cannot be served from here, {problem}", str(directory))
    for left in directory.glob("*.sock"):
        if not is_served(left):
            left.unlink(missing_ok=True)
    return directory / f"{os.getpid()}-{next(_numbers)}.sock"


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {_LONGEST_PATH} bytes", str(path))
    if path.is_socket():
        if is_served(path):
            raise FileExistsError(errno.EADDRINUSE, "another process serves its status there", str(path))
        path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before it has a name: at no instant may anybody else open it.
        os.fchmod(listening.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        listening.bind(str(path))
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        listening.listen(8)
    except BaseException:
        listening.close()
        raise
    return listening


def _peer(connection: socket.socket) -> int:
    """Return the user id of whoever connected, or our own where the kernel does not tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return os.getuid()
    credentials = struct.Struct("3i")
    _, user_id, _ = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, option, credentials.size))
    return int(user_id)


def _close_copies() -> None:
    """In a forked child: close what nobody there answers on, or it would seem served when the parent has ended."""
    for server in list(_open):
        server._socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
