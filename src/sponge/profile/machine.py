"""What a profile depends on besides the model: the CPU and the packages that run it."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
from importlib import metadata


def machine_fingerprint() -> dict[str, str]:
    """Return what the speed of a model depends on: architecture, CPU model, instruction sets, number of CPUs.

    It names the kind of machine, not the machine: a profile moves between equal nodes of a cluster, and tells
    nobody whose they are.
    """
    facts = {"architecture": platform.machine(), "cpus": str(os.cpu_count() or 0)}
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                found.setdefault(name.strip(), value.strip())
    except OSError:  # not on Linux
        found["model name"] = platform.processor()
    facts["cpu"] = (found.get("model name") or found.get("CPU part") or "unknown")[:200]
    flags = " ".join(sorted((found.get("flags") or found.get("Features") or "").split()))
    facts["instruction_sets"] = hashlib.sha256(flags.encode()).hexdigest()[:16]
    return facts


def package_versions() -> dict[str, str]:
    """Return the versions of what runs a model here: sponge, ONNX Runtime, NumPy and Python."""
    versions = {"python": platform.python_version()}
    for name, package in (("sponge", "sponge-serving"), ("onnxruntime", "onnxruntime"), ("numpy", "numpy")):
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:  # another distribution of the same package, such as a GPU build
            module = importlib.import_module(name)
            versions[name] = str(getattr(module, "__version__", "unknown"))
    return versions
