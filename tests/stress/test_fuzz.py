"""Each fuzz target for a bounded time; see fuzz/fuzz.py for how to run one for longer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("SPONGE_FUZZ_SECONDS", "60"))


@pytest.mark.stress
@pytest.mark.parametrize("target", ["profile", "fields", "trace", "manifest", "request", "groups", "weights"])
def test_no_input_is_answered_by_another_exception_than_the_documented_one(target: str, tmp_path: Path) -> None:
    """Coverage-guided, from seeds that are read and some that are refused."""
    try:
        import atheris  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        warnings.warn(f"{target} was not fuzzed: there is no atheris here", stacklevel=1)
        pytest.skip("there is no atheris here")
    script = Path(__file__).parent / "fuzz" / "fuzz.py"
    command = [sys.executable, str(script), target, "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    print(done.stdout[-2_000:], done.stderr[-2_000:])
    assert done.returncode == 0
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) > 100
