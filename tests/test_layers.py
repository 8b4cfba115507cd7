"""The structure of the package: who may import whom, and what a bare import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sponge

SOURCE = Path(sponge.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "core": {"errors"},
    "deadlines": {"errors", "core"},
    "optimize": {"errors", "core"},
    "profile": {"errors", "files", "core"},
    "workload": {"errors", "files", "core"},
    "measure": {"errors", "core", "profile", "workload"},
    "sim": {"errors", "core", "optimize", "profile", "workload", "measure"},
    "live": {"errors", "files", "core", "optimize", "profile", "workload", "measure"},
    "commands": {"errors", "core", "optimize", "profile", "workload", "sim", "live", "measure", "cli"},
    "integrations": {"errors", "core", "deadlines", "optimize", "profile", "workload", "sim", "live", "measure"},
    "cli": {"commands"},
    "__main__": {"cli"},
}
"""Arrows point one way. `live` and `sim` never meet but in the commands."""

EXTRAS = ["starlette", "fastapi", "uvicorn", "grpc", "google.protobuf", "prometheus_client", "opentelemetry"]
"""What integrations need: each is a package of an extra, and loaded by the integration that was asked for alone."""

IMPURE = {"time", "threading", "asyncio", "os", "random", "logging", "subprocess", "socket", "concurrent"}

HEAVY = ["cvxpy", "scipy", "pyscipopt", "cgroupspy", "matplotlib", "plotly", "typer", "rich", "onnxruntime", "onnx"]


def room(path: Path) -> str:
    """First part of a module's name below ``sponge``; "" for the package itself."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of everything a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""}
            if node.module == "sponge":
                found |= {f"sponge.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    """A layer that knows the one above it can no longer be tested, replaced or simulated alone."""
    here = room(path)
    if here == "":
        return
    assert here in MAY_IMPORT, f"{here} has no place in the map of layers"
    for name in imports(path):
        if not name.startswith("sponge.") or name == "sponge.__version__":
            continue
        there = name.split(".")[1]
        assert there == here or there in MAY_IMPORT[here], f"{path.relative_to(SOURCE)} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in {"core", "optimize", "deadlines"}], ids=str)
def test_core_reads_no_clock_and_touches_no_world(path: Path) -> None:
    """Same events at the same instants give the same actions only if nothing else comes in."""
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE


def test_only_their_owners_know_onnxruntime_and_cgroupspy() -> None:
    """So that a change of theirs has one place to be met."""
    owners = {
        package: sorted(
            str(path.relative_to(SOURCE))
            for path in MODULES
            if any(name.split(".")[0] == package for name in imports(path))
        )
        for package in ("onnxruntime", "cgroupspy")
    }
    assert all(path.startswith(("live/session", "live/model_file", "live/tensors")) for path in owners["onnxruntime"])
    assert all(path.startswith("live/cgroup/") for path in owners["cgroupspy"])


def test_bare_import_is_lean() -> None:
    """A service pays for what it uses; a solver, a plot or a command line is not part of serving."""
    script = f"import sys, sponge; print([name for name in {HEAVY + EXTRAS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_serving_needs_no_solver_and_no_command_line() -> None:
    """Scheduler, solver and controller as used in a service: only ONNX Runtime comes along."""
    script = (
        "import sys, sponge; sponge.Scheduler, sponge.Solver, sponge.Controller, sponge.CgroupScaler, sponge.wrap; "
        f"print([name for name in {HEAVY + EXTRAS} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['onnxruntime']"


def test_asgi_needs_no_package() -> None:
    """ASGI is a calling convention: the middleware must not force a framework or a server on anybody."""
    script = f"import sys, sponge.integrations.asgi; print([name for name in {HEAVY + EXTRAS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    """What the package lists can be had, and what it does not list is told."""
    for name in sponge.__all__:
        assert getattr(sponge, name) is not None
        assert name in dir(sponge)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        sponge.Nonsense  # noqa: B018
