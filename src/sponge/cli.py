"""The ``sponge`` command: says what to install if the packages for the command line are missing."""

from __future__ import annotations

import sys

_EXTRA_PACKAGES = frozenset({"typer", "rich", "click"})


def main() -> None:
    """Run the command line; exits with the command's status, or 2 if its packages are not installed."""
    try:
        from sponge.commands.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA_PACKAGES:
            raise
        print(
            f"sponge: the command line needs {error.name}, which is not installed: "
            'pip install "sponge-serving[cli]", or pip install typer rich',
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="sponge")
