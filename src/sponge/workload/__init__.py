"""Workloads: bandwidth logs, arrival processes, and the requests with deadlines that come of them."""

from sponge.workload.arrivals import PROCESSES, ArrivalProcess, bursts, constant, poisson
from sponge.workload.bandwidth import BandwidthTrace, lte_like
from sponge.workload.logs import load_bandwidth
from sponge.workload.requests import Workload

__all__ = [
    "PROCESSES",
    "ArrivalProcess",
    "BandwidthTrace",
    "Workload",
    "bursts",
    "constant",
    "load_bandwidth",
    "lte_like",
    "poisson",
]
