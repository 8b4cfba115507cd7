"""Ask the solver how many cores a queue of deadlines needs.

Covers: `LatencyModel`, `Solver.solve`, `Plan`, and `Solver.solve_program`, the same as an integer program.
Scenario: no model runs here. A latency model is given by its four terms; the queue gets tighter step by step, and the
optimum takes more cores, other batches, more lanes, until nothing is enough and the best effort is said to be that.
"""

import sponge

LATENCY = sponge.LatencyModel(gamma_s=0.14, epsilon_s=-0.05, delta_s=0.025, eta_s=0.022)
"""About the published profile of YOLOv5s: one image takes 0.137 s on one core and 0.058 s on eight."""


def describe(plan: sponge.Plan) -> str:
    lanes = "lane of" if plan.lanes == 1 else "lanes of"
    said = f"{plan.lanes} {lanes} {plan.lane_cores:g} cores, batch {plan.batch_size}"
    return said if plan.feasible else said + ", too few"


def main() -> None:
    one_lane = sponge.Solver(LATENCY, max_cores=16, max_batch_size=8)
    lanes = sponge.Solver(LATENCY, max_cores=16, max_batch_size=8, max_lanes=16)

    print("budgets [s]         rate [1/s]   one lane                               up to 16 lanes")
    for budgets_s, rate_rps in [
        ([0.9] * 4, 2.0),
        ([0.9] * 4, 20.0),
        ([0.3] * 4, 20.0),
        ([0.15] * 4, 20.0),
        ([0.05] * 4, 20.0),
    ]:
        plans = [solver.solve(budgets_s, arrival_rate_rps=rate_rps) for solver in (one_lane, lanes)]
        one, many = (describe(plan) for plan in plans)
        print(f"{len(budgets_s)} x {budgets_s[0]:<15g} {rate_rps:<12g} {one:38} {many}")

    plan = one_lane.solve([0.3] * 4, arrival_rate_rps=20.0)
    program = one_lane.solve_program([0.3] * 4, arrival_rate_rps=20.0)
    print("SCIP finds the same:", plan == program)


if __name__ == "__main__":
    main()
