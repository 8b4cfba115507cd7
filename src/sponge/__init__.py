"""sponge: meet each request's own deadline on an ONNX model with as few CPU cores as possible.

The names below are the public interface. They are loaded when first used, so that ``import sponge`` costs next to
nothing and pulls in no solver, plotting or command-line package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "wrap": "sponge.live.wrap",
    "ElasticSession": "sponge.live.session",
    "Profiler": "sponge.live.profiler",
    "Profile": "sponge.profile",
    "LatencyModel": "sponge.core.latency",
    "LatencyTable": "sponge.core.latency",
    "Solver": "sponge.core.solver",
    "Plan": "sponge.core.values",
    "Controller": "sponge.core.controller",
    "Settings": "sponge.core.settings",
    "CgroupScaler": "sponge.live.cgroup",
    "Scheduler": "sponge.live.scheduler",
    "Statistics": "sponge.live.statistics",
    "simulate": "sponge.sim.kernel",
    "Service": "sponge.sim.service",
    "Run": "sponge.sim.run",
    **dict.fromkeys(
        (
            "CgroupUnavailable",
            "ControllerFailed",
            "CpuControlError",
            "DeadlineExceeded",
            "ModelError",
            "ProfileMismatch",
            "QueueFull",
            "SchedulerClosed",
            "SchedulerForked",
            "SpongeError",
            "TraceError",
            "UnsupportedModel",
        ),
        "sponge.errors",
    ),
}

__all__ = [
    "CgroupScaler",
    "CgroupUnavailable",
    "Controller",
    "ControllerFailed",
    "CpuControlError",
    "DeadlineExceeded",
    "ElasticSession",
    "LatencyModel",
    "LatencyTable",
    "ModelError",
    "Plan",
    "Profile",
    "ProfileMismatch",
    "Profiler",
    "QueueFull",
    "Run",
    "Scheduler",
    "SchedulerClosed",
    "SchedulerForked",
    "Service",
    "Settings",
    "Solver",
    "SpongeError",
    "Statistics",
    "TraceError",
    "UnsupportedModel",
    "simulate",
    "wrap",
]

if TYPE_CHECKING:
    from sponge.core.controller import Controller
    from sponge.core.latency import LatencyModel, LatencyTable
    from sponge.core.settings import Settings
    from sponge.core.solver import Solver
    from sponge.core.values import Plan
    from sponge.errors import (
        CgroupUnavailable,
        ControllerFailed,
        CpuControlError,
        DeadlineExceeded,
        ModelError,
        ProfileMismatch,
        QueueFull,
        SchedulerClosed,
        SchedulerForked,
        SpongeError,
        TraceError,
        UnsupportedModel,
    )
    from sponge.live.cgroup import CgroupScaler
    from sponge.live.profiler import Profiler
    from sponge.live.scheduler import Scheduler
    from sponge.live.session import ElasticSession
    from sponge.live.statistics import Statistics
    from sponge.live.wrap import wrap
    from sponge.profile import Profile
    from sponge.sim.kernel import simulate
    from sponge.sim.run import Run
    from sponge.sim.service import Service


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'sponge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
