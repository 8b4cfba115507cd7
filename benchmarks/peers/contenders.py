"""Who races: how each is started, and what of it may be tuned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

CORES = len(os.sched_getaffinity(0))
STATIC = (
    {"workers": CORES, "threads": 1},
    {"workers": 1, "threads": CORES},
)
"""Ways to spend all cores: side by side, or one wide. (With one core they are the same.)"""
IN_PROCESS, HTTP = "in process", "over HTTP"


@attrs.frozen(kw_only=True)
class Contender:
    """One column of the race."""

    name: str
    label: str
    venv: str
    script: str
    lane: str = HTTP
    protocol: str = "plain"
    client: str = "over_http.py"
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    grid: Sequence[Mapping[str, Any]] = ()
    """Settings to choose from, by tuning."""
    tuned_as: str | None = None
    """Another contender whose tuned settings it shares."""

    @property
    def is_sponge(self) -> bool:
        """Whether it is ours."""
        return self.name.startswith("sponge")


BATCHES = (4, 8)


def grid(*windows_ms: float, placements: Sequence[Mapping[str, Any]] = STATIC) -> list[dict[str, Any]]:
    """Return placements × (no batching, or largest batch × window); without windows, only the latter."""
    batching = [{"batch": 1}] if windows_ms else []
    batching += [{"batch": batch, "window_ms": window_ms} for batch in BATCHES for window_ms in windows_ms or (0,)]
    return [{**placement, **choice} for placement in placements for choice in batching]


TRITON = {"venv": "triton", "script": "serve_triton.py", "protocol": "kserve"}
SPONGE = {"venv": "sponge", "settings": {"cores": CORES, "batch": 8}}

CONTENDERS = (
    Contender(name="sponge-http", label="sponge behind uvicorn", script="serve_sponge_http.py", **SPONGE),
    Contender(
        name="sponge-grpc",
        label="sponge behind gRPC",
        script="serve_sponge_grpc.py",
        client="over_grpc.py",
        **SPONGE,
    ),
    Contender(name="mosec", label="mosec", venv="mosec", script="serve_mosec.py", grid=grid(1, 10)),
    Contender(
        name="litserve",
        label="LitServe",
        venv="litserve",
        script="serve_litserve.py",
        grid=[{**one, "fast_queue": fast} for one in grid(1, 10) for fast in (False, True)],
    ),
    Contender(
        name="bentoml",
        label="BentoML, without batching",
        venv="bentoml",
        script="serve_bentoml.py",
        settings={"slo": "median", "batch": 1},
        grid=STATIC,
    ),
    Contender(
        name="bentoml-tight",
        label="BentoML, `max_latency` of the tightest",
        venv="bentoml",
        script="serve_bentoml.py",
        settings={"slo": "tight"},
        grid=grid(),
    ),
    Contender(
        name="bentoml-median",
        label="BentoML, `max_latency` of the median",
        venv="bentoml",
        script="serve_bentoml.py",
        settings={"slo": "median"},
        grid=grid(),
    ),
    Contender(
        name="triton",
        label="Triton (pytriton), no queue policy",
        settings={"policy": "none"},
        grid=grid(0, 10),
        **TRITON,
    ),
    Contender(
        name="triton-timeouts",
        label="Triton (pytriton), a time-out each",
        settings={"policy": "timeouts"},
        tuned_as="triton",
        **TRITON,
    ),
    Contender(
        name="triton-priorities",
        label="Triton (pytriton), three priorities",
        settings={"policy": "priorities"},
        tuned_as="triton",
        **TRITON,
    ),
    Contender(
        name="bare",
        label="`session.run`, first come first served",
        venv="sponge",
        script="in_process.py",
        lane=IN_PROCESS,
        settings={"kind": "bare", "batch": 1},
        grid=STATIC,
    ),
    Contender(
        name="batched",
        label="batched",
        venv="batched",
        script="in_process.py",
        lane=IN_PROCESS,
        settings={"kind": "batched"},
        grid=grid(1, 10, placements=STATIC[1:]),
    ),
    Contender(
        name="sponge",
        label="sponge",
        venv="sponge",
        script="in_process.py",
        lane=IN_PROCESS,
        settings={"kind": "sponge", "cores": CORES, "batch": 8},
    ),
)
"""sponge over HTTP first: the others get the cores that it took."""
