"""The commands of ``sponge``, one module each; loaded by `sponge.cli` only."""
