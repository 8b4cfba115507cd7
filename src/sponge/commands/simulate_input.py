"""What ``sponge simulate`` is asked for, and how it is read from what was typed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from sponge.commands.policies import POLICIES
from sponge.core.latency import LatencyModel
from sponge.profile import Profile
from sponge.workload import PROCESSES, SloClass

RATE_RPS = 20.0
THINK_S = 1.0
MOST_CORES = 64
"""How far the search goes if no core counts are given."""
CORES_LIMIT = 256
MAX_BATCH_SIZE = 8
"""Without a profile, which knows the largest batch that was measured."""


@attrs.frozen(kw_only=True)
class SimulateSettings:
    """What the command was asked for; None: chosen as its help says."""

    latency: LatencyModel
    profile: Profile | None = None
    trace: Path | None = None
    rate_rps: float = RATE_RPS
    """Without *clients*."""
    clients: int | None = None
    """So many, each of which waits for its answer, instead of a rate."""
    think_s: float = THINK_S
    arrivals: str = "poisson"
    payload_bytes: float = 300e3
    payload_cv: float = 0.0
    slos: tuple[SloClass, ...] = (SloClass(1.0),)
    duration_s: float | None = None
    max_cores: tuple[int, ...] = ()
    max_batch_size: int | None = None
    max_lanes: int | None = None
    policies: tuple[str, ...] = ("sponge",)
    noise_cv: float = 0.0
    straggler_share: float = 0.0
    interference: float | None = None
    resize_delay_s: float | None = None
    seeds: int = 3
    target_pct: float = 99.9

    def __attrs_post_init__(self) -> None:
        if self.arrivals not in PROCESSES:
            raise ValueError(f"arrivals must be one of {', '.join(PROCESSES)}, got {self.arrivals!r}")
        self._check_range("rate", self.rate_rps, above_zero=True)
        self._check_range("think", self.think_s)
        self._check_range("payload_kb", self.payload_bytes)
        if self.duration_s is not None:
            self._check_range("duration", self.duration_s, above_zero=True)
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds!r}")
        for name in self.policies:
            if name not in POLICIES:
                raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
        for cores in self.max_cores:
            if not 1 <= cores <= CORES_LIMIT:
                raise ValueError(f"max_cores must be from 1 to {CORES_LIMIT}, got {cores!r}")
        if not 0 < self.target_pct <= 100:
            raise ValueError(f"target must be above 0 and at most 100 %, got {self.target_pct!r}")

    @staticmethod
    def _check_range(name: str, value: float, *, above_zero: bool = False) -> None:
        if not 0 <= value < math.inf or (above_zero and value == 0):
            raise ValueError(f"{name} must be finite and {'above 0' if above_zero else 'not negative'}, got {value!r}")

    @property
    def cores_limit(self) -> int:
        """The most cores that are tried."""
        return max(self.max_cores, default=MOST_CORES)

    @property
    def batch_limit(self) -> int:
        """Largest batch, as used."""
        if self.max_batch_size is not None:
            return self.max_batch_size
        return MAX_BATCH_SIZE if self.profile is None else max(self.profile.batch_sizes)

    @property
    def tightest_slo_s(self) -> float:
        """What policies that know only one SLO are given [s]."""
        return min(slo.slo_s for slo in self.slos)


def read_latency(profile: Path | None, model: str | None) -> tuple[LatencyModel, Profile | None]:
    """Return the latency model that the command was given, and the profile if it is from one.

    Raises
    ------
    ValueError
        If there is neither profile nor model, or both, or one that cannot be read; the message says what would do.
    OSError
        If the profile cannot be opened.
    """
    if (profile is None) == (model is None):
        raise ValueError(
            "give either a profile (made by: sponge profile model.onnx --out profile.json) or "
            "--model gamma,epsilon,delta,eta in seconds, such as --model 0.14,-0.05,0.025,0.022"
        )
    if profile is not None:
        if profile.suffix == ".onnx":
            raise ValueError(
                f"{profile} is a model; measure it first (sponge profile {profile} --out profile.json) and give the "
                "profile"
            )
        try:
            measured = Profile.load(profile)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no profile {str(profile)!r}: sponge profile model.onnx --out {profile} makes one"
            ) from None
        return LatencyModel.fit(measured), measured
    try:
        gamma_s, epsilon_s, delta_s, eta_s = map(float, str(model).split(","))
    except ValueError:
        raise ValueError(
            f"model must be four numbers gamma,epsilon,delta,eta in seconds, such as 0.14,-0.05,0.025,0.022, "
            f"got {model!r}"
        ) from None
    return LatencyModel(gamma_s=gamma_s, epsilon_s=epsilon_s, delta_s=delta_s, eta_s=eta_s), None


def read_load(rate: float | None, arrivals: str | None, clients: int | None, think: float | None) -> dict[str, Any]:
    """Return who sends when, as fields of `SimulateSettings`: requests at a rate, or clients that wait.

    Raises
    ------
    ValueError
        If both are given; or a think time, and no clients who would think.
    """
    if clients is None:
        if think is not None:
            raise ValueError(
                f"think is the time between an answer and the next request of --clients, got {think!r} alone"
            )
        return {"rate_rps": RATE_RPS if rate is None else rate, "arrivals": arrivals or "poisson"}
    if rate is not None or arrivals is not None:
        given = f"rate {rate!r}" if rate is not None else f"arrivals {arrivals!r}"
        raise ValueError(f"clients that wait send as fast as they are answered: give clients ({clients}) or {given}")
    return {"clients": clients, "think_s": THINK_S if think is None else think}


def parse_slos(texts: Iterable[str]) -> tuple[SloClass, ...]:
    """Read SLOs as they are typed: ``0.5`` or, with a weight, ``0.5:2``.

    Raises
    ------
    ValueError
        If one is not of that form or not positive.
    """
    slos = []
    for text in texts:
        slo, colon, weight = text.partition(":")
        try:
            slos.append(SloClass(float(slo), float(weight) if colon else 1.0))
        except ValueError:
            raise ValueError(
                f"slo must be seconds above 0, or seconds:weight, such as 0.5 or 0.5:2, got {text!r}"
            ) from None
    return tuple(slos)


def parse_cores(texts: Iterable[str]) -> tuple[int, ...]:
    """Read core counts as they are typed: ``2``, or several, ``2,4,8``.

    Raises
    ------
    ValueError
        If one is no whole number.
    """
    fields = [field.strip() for text in texts for field in text.split(",")]
    for field in fields:
        if not (field.isascii() and field.isdigit() and len(field) <= 6):
            raise ValueError(f"max_cores must be whole numbers such as 8 or 2,4,8, got {field!r}")
    return tuple(map(int, fields))
