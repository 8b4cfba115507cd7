"""``sponge simulate``: how many cores do I need for this model, this network and this SLO?

Every core count and every policy meets the same requests, or the same clients, if these wait for their answers. A
request that arrives with less time left than the model takes even on the most cores is lost, whatever is done; it
counts for nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from sponge.commands.policies import POLICIES, Policy, Task
from sponge.commands.simulate_answer import Answer, Row
from sponge.commands.simulate_input import MOST_CORES, SimulateSettings
from sponge.sim.kernel import simulate
from sponge.sim.service import Service
from sponge.workload import (
    PROCESSES,
    BandwidthTrace,
    ClosedLoop,
    Traffic,
    Workload,
    exponential,
    load_bandwidth,
    lognormal,
    lte_like,
)
from sponge.workload.bandwidth import LTE_BYTES_PER_S

DURATION_S = 300.0
LONGEST_TRACE_S = 600.0
REQUESTS_PER_RUN = 20_000
"""At high rates, runs are by default so short that they have no more."""
SHORTEST_RUN_S = 10.0
LANE_TABLE = 1 << 24
"""By default no more lanes than the solver can tabulate: its table grows with cores, batch sizes and lanes squared."""
Progress: TypeAlias = Callable[[str, int], None]
"""Called with the policy and the core count that are simulated next."""


def run_simulations(settings: SimulateSettings, progress: Progress | None = None) -> Answer:
    """Simulate all policies and core counts.

    Parameters
    ----------
    settings
        See `SimulateSettings`. Without core counts, each policy's number is searched for: doubled until it is enough,
        then bisected. The search believes that more cores do not miss more.
    progress
        Called before each row.

    Raises
    ------
    TraceError
        If the bandwidth log cannot be read.
    ValueError
        If a number is out of range, or no request would be sent.
    """
    trace = None if settings.trace is None else load_bandwidth(settings.trace)
    typical = settings.latency.typical or settings.latency
    fastest_s = float(typical.latency_s(1, float(settings.cores_limit)))
    rate_rps = _expected_rps(settings, trace, fastest_s)
    duration_s = _duration_s(settings, trace, rate_rps)
    workloads = [_workload(settings, trace, duration_s, seed) for seed in range(settings.seeds)]
    rows: list[Row] = []
    for name in settings.policies:

        def measure(cores: int, name: str = name) -> Row:
            if progress is not None:
                progress(name, cores)
            return _row(settings, name, cores, workloads, rate_rps, duration_s, fastest_s)

        found = map(measure, sorted(set(settings.max_cores))) if settings.max_cores else _search(settings, measure)
        rows += sorted(found, key=lambda row: row.max_cores)
    return Answer(
        settings=settings,
        network="a generated LTE-like network" if settings.trace is None else settings.trace.name,
        duration_s=duration_s,
        fastest_s=fastest_s,
        rows=rows,
    )


def _expected_rps(settings: SimulateSettings, trace: BandwidthTrace | None, fastest_s: float) -> float:
    """Return the mean rate; of clients that wait, the rate if each were served by itself on the most cores."""
    if settings.clients is None:
        return settings.rate_rps
    bytes_per_s = LTE_BYTES_PER_S if trace is None else trace.mean_bytes_per_s
    return settings.clients / (settings.think_s + settings.payload_bytes / bytes_per_s + fastest_s)


def _duration_s(settings: SimulateSettings, trace: BandwidthTrace | None, rate_rps: float) -> float:
    if settings.duration_s is not None:
        return settings.duration_s
    longest_s = DURATION_S if trace is None else min(trace.duration_s, LONGEST_TRACE_S)
    return min(longest_s, max(SHORTEST_RUN_S, REQUESTS_PER_RUN / rate_rps))


def _workload(
    settings: SimulateSettings, trace: BandwidthTrace | None, duration_s: float, seed: int
) -> Workload | ClosedLoop:
    # A generated network is another one for each seed: an answer should not hang on one journey.
    network = lte_like(max(duration_s, 1.0), np.random.default_rng([seed, 1])) if trace is None else trace
    payload = lognormal(settings.payload_bytes, settings.payload_cv)
    if settings.clients is None:
        traffic = Traffic(
            rate_rps=settings.rate_rps,
            duration_s=duration_s,
            arrivals=PROCESSES[settings.arrivals],
            payload=payload,
            slos=settings.slos,
        )
        return traffic.workload(network, seed)
    return ClosedLoop(
        clients=settings.clients,
        duration_s=duration_s,
        trace=network,
        think=exponential(settings.think_s),
        payload=payload,
        slos=settings.slos,
        seed=seed,
    )


def _search(settings: SimulateSettings, measure: Callable[[int], Row]) -> list[Row]:
    rows = [measure(1)]
    if math.isnan(rows[0].met_pct):
        return rows  # all are lost at arrival
    while not rows[-1].met_pct >= settings.target_pct and rows[-1].max_cores < MOST_CORES:
        rows.append(measure(min(2 * rows[-1].max_cores, MOST_CORES)))
    low, high = (rows[-2].max_cores if len(rows) > 1 else 0), rows[-1].max_cores
    if not rows[-1].met_pct >= settings.target_pct:
        return rows
    while high - low > 1:
        middle = (low + high) // 2
        rows.append(measure(middle))
        if rows[-1].met_pct >= settings.target_pct:
            high = middle
        else:
            low = middle
    return rows


def _row(
    settings: SimulateSettings,
    name: str,
    cores: int,
    workloads: Sequence[Workload | ClosedLoop],
    rate_rps: float,
    duration_s: float,
    fastest_s: float,
) -> Row:
    policy = POLICIES[name]
    service = _service(settings, policy)
    task = Task(
        latency=settings.latency,
        max_cores=cores,
        max_batch_size=settings.batch_limit,
        max_lanes=_lanes(settings, cores),
        rate_rps=rate_rps,
        slo_s=settings.tightest_slo_s,
        resize_delay_s=service.resize_delay_s,
    )
    runs = [simulate(workload, policy.make(task), service, seed=seed) for seed, workload in enumerate(workloads)]
    if not all(map(len, runs)):
        raise ValueError(f"no request is sent at {rate_rps:g} requests/s in {duration_s:g} s: give a longer duration")
    counted = [run.deadline_s - run.arrived_at_s >= fastest_s for run in runs]
    missed = [int(np.count_nonzero(~run.met & kept)) for run, kept in zip(runs, counted, strict=True)]
    numbers = [int(np.count_nonzero(kept)) for kept in counted]
    response_s = np.concatenate([run.response_s[np.isfinite(run.finished_at_s)] for run in runs])
    total = sum(map(len, runs))
    return Row(
        policy=name,
        max_cores=cores,
        requests=total,
        requests_per_s=total / (duration_s * len(runs)),
        lost_at_arrival=total - sum(numbers),
        missed=sum(missed),
        met_pct=_met_pct(sum(missed), sum(numbers)),
        met_pct_worst_seed=min(map(_met_pct, missed, numbers)),
        mean_cores=float(np.mean([run.mean_cores for run in runs])),
        peak_cores=max(float(run.in_force.cores.max()) for run in runs),
        response_s_p99=float(np.percentile(response_s, 99)) if len(response_s) else math.nan,
        first=runs[0],
    )


def _lanes(settings: SimulateSettings, cores: int) -> int:
    if settings.max_lanes is not None:
        return settings.max_lanes
    return max(1, min(cores, math.isqrt(LANE_TABLE // (cores * settings.batch_limit))))


def _met_pct(missed: int, counted: int) -> float:
    return 100 * (1 - missed / counted) if counted else math.nan


def _service(settings: SimulateSettings, policy: Policy) -> Service:
    asked = settings.resize_delay_s
    return Service(
        settings.latency if settings.profile is None else settings.profile,
        noise_cv=settings.noise_cv,
        straggler_share=settings.straggler_share,
        interference=settings.interference,
        resize_delay_s=policy.grow_s if asked is None else asked,
        shrink_delay_s=policy.shrink_s if asked is None else None,
    )
