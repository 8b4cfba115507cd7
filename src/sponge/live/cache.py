"""The private directory on disk where things that are costly to make are kept between runs.

Everything is written under a temporary name and renamed, so that a reader meets a complete entry or none, and of two
processes that write the same entry the second finds it done. What is read back is loaded into the process, so
directories that other users may write to, or put others into the place of, are not trusted, nor is anything in them
that is a link, has a second name elsewhere, or is not this user's.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import attrs

ENVIRONMENT_VARIABLE = "SPONGE_CACHE_DIR"


@attrs.frozen(kw_only=True)
class CacheDirectory:
    """A directory that only this user can write to."""

    path: Path
    note: str = ""
    """Why this is not the directory that was asked for; empty if it is."""
    owner: tempfile.TemporaryDirectory[str] | None = None
    """Removes a temporary directory when it is garbage collected."""

    def close(self) -> None:
        """Remove the directory if it was a temporary one."""
        if self.owner is not None:
            self.owner.cleanup()

    def leave_to_parent(self) -> None:
        """In a forked child: leave a temporary directory to the parent, which still uses it."""
        if self.owner is not None:
            self.owner._finalizer.detach()  # type: ignore[attr-defined]


def default_cache_path() -> Path:
    """Return ``$SPONGE_CACHE_DIR``, or the folder ``sponge`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if configured := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification of base directories has relative paths ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "sponge"


def open_cache(cache_dir: str | os.PathLike[str] | None = None) -> CacheDirectory:
    """Return the cache directory, made if need be with access for this user alone.

    Where that is not possible (read-only file system, no home, a directory that others may write to), a temporary
    directory stands in for the life of the process and the note says why.
    """
    try:
        path = Path(cache_dir) if cache_dir is not None else default_cache_path()
        problem = directory_problem(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        path, problem = Path(cache_dir or "~/.cache/sponge"), str(error)
    if not problem:
        return CacheDirectory(path=path.resolve())
    temporary = tempfile.TemporaryDirectory(prefix="sponge-")
    note = (
        f"the cache directory {path} cannot be used ({problem}): a temporary one serves this process only; "
        f"name another in {ENVIRONMENT_VARIABLE} or cache_dir"
    )
    return CacheDirectory(path=Path(temporary.name), note=note, owner=temporary)


def why_not_trusted(path: Path) -> str:
    """Return why a file or folder of the cache is not taken for ours, or an empty string.

    Raises
    ------
    OSError
        If it is not there.
    """
    status = path.lstat()
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        return f"{path.name} is a link or a special file"
    if stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
        return f"{path.name} has another name elsewhere"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return ""


def directory_problem(path: Path) -> str:
    """Make *path* and return why it cannot serve, or an empty string."""
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        return f"it is a link made by user {path.lstat().st_uid}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve()
    if problem := why_not_trusted(path) or _exposed(path):
        return problem
    if not os.access(path, os.W_OK | os.X_OK):
        return "it is not writable"
    return ""


def _exposed(path: Path) -> str:
    """Return who could put another directory into the place of *path*, or an empty string."""
    for above in path.parents:
        status = above.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{above} belongs to user {status.st_uid}, who may exchange it"
        # Where the sticky bit is set, as in /tmp, only the owner of an entry may rename it.
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"all users may write to {above}, and exchange it"
    return ""
