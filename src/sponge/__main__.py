"""``python -m sponge``: the command line."""

from sponge.cli import main

if __name__ == "__main__":
    main()
