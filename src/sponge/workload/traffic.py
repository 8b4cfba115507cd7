"""What clients send: how often, how much, and by when they want the answer.

Rules, and why they hold:

* Send times, sizes and SLO classes each have a stream of random numbers of their own, so that with one seed another
  payload is sent at the same instants, and another mix of SLOs has the same network behind it.
* A payload is a function from a number of requests to their sizes; a lambda will do where none of these fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.workload.arrivals import ArrivalProcess, poisson
from sponge.workload.bandwidth import BandwidthTrace, FloatArray
from sponge.workload.requests import Workload

Payload: TypeAlias = Callable[[int, np.random.Generator], FloatArray]
"""``(n_requests, rng) -> sizes [bytes]``, shape ``(n_requests,)``."""


def fixed(size_bytes: float) -> Payload:
    """Return a payload of one size [bytes, ≥ 0].

    Raises
    ------
    ValueError
        If the size is negative or not finite.
    """
    _check_size("size_bytes", size_bytes)
    return lambda count, _: np.full(count, float(size_bytes))


def lognormal(mean_bytes: float, cv: float) -> Payload:
    """Return a payload of log-normal sizes: compressed pictures and texts, some much larger than most.

    Parameters
    ----------
    mean_bytes
        Mean size [bytes], ≥ 0.
    cv
        Standard deviation over mean, ≥ 0; 0 is `fixed`.

    Raises
    ------
    ValueError
        If a number is negative or not finite.

    Notes
    -----
    The logarithm has the variance σ² = ln(1 + cv²) and the mean ln(mean) − σ²/2.
    """
    _check_size("mean_bytes", mean_bytes)
    if not 0 <= cv < math.inf:
        raise ValueError(f"cv must be finite and not negative, got {cv!r}")
    variance = math.log1p(cv**2)
    return lambda count, rng: mean_bytes * rng.lognormal(-variance / 2, math.sqrt(variance), count)


def empirical(sizes_bytes: npt.ArrayLike) -> Payload:
    """Return a payload that draws, with replacement, from observed sizes [bytes, ≥ 0], shape ``(n,)``, n ≥ 1.

    Raises
    ------
    ValueError
        If there is no size, or one is negative or not finite.
    """
    sizes = np.array(sizes_bytes, dtype=np.float64)
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(f"sizes_bytes must be one-dimensional and not empty, got shape {sizes.shape}")
    for size in sizes[~(np.isfinite(sizes) & (sizes >= 0))].tolist():
        _check_size("sizes_bytes", size)
    return lambda count, rng: rng.choice(sizes, count)


def _check_size(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def _above_zero(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{attribute.name} must be positive and finite, got {value!r}")


@attrs.frozen
class SloClass:
    """Requests that share an SLO.

    Parameters
    ----------
    slo_s
        Time from sending to the answer [s], > 0.
    weight
        How common they are, > 0: their share of the requests is their weight over the sum of all.

    Raises
    ------
    ValueError
        If a number is not positive.
    """

    slo_s: float = attrs.field(converter=float, validator=_above_zero)
    weight: float = attrs.field(default=1.0, converter=float, validator=_above_zero)


def as_classes(slos: Iterable[SloClass]) -> tuple[SloClass, ...]:
    """Return the classes as a tuple."""
    return tuple(slos)


@attrs.frozen(kw_only=True)
class Traffic:
    """What all clients together send; `workload` makes the requests.

    Parameters
    ----------
    rate_rps
        Mean rate [1/s], > 0.
    duration_s
        Length [s], > 0.
    arrivals
        When they send: one of `sponge.workload.PROCESSES`, or any function of that form.
    payload
        How much: `fixed`, `lognormal`, `empirical`, or any function of that form.
    slos
        Classes of requests, at least one; each request is of one, at random.

    Raises
    ------
    ValueError
        If a number is not positive, or there is no class.
    """

    rate_rps: float = attrs.field(validator=_above_zero)
    duration_s: float = attrs.field(validator=_above_zero)
    arrivals: ArrivalProcess = poisson
    payload: Payload = attrs.field(factory=lambda: fixed(0.0))
    slos: tuple[SloClass, ...] = attrs.field(default=(SloClass(1.0),), converter=as_classes)

    def __attrs_post_init__(self) -> None:
        if not self.slos:
            raise ValueError(f"slos must hold at least one class, got {self.slos!r}")

    def workload(
        self, trace: BandwidthTrace, seed: int, *, offset_s: npt.ArrayLike = 0.0, shortcut: bool = False
    ) -> Workload:
        """Send it through a network.

        Parameters
        ----------
        trace, offset_s, shortcut
            As for `Workload.from_network`.
        seed
            Of send times, sizes and classes, ≥ 0; the same seed gives the same requests.

        Returns
        -------
        Workload
            In order of arrival; `Workload.slo_s` tells the classes apart.

        Raises
        ------
        ValueError
            As of the arrival process and of `Workload.from_network`.
        """
        times, sizes, classes = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
        sent_at_s = self.arrivals(self.rate_rps, self.duration_s, times)
        payload_bytes = self.payload(len(sent_at_s), sizes)
        slo_s = draw_slos(self.slos, len(sent_at_s), classes)
        return Workload.from_network(sent_at_s, trace, payload_bytes, slo_s, offset_s=offset_s, shortcut=shortcut)


def draw_slos(slos: tuple[SloClass, ...], count: int, rng: np.random.Generator) -> FloatArray:
    """Return an SLO for each of *count* requests [s], shape ``(count,)``, classes drawn by their weights."""
    weights = np.array([slo.weight for slo in slos])
    return np.asarray(rng.choice([slo.slo_s for slo in slos], count, p=weights / weights.sum()), dtype=np.float64)
