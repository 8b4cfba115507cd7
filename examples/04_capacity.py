"""Plan capacity: how many cores for a load that surges, before anything is deployed.

Covers: `Traffic` (arrivals, payloads, SLO classes), `lte_like`, `sponge.simulate`, `Controller`, `Service`, `Run`.
Scenario: phones upload pictures of different sizes; one in four users pays for an answer within half a second, the
others wait a second. Once a minute a surge triples the load for ten seconds. No model runs here: its latency is given
by four terms, with a tenth of noise, and the controller is the one that would serve.
"""

import numpy as np

import sponge
from sponge.workload import SloClass, Traffic, lognormal, lte_like, surges

SEED = 1
LATENCY = sponge.LatencyModel(gamma_s=0.14, epsilon_s=-0.05, delta_s=0.025, eta_s=0.022)
"""0.137 s a picture on one core."""
SERVICE = sponge.Service(LATENCY, noise_cv=0.1)
TRAFFIC = Traffic(
    rate_rps=15.0,
    duration_s=300.0,
    arrivals=surges,
    payload=lognormal(mean_bytes=200e3, cv=0.4),
    slos=(SloClass(slo_s=0.5, weight=1.0), SloClass(slo_s=1.0, weight=3.0)),
)


def controller(max_cores: int) -> sponge.Controller:
    """Return the controller that serves: one lane for each core, at most."""
    return sponge.Controller(sponge.Solver(LATENCY, max_cores=max_cores, max_batch_size=8, max_lanes=max_cores))


def main() -> None:
    workload = TRAFFIC.workload(lte_like(TRAFFIC.duration_s, np.random.default_rng(SEED)), SEED)
    hurried = workload.slo_s < 0.75
    lost = workload.budget_s < LATENCY.latency_s(1, 8.0)
    print(f"{len(workload)} requests, {hurried.mean():.0%} of them due in 0.5 s, {lost.sum()} lost in the network")
    print()
    print("max cores  met, 0.5 s  met, 1 s  mean cores  peak cores")
    for max_cores in (2, 3, 4, 5, 6, 8):
        run = sponge.simulate(workload, controller(max_cores), SERVICE, seed=SEED)
        met = [100 * run.met[some & ~lost].mean() for some in (hurried, ~hurried)]
        peak = run.in_force.cores.max()
        print(f"{max_cores:9d}  {met[0]:8.2f} %  {met[1]:6.2f} %  {run.mean_cores:10.2f}  {peak:10g}")


if __name__ == "__main__":
    main()
