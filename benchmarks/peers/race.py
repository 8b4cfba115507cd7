"""The race against what people use today; one command.

    python benchmarks/peers/race.py [--peers NAME …] [--loads …] [--repeats …] [--duration-s …] [--json FILE] [--quick]

Makes the environments (at first use, from ``requirements-*.txt``) and goes on inside sponge's, in `contest.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import environments


def main() -> None:
    """Continue in the environment that has what the race itself needs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path, default=environments.FOLDER)
    folder = parser.parse_known_args()[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    python = environments.make(folder, "sponge")
    path = os.pathsep.join([str(environments.HERE), str(environments.SOURCE)])
    contest = str(environments.HERE / "contest.py")
    os.execve(python, [str(python), contest, *sys.argv[1:]], os.environ | {"PYTHONPATH": path})


if __name__ == "__main__":
    main()
