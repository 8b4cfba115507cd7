"""Workloads: bandwidth logs, arrival processes, payloads, and the requests with deadlines that come of them."""

from sponge.workload.arrivals import (
    PROCESSES,
    ArrivalProcess,
    bursts,
    constant,
    markov,
    poisson,
    rate_trace,
    surges,
)
from sponge.workload.bandwidth import BandwidthTrace, lte_like
from sponge.workload.logs import load_bandwidth
from sponge.workload.requests import Workload
from sponge.workload.traffic import Payload, SloClass, Traffic, empirical, fixed, lognormal

__all__ = [
    "PROCESSES",
    "ArrivalProcess",
    "BandwidthTrace",
    "Payload",
    "SloClass",
    "Traffic",
    "Workload",
    "bursts",
    "constant",
    "empirical",
    "fixed",
    "load_bandwidth",
    "lognormal",
    "lte_like",
    "markov",
    "poisson",
    "rate_trace",
    "surges",
]
