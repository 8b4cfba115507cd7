"""The simulator against queueing theory: what it gives where the answer is known.

Each check averages independent runs and allows what Student's t says of that many of them, at a risk of 1 in 1,000 for
the seeds that are fixed here. Runs start empty; the first requests, which wait less for it, are left out.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from sponge import LatencyModel, Run, Service, simulate
from sponge.sim.baselines import StaticController
from sponge.workload import Workload

RUNS = 16
STUDENT_T = 4.073
"""Two-sided 99.9 % quantile for 15 degrees of freedom."""
REQUESTS = 6_000
WARM_UP = 1_000
SERVICE_S = 0.01
LATENCY = LatencyModel(gamma_s=0.0, epsilon_s=0.0, delta_s=0.0, eta_s=SERVICE_S)
EXPONENTIAL = Service(LATENCY, noise="gamma", noise_cv=1.0)


def poisson(rate_rps: float, seed: int) -> Workload:
    arrived = np.cumsum(np.random.default_rng([1, seed]).exponential(1 / rate_rps, REQUESTS))
    return Workload(sent_at_s=arrived, arrived_at_s=arrived, deadline_s=np.full(REQUESTS, math.inf))


def run(rate_rps: float, service: Service, seed: int, lanes: int = 1) -> Run:
    controller = StaticController(float(lanes), order="fifo", max_batch_size=1, lanes=lanes, max_queue=REQUESTS)
    return simulate(poisson(rate_rps, seed), controller, service, seed=seed)


def settled(values: npt.NDArray[np.float64]) -> float:
    return float(values[WARM_UP:].mean())


def agree(measured: list[float], theory: float, most: float = 0.15) -> None:
    """Assert that the mean of the runs is *theory* within its uncertainty, and that this is small enough to tell."""
    allowed = STUDENT_T * float(np.std(measured, ddof=1)) / math.sqrt(len(measured))
    assert allowed < most * theory, "the runs are too few or too short to tell"
    assert abs(float(np.mean(measured)) - theory) < allowed


def erlang_c(lanes: int, load: float) -> float:
    """Probability of waiting with *load* = λ/μ on so many servers (Erlang 1917)."""
    below = sum(load**k / math.factorial(k) for k in range(lanes))
    waiting = load**lanes / math.factorial(lanes) / (1 - load / lanes)
    return waiting / (below + waiting)


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
@pytest.mark.parametrize(
    ("service", "cv"),
    [(Service(LATENCY), 0.0), (EXPONENTIAL, 1.0), (Service(LATENCY, noise_cv=0.5), 0.5)],
    ids=["M/D/1", "M/M/1", "M/G/1"],
)
def test_mean_wait_of_one_server(service: Service, cv: float, utilisation: float) -> None:
    """Pollaczek and Khinchine: ρ/(1 − ρ) · (1 + cv²)/2 service times."""
    theory_s = utilisation / (1 - utilisation) * (1 + cv**2) / 2 * SERVICE_S
    waits_s = [settled(run(utilisation / SERVICE_S, service, seed).queue_delay_s) for seed in range(RUNS)]
    agree(waits_s, theory_s, most=0.25)


def test_stragglers_wait_as_a_mixture_does() -> None:
    """The same formula with the moments of the mixture: one batch in ten takes three times as long."""
    share, factor = 0.1, 3.0
    mean_s = SERVICE_S * (1 + share * (factor - 1))
    square_s2 = SERVICE_S**2 * (1 + share * (factor**2 - 1))
    rate_rps = 0.6 / mean_s
    service = Service(LATENCY, straggler_share=share, straggler_factor=factor)
    waits_s = [settled(run(rate_rps, service, seed).queue_delay_s) for seed in range(RUNS)]
    agree(waits_s, rate_rps * square_s2 / 2 / (1 - 0.6), most=0.25)


def test_mean_wait_of_three_lanes() -> None:
    """M/M/3 by Erlang's C formula: lanes take from one queue."""
    load = 2.1
    theory_s = erlang_c(3, load) * SERVICE_S / (3 - load)
    waits_s = [settled(run(load / SERVICE_S, EXPONENTIAL, seed, lanes=3).queue_delay_s) for seed in range(RUNS)]
    agree(waits_s, theory_s, most=0.25)


def test_waiting_time_of_one_server_is_exponential_beyond_zero() -> None:
    """M/M/1 in the tail: a share ρ·e^(−(μ − λ)t) waits longer than t, which the mean alone would not show."""
    utilisation, t_s = 0.7, 0.05
    theory = utilisation * math.exp(-(1 - utilisation) / SERVICE_S * t_s)
    shares = [
        settled((run(utilisation / SERVICE_S, EXPONENTIAL, seed).queue_delay_s > t_s).astype(np.float64))
        for seed in range(RUNS)
    ]
    agree(shares, theory, most=0.35)


def test_averages_over_time() -> None:
    """M/M/1: the server is busy for ρ of the time, and ρ/(1 − ρ) requests are there on average."""
    runs = [run(0.7 / SERVICE_S, EXPONENTIAL, seed) for seed in range(RUNS)]
    agree([busy_share(r) for r in runs], 0.7, most=0.05)
    agree([in_system(r) for r in runs], 0.7 / 0.3, most=0.25)


def busy_share(r: Run) -> float:
    return float(np.sum(r.batches.finished_at_s - r.batches.started_at_s)) / r.horizon_s


def in_system(r: Run) -> float:
    """Requests that are there, averaged over time, by counting them between all arrivals and departures."""
    instants = np.concatenate([r.arrived_at_s, r.finished_at_s])
    steps = np.concatenate([np.ones(len(r)), -np.ones(len(r))])
    order = np.argsort(instants, kind="stable")
    present = np.cumsum(steps[order])
    return float(present[:-1] @ np.diff(instants[order])) / r.horizon_s


@pytest.mark.parametrize("lanes", [1, 3])
def test_little_s_law(lanes: int) -> None:
    """L = λW holds exactly for a run that begins and ends empty, whatever the service."""
    r = run(0.7 * lanes / SERVICE_S, Service(LATENCY, noise_cv=2.0, straggler_share=0.05), 0, lanes)
    assert in_system(r) == pytest.approx(len(r) / r.horizon_s * float(r.response_s.mean()), rel=1e-9)


def test_one_server_serves_in_order_whatever_the_noise() -> None:
    """Lindley's recursion, request by request: each starts at its arrival or when the one before it ends."""
    r = run(0.8 / SERVICE_S, EXPONENTIAL, 0)
    starts = np.maximum(r.arrived_at_s, np.append(0.0, r.finished_at_s[:-1]))
    assert np.array_equal(r.started_at_s, starts)
