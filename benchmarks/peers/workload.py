"""What is asked of everybody: when, and how much time is left."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from sponge.workload import BandwidthTrace, SloClass, Workload, lognormal, lte_like, poisson
from sponge.workload.traffic import draw_slos

FloatArray = npt.NDArray[np.float64]
SLOS = (SloClass(0.3, 2), SloClass(0.6, 2), SloClass(1.2, 1))
"""Of a live view, a photo, and a picture for later: 40, 40 and 20 %."""
PAYLOAD = lognormal(300e3, 0.5)
PHONES = 20
SETTLE_S = 1.5
"""Before the first request that counts, so that slow uploads have arrived too."""
LEAST_BUDGET_S = 0.06
"""Requests that the network leaves less than this are not sent: nobody could serve them."""


@functools.cache
def _network(seed: int) -> BandwidthTrace:
    return lte_like(600.0, np.random.default_rng([seed, 0]))


def requests(rate_rps: float, duration_s: float, seed: int) -> tuple[FloatArray, FloatArray]:
    """Return when requests reach the service, and what a 4G-like network has left them of `SLO_S` [s].

    Parameters
    ----------
    rate_rps
        Mean rate of the Poisson arrivals [1/s].
    duration_s
        Instants lie within [s].
    seed
        The same gives the same requests.
    """
    sends = poisson(rate_rps, duration_s + SETTLE_S, np.random.default_rng([seed, 1]))
    sizes, classes, places = (np.random.default_rng([seed, stream]) for stream in (2, 3, 4))
    network = _network(seed)
    workload = Workload.from_network(
        sends,
        network,
        PAYLOAD(len(sends), sizes),
        draw_slos(SLOS, len(sends), classes),
        offset_s=places.choice(places.random(PHONES) * network.duration_s, len(sends)),
    )
    at_s, budget_s = workload.arrived_at_s, workload.budget_s
    kept = (budget_s >= LEAST_BUDGET_S) & (at_s >= SETTLE_S) & (at_s < duration_s + SETTLE_S)
    return at_s[kept] - SETTLE_S, budget_s[kept]
