"""The problem as an integer program, written in cvxpy and solved by SCIP.

One-hot variables ``y[b, k]`` choose batch size and lanes; everything that depends on the choice is then linear, and
every queued request has its own constraint, as published. Two forms, both exact (no big-M, no linearisation error):

* Four-term latency: ``n[b, k]`` are the cores of a lane, zero unless chosen (``min·y <= n <= max·y``), and
  ``w·f·((γb + ε)⁺/n + δb + η) <= s`` is multiplied by n::

      Σ  w·f·(γb + ε)⁺·y  +  (w·f·(δb + η) − s)·n   <=  0        for each request, w its wave under (b, k)

* Any other latency: ``z[b, k, j]`` chooses a level of cores too, and ``Σ w·l(b, c_j, k)·z <= s``.

The objective is met in two stages, fewest cores and then batch size and lanes, so that no weight has to be chosen that
is small enough for the order and large enough for the solver's tolerance. SCIP keeps a constraint to about 1e-6: a
choice that misses a deadline by less may be taken for feasible, here only.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import LatencyModel, LatencyTable
from sponge.core.solver import Solver
from sponge.core.values import Plan
from sponge.optimize import exhaustive

_SAME_CORES = 1e-6
"""By how much the second stage may exceed the cores of the first: SCIP's feasibility tolerance."""


class Status(enum.Enum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    """Proven: no choice needs fewer cores."""
    LIMIT = "limit"
    """Stopped by the time limit; a plan, if there is one, is feasible but may not be the best."""
    INFEASIBLE = "infeasible"
    """Proven: no choice meets everything; the plan is the best effort."""


@attrs.frozen(kw_only=True)
class ProgramResult:
    """What SCIP found, and how certain it is."""

    status: Status
    plan: Plan | None
    """``None`` only if the limit came before the first feasible choice."""
    objective: float
    """Total cores of the best choice found [cores]; ``inf`` if none."""
    bound: float
    """No choice needs fewer cores than this [cores]; ``inf`` if none is feasible."""
    solve_s: float
    """Time SCIP spent, both stages [s]."""

    @property
    def gap(self) -> float:
        """Relative distance of objective and bound; 0 if proven (also proven infeasible), ``inf`` without a plan."""
        if self.objective == self.bound:
            return 0.0
        return abs(self.objective - self.bound) / abs(self.objective) if math.isfinite(self.objective) else math.inf


def solve(
    solver: Solver,
    budgets_s: Sequence[float] | npt.NDArray[Any],
    arrival_rate_rps: float = 0.0,
    *,
    time_limit_s: float | None = None,
) -> ProgramResult:
    """Solve the problem of ``solver.solve`` by SCIP.

    Parameters
    ----------
    solver
        The problem: latency, limits, and the cores that a lane may have. Its methods are not used.
    budgets_s
        Remaining times in deadline order [s], shape ``(n,)``.
    arrival_rate_rps
        Rate to keep up with [1/s].
    time_limit_s
        Most time for each of the two stages [s]; ``None``: no limit.

    Returns
    -------
    ProgramResult
        Infeasibility and an exceeded limit are statuses. The plan of an infeasible problem is the best effort of
        `exhaustive.best_effort`: a rule, not an optimum of this program.

    Raises
    ------
    ValueError
        If any share of a core is allowed (``core_step=None``) and the latency is not the four-term form.
    """
    budgets = np.asarray(budgets_s, dtype=np.float64)
    four_terms = isinstance(solver.latency, LatencyModel) and not isinstance(solver.latency, LatencyTable)
    if solver.core_step is None and not four_terms:
        raise ValueError(
            "core_step must be given for a latency without the four-term form: only that is linear in continuous "
            f"cores, got core_step=None with {type(solver.latency).__name__}"
        )
    form: _Form = _FourTermForm(solver) if four_terms else _LevelForm(solver)
    constraints = [*form.constraints, *form.meet(budgets), *form.keep_up(arrival_rate_rps)]
    first = _run(form.total_cores, constraints, time_limit_s, least=solver.min_cores)
    solve_s, plan = first.solve_s, None
    if first.found:
        plan = form.plan()
        constraints.append(form.total_cores <= first.objective + _SAME_CORES)
        second = _run(form.preference, constraints, time_limit_s, least=-math.inf)
        solve_s += second.solve_s
        if second.found:
            plan = form.plan()
        status = first.status if second.status is Status.OPTIMAL else Status.LIMIT
    else:
        status = first.status
        if status is Status.INFEASIBLE:
            plan = exhaustive.best_effort(solver, budgets.tolist())
    return ProgramResult(status=status, plan=plan, objective=first.objective, bound=first.bound, solve_s=solve_s)


@attrs.frozen(kw_only=True)
class _Stage:
    status: Status
    objective: float
    bound: float
    solve_s: float

    @property
    def found(self) -> bool:
        return math.isfinite(self.objective)


def _run(objective: Any, constraints: list[Any], time_limit_s: float | None, *, least: float) -> _Stage:
    """Solve one stage; *least* bounds the objective if SCIP is stopped before it has anything to report."""
    import cvxpy as cp

    problem = cp.Problem(cp.Minimize(objective), constraints)
    parameters = {} if time_limit_s is None else {"limits/time": time_limit_s}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")  # said by the status
            problem.solve(solver=cp.SCIP, scip_params=parameters)
    except cp.SolverError:
        if time_limit_s is None:
            raise
        return _Stage(status=Status.LIMIT, objective=math.inf, bound=least, solve_s=time_limit_s)
    # cvxpy below 1.8 does not hand out SCIP's model, nor always its time.
    model = (problem.solver_stats.extra_stats or {}).get("model")
    solve_s = float(problem.solver_stats.solve_time or 0.0)
    if problem.status in (cp.INFEASIBLE, cp.settings.INFEASIBLE_OR_UNBOUNDED):  # bounded variables: infeasible
        return _Stage(status=Status.INFEASIBLE, objective=math.inf, bound=math.inf, solve_s=solve_s)
    found = float(objective.value)
    if problem.status == cp.OPTIMAL:
        return _Stage(status=Status.OPTIMAL, objective=found, bound=found, solve_s=solve_s)
    bound = least if model is None else max(float(model.getDualbound()), least)
    return _Stage(status=Status.LIMIT, objective=found, bound=bound, solve_s=solve_s)


class _Form:
    """The choices (b, k), one column each, and what both forms share.

    Since a single choice is not zero, a constraint may be scaled for each column by itself; all are scaled to be
    about 1, so that the solver's tolerance is relative to the budget.
    """

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        columns = [
            (batch_size, lanes, shares)
            for lanes in range(1, solver.max_lanes + 1)
            if (shares := exhaustive.lane_shares(solver, lanes))
            for batch_size in range(1, solver.max_batch_size + 1)
        ]
        self._shares = [shares for _, _, shares in columns]
        self._batches = np.array([batch_size for batch_size, _, _ in columns])
        self._lanes = np.array([lanes for _, lanes, _ in columns])
        fastest = [
            exhaustive.latency_of(solver, batch_size, shares[-1], lanes) for batch_size, lanes, shares in columns
        ]
        self._least_s = min(fastest)
        self.constraints: list[Any] = []
        self.total_cores: Any
        self.preference: Any

    def _prefer(self, chosen: Any) -> None:
        """Order choices of equal cores by batch size, then by most lanes."""
        self.preference = (self._batches * (self._solver.max_lanes + 1) - self._lanes) @ chosen

    def _finite(self, budgets: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Budgets that ask something [s], shape ``(m,)``, and the waves that serve them, ``(m, columns)``."""
        asking = np.flatnonzero(budgets < math.inf)
        waves = asking[:, None] // (self._batches * self._lanes) + 1.0
        return np.maximum(budgets[asking], -self._least_s), waves

    def meet(self, budgets: npt.NDArray[np.float64]) -> list[Any]:
        """One row for each queued request with a deadline."""
        raise NotImplementedError

    def keep_up(self, arrival_rate_rps: float) -> list[Any]:
        """One row for the arrival rate."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """Read the plan off the variables."""
        raise NotImplementedError

    def _plan(self, column: int, lane_cores: float) -> Plan:
        lanes = int(self._lanes[column])
        cores = min(lane_cores * lanes, self._solver.max_cores)
        return Plan(cores=cores, batch_size=int(self._batches[column]), lanes=lanes, feasible=True)


class _FourTermForm(_Form):
    def __init__(self, solver: Solver) -> None:
        import cvxpy as cp

        super().__init__(solver)
        latency = solver.latency
        assert isinstance(latency, LatencyModel)
        factor = np.array([latency.lane_factor(int(lanes)) for lanes in self._lanes])
        self._parallel_s = factor * np.maximum(latency.gamma_s * self._batches + latency.epsilon_s, 0.0)
        self._serial_s = factor * (latency.delta_s * self._batches + latency.eta_s)

        columns = len(self._batches)
        self._chosen = cp.Variable(columns, boolean=True)
        self.constraints = [cp.sum(self._chosen) == 1]
        if solver.core_step is None:
            self._cores = cp.Variable(columns)
            most = np.array([shares[-1] for shares in self._shares])
            self.constraints += [
                self._cores >= solver.min_cores * self._chosen,
                self._cores <= cp.multiply(most, self._chosen),
            ]
        else:
            self._steps = cp.Variable(columns, integer=True)
            most = np.array([len(shares) - 1.0 for shares in self._shares])
            self.constraints += [self._steps >= 0, self._steps <= cp.multiply(most, self._chosen)]
            self._cores = solver.min_cores * self._chosen + solver.core_step * self._steps
        self.total_cores = self._lanes @ self._cores
        self._prefer(self._chosen)

    def meet(self, budgets: npt.NDArray[np.float64]) -> list[Any]:
        budgets, waves = self._finite(budgets)
        if len(budgets) == 0:
            return []
        scale = np.maximum(np.abs(budgets), self._least_s)[:, None]
        of_cores = (waves * self._serial_s - budgets[:, None]) / scale
        return [(waves * self._parallel_s / scale) @ self._chosen + of_cores @ self._cores <= 0]

    def keep_up(self, arrival_rate_rps: float) -> list[Any]:
        if arrival_rate_rps == 0:
            return []
        per_request = arrival_rate_rps / (self._batches * self._lanes)
        of_cores = self._serial_s * per_request - 1.0
        return [(self._parallel_s * per_request) @ self._chosen + of_cores @ self._cores <= 0]

    def plan(self) -> Plan:
        column = int(np.argmax(self._chosen.value))
        if self._solver.core_step is None:
            return self._plan(column, float(self._cores.value[column]))
        return self._plan(column, self._shares[column][round(float(self._steps.value[column]))])


class _LevelForm(_Form):
    """Here a column is a choice (b, k) on one level of cores."""

    def __init__(self, solver: Solver) -> None:
        import cvxpy as cp

        super().__init__(solver)
        levels = [len(shares) for shares in self._shares]
        self._cores = np.concatenate(self._shares)
        self._batches = np.repeat(self._batches, levels)
        self._lanes = np.repeat(self._lanes, levels)
        self._latency_s = solver.latency.latency_s(self._batches, self._cores, self._lanes)
        self._chosen = cp.Variable(len(self._cores), boolean=True)
        self.constraints = [cp.sum(self._chosen) == 1]
        self.total_cores = (self._lanes * self._cores) @ self._chosen
        self._prefer(self._chosen)

    def meet(self, budgets: npt.NDArray[np.float64]) -> list[Any]:
        budgets, waves = self._finite(budgets)
        if len(budgets) == 0:
            return []
        scale = np.maximum(np.abs(budgets), self._least_s)
        return [(waves * self._latency_s / scale[:, None]) @ self._chosen <= budgets / scale]

    def keep_up(self, arrival_rate_rps: float) -> list[Any]:
        if arrival_rate_rps == 0:
            return []
        return [(self._latency_s * arrival_rate_rps / (self._batches * self._lanes)) @ self._chosen <= 1]

    def plan(self) -> Plan:
        column = int(np.argmax(self._chosen.value))
        return self._plan(column, float(self._cores[column]))
