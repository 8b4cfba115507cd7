"""Workloads: networks, arrivals, payloads, clients that wait for answers; and the requests with deadlines of all."""

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
from sponge.workload.closed_loop import ClosedLoop, ThinkTime, always, exponential
from sponge.workload.logs import load_bandwidth
from sponge.workload.requests import Workload
from sponge.workload.traffic import Payload, SloClass, Traffic, empirical, fixed, lognormal

__all__ = [
    "PROCESSES",
    "ArrivalProcess",
    "BandwidthTrace",
    "ClosedLoop",
    "Payload",
    "SloClass",
    "ThinkTime",
    "Traffic",
    "Workload",
    "always",
    "bursts",
    "constant",
    "empirical",
    "exponential",
    "fixed",
    "load_bandwidth",
    "lognormal",
    "lte_like",
    "markov",
    "poisson",
    "rate_trace",
    "surges",
]
