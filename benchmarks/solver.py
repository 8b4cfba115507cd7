"""Solve a queue: the closed form against the published enumeration and against SCIP, in one run.

Scenario
    Queues in deadline order, deadlines evenly spread with jitter, on the four-term latency of a YOLOv5s detector
    (scaled, so that the plan lies inside the range of cores and batch sizes). Every queue is different; in each
    repeat every contender solves it in turn, so that all see the same machine.
Peer
    The published enumeration (cores, then batch sizes, then the queue batch by batch, until one does not fit) in plain
    Python; here it also stops at the first cores that suffice, which can only help it. And the integer program in
    cvxpy, solved by SCIP. All must give the same plan, or the run fails.
Final number
    Median microseconds of one call of ``Solver.solve``, over all queues and repeats; and the median, over repeats, of
    the enumeration's time over ours. p10 and p90 are over repeats.
Out of scope
    The time to make a `Solver` (once per service), and queues that nothing can serve, which are reported apart.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import sponge
from sponge import LatencyModel, Plan, Solver
from sponge.optimize import program

SEED = 20_240_917
DETECTOR = (0.1404, -0.0508, 0.0252, 0.0221)
"""γ, ε, δ, η [s] of YOLOv5s, p99, least squares."""
REACH_US = {100: 30.0, 1000: 150.0}
REACH_RATIO = 100.0
SMALLEST_BATCH_WEIGHT = 1e-3
"""w of the published objective c + w·b: below 1 / max_batch_size the order is cores first."""

Call = Callable[[], Any]


def published_enumeration(
    latency: LatencyModel, max_cores: int, max_batch_size: int, budgets_s: Sequence[float], rate_rps: float
) -> tuple[int, int] | None:
    """Return the first feasible (cores, batch size) of least c + w·b, walking the queue for each."""
    gamma_s, epsilon_s, delta_s, eta_s = latency.gamma_s, latency.epsilon_s, latency.delta_s, latency.eta_s
    best = None
    for cores in range(1, max_cores + 1):
        for batch_size in range(1, max_batch_size + 1):
            parallel_s = max(gamma_s * batch_size + epsilon_s, 0.0)
            latency_s = parallel_s / cores + (delta_s * batch_size + eta_s)
            if batch_size / latency_s < rate_rps:
                continue
            cost = cores + SMALLEST_BATCH_WEIGHT * batch_size
            if (best is None or cost < best[0]) and _all_met(budgets_s, batch_size, latency_s):
                best = (cost, cores, batch_size)
        if best is not None:  # more cores can only cost more
            return best[1], best[2]
    return None


def _all_met(budgets_s: Sequence[float], batch_size: int, latency_s: float) -> bool:
    finished_s = 0.0
    for first in range(0, len(budgets_s), batch_size):
        finished_s += latency_s
        for budget_s in budgets_s[first : first + batch_size]:
            if finished_s > budget_s:
                return False
    return True


def queues(rng: np.random.Generator, requests: int, count: int, solver: Solver) -> list[npt.NDArray[np.float64]]:
    """Queues that some plan inside the range serves: the last deadline is a share of what the middle of it takes."""
    made: list[npt.NDArray[np.float64]] = []
    while len(made) < count:
        cores, batch_size = (
            solver.max_cores * rng.uniform(0.3, 0.8),
            round(solver.max_batch_size * rng.uniform(0.3, 0.8)),
        )
        wave_s = solver.latency.latency_s(batch_size, cores)
        spread = np.arange(requests) / batch_size * wave_s
        budgets = np.sort(wave_s * rng.uniform(1.0, 1.6) + spread * rng.uniform(1.0, 1.2, requests))
        if solver.solve(budgets).feasible:
            made.append(budgets)
    return made


def timed_us(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number * 1e6


def spread(values: Sequence[float]) -> dict[str, float]:
    p10, p90 = np.percentile(values, [10, 90])
    return {"median": float(statistics.median(values)), "p10": float(p10), "p90": float(p90)}


def compare(requests: int, limit: int, *, repeats: int, count: int, scip: int) -> dict[str, Any]:
    """Measure one size, contenders in turn on each queue; raise if two of them disagree."""
    latency = LatencyModel(*(np.array(DETECTOR) / limit))
    solver = Solver(latency, max_cores=limit, max_batch_size=limit)
    problems = queues(np.random.default_rng([SEED, requests]), requests, count, solver)
    plans = [solver.solve(budgets) for budgets in problems]
    repeated = [take_turns(solver, problems, plans) for _ in range(repeats)]
    medians = {name: [statistics.median(times[name]) for times in repeated] for name in repeated[0]}
    ratios = [b / a for a, b in zip(medians["closed_form_us"], medians["enumeration_us"], strict=True)]
    ours_us = statistics.median(medians["closed_form_us"])
    return {
        "requests": requests,
        "max_cores": limit,
        "max_batch_size": limit,
        "queues": count,
        "repeats": repeats,
        "plan_cores": [min(p.cores for p in plans), max(p.cores for p in plans)],
        "plan_batch_size": [min(p.batch_size for p in plans), max(p.batch_size for p in plans)],
        **{name: spread(values) for name, values in medians.items()},
        "enumeration_over_closed_form": spread(ratios),
        **by_scip(solver, problems[:scip], plans, ours_us),
        "reach_us": REACH_US[requests],
        "reached": ours_us <= REACH_US[requests],
    }


def take_turns(solver: Solver, problems: list[npt.NDArray[np.float64]], plans: list[Plan]) -> dict[str, list[float]]:
    """Time every contender once on every queue, and hold their answers against each other."""
    times: dict[str, list[float]] = {
        name: []
        for name in ("closed_form_us", "closed_form_from_list_us", "closed_form_infeasible_us", "enumeration_us")
    }
    for budgets, plan in zip(problems, plans, strict=True):
        as_list, hopeless = budgets.tolist(), budgets - budgets[0] - 1e-3
        enumerate_ = functools.partial(
            published_enumeration,
            solver.latency,  # type: ignore[arg-type]
            int(solver.max_cores),
            solver.max_batch_size,
            as_list,
            0.0,
        )
        enumerated = enumerate_()
        if (plan.cores, plan.batch_size) != enumerated:
            raise AssertionError(f"closed form {plan}, enumeration {enumerated}, for {as_list}")
        times["closed_form_us"].append(timed_us(functools.partial(solver.solve, budgets), 20))
        times["enumeration_us"].append(timed_us(enumerate_, 1))
        times["closed_form_from_list_us"].append(timed_us(functools.partial(solver.solve, as_list), 20))
        times["closed_form_infeasible_us"].append(timed_us(functools.partial(solver.solve, hopeless), 20))
    return times


def by_scip(
    solver: Solver, problems: list[npt.NDArray[np.float64]], plans: list[Plan], ours_us: float
) -> dict[str, Any]:
    """Solve the program of each queue to proven optimality, once: it takes long enough."""
    if not problems:
        return {}
    program.solve(solver, [1e3])  # imports cvxpy
    whole_us, own_us = [], []
    for budgets, plan in zip(problems, plans, strict=False):
        start = time.perf_counter()
        result = program.solve(solver, budgets)
        whole_us.append((time.perf_counter() - start) * 1e6)
        own_us.append(result.solve_s * 1e6)
        if result.plan != plan or result.gap != 0.0:
            raise AssertionError(f"closed form {plan}, SCIP {result}, for {budgets.tolist()}")
    return {
        "scip_queues": len(problems),
        "scip_us": spread(whole_us),
        "scip_without_cvxpy_us": spread(own_us),
        "scip_over_closed_form": statistics.median(whole_us) / ours_us,
    }


def extensions(repeats: int) -> list[dict[str, Any]]:
    """What the enumeration cannot do: fractional and continuous cores, lanes; agreement is tested elsewhere."""
    rng = np.random.default_rng([SEED, 1])
    rows = []
    for name, requests, limit, more in (
        ("tenths of a core", 100, 16, {"core_step": 0.1}),
        ("continuous cores", 100, 16, {"core_step": None}),
        ("16 lanes", 100, 16, {"max_lanes": 16}),
        ("16 lanes, continuous cores", 100, 16, {"max_lanes": 16, "core_step": None}),
        ("16 lanes", 1000, 16, {"max_lanes": 16}),
    ):
        latency = LatencyModel(*(np.array(DETECTOR) / limit), interference=0.05)
        solver = Solver(latency, max_cores=limit, max_batch_size=limit, **more)
        problems = queues(rng, requests, 20, Solver(latency, max_cores=limit, max_batch_size=limit))
        times = [
            statistics.median(timed_us(functools.partial(solver.solve, budgets), 20) for budgets in problems)
            for _ in range(repeats)
        ]
        rows.append({"name": name, "requests": requests, "limit": limit, "closed_form_us": spread(times)})
    return rows


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats over all queues (default 7)")
    parser.add_argument("--queues", type=int, default=10, help="different queues of each size (default 10)")
    parser.add_argument("--scip", type=int, default=3, help="queues of each size also solved by SCIP (default 3)")
    options = parser.parse_args(arguments)
    sizes = [
        compare(requests, limit, repeats=options.repeats, count=options.queues, scip=options.scip)
        for requests, limit in ((100, 16), (1000, 64))
    ]
    ratio = sizes[1]["enumeration_over_closed_form"]["median"]
    result = {
        "benchmark": "solver",
        "machine": {"cpu": cpu_model(), "python": platform.python_version(), "numpy": np.__version__},
        "sponge": sponge.__version__,
        "sizes": sizes,
        "extensions": extensions(options.repeats),
        "reach_ratio": REACH_RATIO,
        "reached_ratio": ratio >= REACH_RATIO,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        report(result)
    return 0


def report(result: dict[str, Any]) -> None:
    def line(name: str, values: dict[str, float], unit: str = "µs") -> None:
        print(f"  {name:40}{values['median']:12,.1f} {unit:3} p10 {values['p10']:,.1f}, p90 {values['p90']:,.1f}")

    for size in result["sizes"]:
        print(f"{size['requests']} queued, {size['max_cores']} cores × batch {size['max_batch_size']}", end="")
        print(f" (plans: {size['plan_cores']} cores, batch {size['plan_batch_size']}); all contenders agree")
        line("closed form, array", size["closed_form_us"])
        line("closed form, list", size["closed_form_from_list_us"])
        line("closed form, nothing feasible", size["closed_form_infeasible_us"])
        line("published enumeration", size["enumeration_us"])
        line("enumeration / closed form", size["enumeration_over_closed_form"], "×")
        if "scip_us" in size:
            line("cvxpy + SCIP", size["scip_us"])
            line("SCIP alone", size["scip_without_cvxpy_us"])
            print(f"  SCIP / closed form {size['scip_over_closed_form']:,.0f} ×, {size['scip_queues']} queues, once")
        print(f"  reach: {size['reach_us']:.0f} µs: {'reached' if size['reached'] else 'MISSED'}")
    print(f"reach: enumeration / closed form >= {result['reach_ratio']:.0f} at 1,000 queued: ", end="")
    print("reached" if result["reached_ratio"] else "MISSED")
    print("beyond the published problem")
    for row in result["extensions"]:
        line(f"{row['requests']} queued, {row['name']}", row["closed_form_us"])


if __name__ == "__main__":
    sys.exit(main())
