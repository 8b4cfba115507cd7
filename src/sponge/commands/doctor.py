"""``sponge doctor``: what this machine allows, and what is installed."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import attrs

import sponge
from sponge.live.cgroup.probe import Probe, probe

REQUIRED = ("numpy", "attrs", "onnxruntime", "cvxpy", "pyscipopt", "cgroupspy")
OPTIONAL = ("typer", "rich", "matplotlib", "rapidocr" if sys.version_info >= (3, 13) else "rapidocr-onnxruntime")


@attrs.frozen(kw_only=True)
class Findings:
    """What `examine` found."""

    cpu_control: Probe
    packages: dict[str, str | None]
    """Installed version by distribution name; None if it is not installed."""
    python: str
    platform: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "sponge": sponge.__version__,
            "python": self.python,
            "platform": self.platform,
            "packages": self.packages,
            "cpu_control": self.cpu_control.to_dict(),
        }


def examine() -> Findings:
    """Look at this machine; the attempt to set a quota leaves nothing behind. Imports none of the packages."""
    return Findings(
        cpu_control=probe(),
        packages={name: _installed_version(name) for name in (*REQUIRED, *OPTIONAL)},
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    )


def explain(findings: Findings) -> str:
    """Return the findings in plain words."""
    width = max(map(len, findings.packages))
    lines = [f"sponge {sponge.__version__}, Python {findings.python} ({sys.executable}), {findings.platform}", ""]
    for name, version in findings.packages.items():
        mark = "ok" if version else "--"
        missing = "missing: sponge cannot run without it" if name in REQUIRED else "not installed (an extra)"
        lines.append(f"{mark}  {name:<{width}}  {version or missing}")
    return "\n".join([*lines, "", findings.cpu_control.explain()])


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
