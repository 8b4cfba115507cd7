"""Plan with a latency model of your own.

Covers: the `Latency` protocol (three methods, nothing to inherit), with `Solver`, `Controller`, `Service` and
`sponge.simulate`.
Scenario: you know something about your model and machine that four terms cannot say. Here, kernels take rows four at a
time, so that five rows cost as much as eight; and only four of the eight cores are real, a hyper-thread adds a third of
one. The solver then fills tiles. A controller that does not know keeps its deadlines too, since it follows how long
batches really take, but on more cores.
"""

import math
from typing import Any

import attrs
import numpy as np

import sponge
from sponge.workload import Traffic, lte_like

SEED = 3
MAX_CORES = 8


@attrs.frozen(kw_only=True)
class SteppedLatency:
    """Latency of kernels that take *tile* rows at a time, on *real_cores* with hyper-threads beyond."""

    fixed_s: float = 0.010
    tile_s: float = 0.160
    """One tile on one real core."""
    tile: int = 4
    real_cores: float = 4.0
    hyper: float = 1 / 3
    """What a hyper-thread adds, in real cores."""
    disturbed: float = 0.02
    """By how much each other lane slows one down."""

    # All three take numbers or arrays. Latency must never rise with cores, nor fall with the batch size.

    def latency_s(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        speed = np.minimum(cores, self.real_cores) + self.hyper * np.maximum(0.0, cores - self.real_cores)
        latency_s = self.fixed_s + self._work(batch_size, lanes) / speed
        return float(latency_s) if np.ndim(latency_s) == 0 else latency_s

    def throughput_rps(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        return batch_size / self.latency_s(batch_size, cores, lanes)

    def cores_for(self, batch_size: Any, latency_s: Any, lanes: Any = 1) -> Any:
        """The inverse; `inf` where no number of cores is enough."""
        left_s = np.asarray(latency_s, dtype=float) - self.fixed_s
        with np.errstate(divide="ignore"):
            speed = np.where(left_s > 0, self._work(batch_size, lanes) / np.maximum(left_s, 0.0), math.inf)
        cores = np.where(speed <= self.real_cores, speed, self.real_cores + (speed - self.real_cores) / self.hyper)
        return float(cores) if np.ndim(cores) == 0 else cores

    def _work(self, batch_size: Any, lanes: Any) -> Any:
        """Seconds on one real core."""
        tiles = np.ceil(np.asarray(batch_size) / self.tile)
        return tiles * self.tile_s * (1 + self.disturbed * (np.asarray(lanes) - 1))


def solver(latency: Any) -> sponge.Solver:
    return sponge.Solver(latency, max_cores=MAX_CORES, max_batch_size=16, max_lanes=MAX_CORES)


def main() -> None:
    own = SteppedLatency()
    naive = sponge.LatencyModel(gamma_s=own.tile_s / own.tile, epsilon_s=0.0, delta_s=0.0, eta_s=own.fixed_s)

    print("budget  planned with our own model  with rows and cores all alike")
    for budget_s in (0.1, 0.2, 0.4, 0.8):
        plans = [solver(model).solve([budget_s] * 12, arrival_rate_rps=20.0) for model in (own, naive)]
        ours, theirs = (
            f"{p.lanes} x {p.batch_size:2d} rows on {p.lane_cores:g}" if p.feasible else "cannot be done" for p in plans
        )
        print(f"{budget_s:4.1f} s  {ours:>26}  {theirs:>30}")

    traffic = Traffic(rate_rps=60.0, duration_s=120.0)
    workload = traffic.workload(lte_like(traffic.duration_s, np.random.default_rng(SEED)), SEED)
    service = sponge.Service(own, noise_cv=0.05)  # what really happens
    print(f"\n{len(workload)} requests    met  mean cores  mean batch")
    for name, model in (("our own", own), ("all alike", naive)):
        run = sponge.simulate(workload, sponge.Controller(solver(model)), service, seed=SEED)
        rows = run.batches.rows.mean()
        print(f"{name:10}  {100 * run.slo_attainment:8.2f} %  {run.mean_cores:10.2f}  {rows:10.2f}")


if __name__ == "__main__":
    main()
