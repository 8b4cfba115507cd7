"""Virtual environments, one for each contender, from pinned requirements; the standard library is all it needs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src"
FOLDER = Path("/tmp/peers")
_STAMP = "made-from.txt"


def say(text: str) -> None:
    """Show progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make(folder: Path, name: str) -> Path:
    """Make the environment *name* in *folder*, or leave the one made from the same requirements; return its Python.

    Raises
    ------
    subprocess.CalledProcessError
        If something cannot be installed.
    """
    requirements = HERE / f"requirements-{name}.txt"
    venv = folder / name
    python = venv / "bin" / "python"
    stamp = venv / _STAMP
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return python
    say(f"making {venv}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    stamp.write_text(requirements.read_text())
    return python
