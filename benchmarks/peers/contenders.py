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
    grid: Mapping[str, Sequence[Any]] = attrs.field(factory=dict)
    """Values to try for each setting; ``placement`` stands for one of `STATIC`."""
    tuned_as: str | None = None
    """Another contender whose tuned settings it shares."""

    @property
    def is_sponge(self) -> bool:
        """Whether it is ours."""
        return self.name.startswith("sponge")


WINDOW = {"placement": STATIC, "batch": (2, 4, 8), "window_ms": (0, 5, 20)}
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
    Contender(
        name="mosec", label="mosec", venv="mosec", script="serve_mosec.py", grid=WINDOW | {"window_ms": (1, 5, 20)}
    ),
    Contender(
        name="litserve",
        label="LitServe",
        venv="litserve",
        script="serve_litserve.py",
        grid=WINDOW | {"window_ms": (1, 5, 20)},
    ),
    Contender(
        name="bentoml-tight",
        label="BentoML, `max_latency` of the tightest",
        venv="bentoml",
        script="serve_bentoml.py",
        settings={"slo": "tight"},
        grid={"placement": STATIC, "batch": (2, 4, 8)},
    ),
    Contender(
        name="bentoml-median",
        label="BentoML, `max_latency` of the median",
        venv="bentoml",
        script="serve_bentoml.py",
        settings={"slo": "median"},
        grid={"placement": STATIC, "batch": (2, 4, 8)},
    ),
    Contender(
        name="triton", label="Triton (pytriton), no queue policy", settings={"policy": "none"}, grid=WINDOW, **TRITON
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
        grid={"placement": STATIC},
    ),
    Contender(
        name="batched",
        label="batched",
        venv="batched",
        script="in_process.py",
        lane=IN_PROCESS,
        settings={"kind": "batched"},
        grid={"placement": STATIC[1:], "batch": (2, 4, 8), "window_ms": (1, 5, 20)},
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
