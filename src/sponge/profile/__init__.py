"""What was measured of a model on a machine: the record, its file format, and how people look at it."""

from sponge.profile.machine import machine_fingerprint, package_versions
from sponge.profile.record import Cell, Expected, Profile

__all__ = ["Cell", "Expected", "Profile", "machine_fingerprint", "package_versions"]
