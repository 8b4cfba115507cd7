"""Every example runs, and prints what is recorded beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_is_recorded(example: Path, tmp_path: Path) -> None:
    """Examples are what newcomers copy: one that no longer works is worse than none."""
    environment = {**os.environ, "SPONGE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(example)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == example.with_suffix(".out").read_text(encoding="utf-8")
