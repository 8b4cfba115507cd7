"""The closed form: fewest cores, then the smallest batch, for a queue of budgets in deadline order.

Rules, and why they hold:

* The queue is served in *waves*: ``k`` lanes (one, unless more are allowed) each run a batch of ``b`` side by
  side, so that request ``i`` is finished at the end of wave ``⌊i / (b·k)⌋ + 1``. In deadline order the first
  request of a wave is its tightest, so that the whole queue asks one number of a choice (b, k), which depends
  on the product only::

      L = min( b·k / λ,  min over waves w of  s[(w − 1)·b·k] / w )         latency allowed to a batch [s]

  A choice is feasible with ``n`` cores a lane exactly if ``l(b, n, k) <= L``.
* Latency does not rise with cores, so the fewest total cores at which *some* choice is feasible are found by
  bisection over the totals, all choices compared at once. The latencies of every choice are computed once,
  when the solver is made; nothing is rounded, and the answer is the one that trying everything would give, to
  the last bit.
* A wave and the rate are compared as latencies (``l <= s / w`` and ``l <= b·k / λ``, not ``w·l <= s``), here
  and in the exhaustive reference: the two ways differ by the rounding of one operation, and there has to be
  one rule. Only the best effort, which has no single number to compare with, counts by ``w·l <= s``.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency
from sponge.core.values import Plan
from sponge.core.waves import Waves

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.intp]

_MAX_LATENCIES = 1 << 24
"""Largest table of latencies that a solver may hold (128 MiB)."""
_CONTINUOUS_TOTALS = 256
"""Totals that bracket the optimum when any share of a core is allowed: few choices remain between two of them."""
_SAME_CORES = 9
"""Decimals to which totals are compared: 2 lanes of 0.9 cores are no more than one lane of 0.9 + 3 × 0.3."""


@attrs.frozen(eq=False)
class Solver:
    """Choose cores, batch size and lanes for a queue of budgets: exact, in microseconds.

    Of all choices that meet every deadline and keep up with the arrivals, `solve` takes the one with the
    fewest cores in total; of these the one with the smallest batch; of these the one with the most lanes
    (narrow lanes waste less). Lanes run in steady waves of equal batches on equal cores; with ``max_lanes=1``
    that is the published integer program, one batch at a time on all cores.

    A solver is immutable and may be shared by threads. Drift of the model by a factor needs no new one: a
    model that is ``f`` times slower, at budgets ``s`` and rate ``λ``, is the same problem as this one at budgets
    ``s / f`` and rate ``λ·f``.

    Parameters
    ----------
    latency
        Predicted latency; must not rise with cores. Evaluated when the solver is made.
    max_cores
        Most cores of all lanes together [cores].
    max_batch_size
        Largest batch, >= 1.
    min_cores
        Fewest cores of one lane [cores], > 0.
    core_step
        A lane has ``min_cores``, ``min_cores + core_step``, … cores; ``None``: any share from ``min_cores``
        on.
    max_lanes
        Most batches that may run side by side, >= 1.

    Raises
    ------
    ValueError
        If an argument is out of range, or *core_step* so small that the table of latencies would exceed 128
        MiB.

    References
    ----------
    ``min over w of s[(w − 1)·b] / w`` is the speed rule of *Optimal Available* speed scaling with unit jobs:
    Yao, Demers, Shenker, "A scheduling model for reduced CPU energy", FOCS 1995.
    """

    latency: Latency
    max_cores: float = attrs.field(converter=float, kw_only=True)
    max_batch_size: int = attrs.field(converter=operator.index, kw_only=True)
    min_cores: float = attrs.field(default=1.0, converter=float, kw_only=True)
    core_step: float | None = attrs.field(default=1.0, converter=attrs.converters.optional(float), kw_only=True)
    max_lanes: int = attrs.field(default=1, converter=operator.index, kw_only=True)
    core_levels: tuple[float, ...] = attrs.field(init=False, repr=False)
    """What one lane may have, ascending [cores]; empty if any share is allowed."""
    _choices: _Choices = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _require(0 < self.min_cores < math.inf, "min_cores", "> 0 and finite", self.min_cores)
        _require(
            self.min_cores <= self.max_cores < math.inf,
            "max_cores",
            f">= min_cores ({self.min_cores:g}) and finite",
            self.max_cores,
        )
        _require(self.max_batch_size >= 1, "max_batch_size", ">= 1", self.max_batch_size)
        _require(self.max_lanes >= 1, "max_lanes", ">= 1", self.max_lanes)
        step = self.core_step
        _require(step is None or 0 < step < math.inf, "core_step", "> 0 and finite, or None", step)
        levels: tuple[float, ...] = ()
        if step is not None:
            count = math.floor((self.max_cores - self.min_cores) / step + 1e-9) + 1
            fine = count * _usable_lanes(self) ** 2 * self.max_batch_size <= _MAX_LATENCIES
            _require(fine, "core_step", "larger, or None for any share of a core", step)
            levels = tuple(min(self.min_cores + j * step, self.max_cores) for j in range(count))
        object.__setattr__(self, "core_levels", levels)
        object.__setattr__(self, "_choices", _tabulate(self))

    def solve(self, budgets_s: Sequence[float] | npt.NDArray[Any], arrival_rate_rps: float = 0.0) -> Plan:
        """Choose the cheapest plan for this queue.

        Costs ``O(n·H(p) + p·log(levels))`` for ``n`` requests and ``p = max_batch_size · max_lanes`` (H: harmonic
        number), and if nothing is feasible ``O(n·H(max_batch_size)·H(max_lanes)·log n)`` more. An array of
        ``float64`` is read in place, a list is converted first.

        Parameters
        ----------
        budgets_s
            Remaining times of the queued requests [s], ascending (deadline order), shape ``(n,)``; negative
            and infinite values and an empty queue are allowed. The order is checked: it costs a tenth of the
            call, and a wrong order would give a wrong plan without a sign of it.
        arrival_rate_rps
            Rate with which all lanes together must keep up [1/s], >= 0; 0 asks nothing.

        Returns
        -------
        Plan
            ``feasible=True``: the optimum. ``feasible=False``: no choice meets everything, and this one is
            the best effort. Every choice (b, k) is then considered on the most cores that k lanes can have;
            the first of these counts: most queued deadlines met, highest throughput, smallest batch, fewest
            lanes.

        Raises
        ------
        ValueError
            If the budgets are not ascending, hold a NaN or are not one-dimensional, or the rate is out of
            range.
        """
        budgets = np.asarray(budgets_s, dtype=np.float64)
        if budgets.ndim != 1:
            raise ValueError(f"budgets_s must be one-dimensional, got shape {budgets.shape}")
        if not np.logical_and.reduce(budgets[:-1] <= budgets[1:]) or (len(budgets) and math.isnan(budgets[0])):
            raise ValueError(f"budgets_s must be ascending and without NaN, got {budgets_s!r}")
        _require(0 <= arrival_rate_rps < math.inf, "arrival_rate_rps", ">= 0 and finite", arrival_rate_rps)
        plan = self.fewest(self._choices.waves.tightest_s(budgets), arrival_rate_rps)
        return self._best_effort(budgets) if plan is None else plan

    def solve_program(self, budgets_s: Sequence[float] | npt.NDArray[Any], arrival_rate_rps: float = 0.0) -> Plan:
        """Solve the same problem as an integer program in cvxpy, by SCIP: thousands of times slower.

        `sponge.optimize.program.solve` gives the status, bound and gap too, and takes a time limit. It lies
        above this layer, so it is looked up when called: the core works where cvxpy and SCIP are not
        installed.

        Arguments, result and errors are those of `solve`; also ``ValueError`` if *core_step* is ``None`` and
        the latency is not the four-term `LatencyModel`, whose inverse is then no linear constraint.
        """
        program: Any = importlib.import_module("sponge.optimize.program")
        plan: Plan = program.solve(self, budgets_s, arrival_rate_rps).plan
        return plan

    # -- what the queue asks ---------------------------------------------------------------------------------

    @property
    def products(self) -> IntArray:
        """The different values of ``batch size · lanes``, ascending, shape ``(products,)``."""
        return self._choices.products

    def fewest(self, tightest_s: FloatArray, arrival_rate_rps: float = 0.0) -> Plan | None:
        """Choose the cheapest plan for a queue of which only this is known; None if nothing is feasible.

        Parameters
        ----------
        tightest_s
            The latency that a wave of each product may take (`sponge.core.waves`) [s], shape ``(products,)``.
        arrival_rate_rps
            As for `solve`.
        """
        choices = self._choices
        allowed_s = tightest_s
        if arrival_rate_rps > 0:
            with np.errstate(over="ignore"):
                allowed_s = np.minimum(allowed_s, choices.products / arrival_rate_rps)
        return self._fewest(allowed_s if choices.product_of is None else allowed_s[choices.product_of])

    # -- what is cheapest ------------------------------------------------------------------------------------

    def _fewest(self, allowed_s: FloatArray) -> Plan | None:
        choices = self._choices
        latency_s = choices.latency_s
        low, high = 0, len(latency_s) - 1
        fits = latency_s[high] <= allowed_s
        choice = int(fits.argmax())
        if not fits[choice]:
            return None
        while low < high:
            middle = (low + high) // 2
            fewer = latency_s[middle] <= allowed_s
            first = int(fewer.argmax())
            if fewer[first]:
                high, choice, fits = middle, first, fewer
            else:
                low = middle + 1
        if self.core_step is None and low > 0:
            return self._fewest_continuous(np.flatnonzero(fits).tolist(), allowed_s)
        return choices.plan(low, choice, feasible=True)

    def _fewest_continuous(self, candidates: list[int], allowed_s: FloatArray) -> Plan:
        """Invert the latency of the choices that fit within the smallest sufficient total of the table."""
        choices = self._choices
        best = (math.inf, 0, 0.0)
        for choice in candidates:
            lanes = choices.lanes[choice]
            cores = self.latency.cores_for(choices.batch_sizes[choice], float(allowed_s[choice]), lanes)
            cores = min(max(cores, self.min_cores), self.max_cores / lanes)
            best = min(best, (round(cores * lanes, _SAME_CORES), choice, cores))
        _, choice, cores = best
        batch_size, lanes = choices.batch_sizes[choice], choices.lanes[choice]
        cores = self._not_above(cores, batch_size, lanes, float(allowed_s[choice]))
        return Plan(cores=min(cores * lanes, self.max_cores), batch_size=batch_size, lanes=lanes, feasible=True)

    def _not_above(self, cores: float, batch_size: int, lanes: int, allowed_s: float) -> float:
        """Undo the rounding of the inverse: a nudge upwards after which the latency itself is met."""
        nudge, most = 2.0**-52, self.max_cores / lanes
        nudged = cores
        while nudged < most and self.latency.latency_s(batch_size, nudged, lanes) > allowed_s:
            nudged = min(cores * (1.0 + nudge), most)
            nudge *= 2.0
        return nudged

    # -- when nothing is feasible ----------------------------------------------------------------------------

    def _best_effort(self, budgets: FloatArray) -> Plan:
        choices = self._choices
        choice = int(choices.by_throughput[0])
        if len(budgets):
            met = choices.waves_of_choices.deadlines_met(budgets, choices.latency_s[-1])
            choice = int(choices.by_throughput[met[choices.by_throughput].argmax()])
        return choices.plan(-1, choice, feasible=False)


@attrs.frozen(eq=False, kw_only=True)
class _Choices:
    """All (batch size, lanes), smallest batch first and then most lanes first, with what is known beforehand."""

    batch_sizes: list[int]
    lanes: list[int]
    products: IntArray
    """Different ``batch size · lanes``, ascending, shape ``(products,)``."""
    product_of: IntArray | None
    """Index into `products` for each choice; ``None`` where that is the identity (one lane)."""
    waves: Waves
    """What a queue asks of each product."""
    waves_of_choices: Waves
    """The same, one entry for each choice."""
    latency_s: FloatArray
    """Row t: latency of each choice on the most cores within the t-th smallest total [s], shape
    ``(totals, choices)``; NaN, which no comparison accepts, where its lanes need more."""
    cores: list[list[float]]
    """``cores[t][lanes - 1]``: the exact total behind `latency_s` [cores]."""
    by_throughput: IntArray
    """Choices in the order in which best efforts of equally many deadlines are preferred."""

    def plan(self, total: int, choice: int, *, feasible: bool) -> Plan:
        lanes = self.lanes[choice]
        return Plan(
            cores=self.cores[total][lanes - 1],
            batch_size=self.batch_sizes[choice],
            lanes=lanes,
            feasible=feasible,
        )


def _tabulate(solver: Solver) -> _Choices:
    max_lanes = _usable_lanes(solver)
    sizes = np.arange(1, solver.max_batch_size + 1)
    lanes = np.tile(np.arange(max_lanes, 0, -1), len(sizes))
    batches = np.repeat(sizes, max_lanes)
    products, product_of = np.unique(batches * lanes, return_inverse=True)

    shares = [_lane_shares(solver, k) for k in range(1, max_lanes + 1)]
    keys = [np.round(own * k, _SAME_CORES) for k, own in enumerate(shares, start=1)]
    totals = np.unique(np.concatenate(keys))
    latency_s = np.full((len(totals), len(batches)), np.nan)
    cores = np.full((len(totals), max_lanes), np.nan)
    for k, (own, key) in enumerate(zip(shares, keys, strict=True), start=1):
        table = solver.latency.latency_s(sizes[None, :].astype(np.float64), own[:, None], k)
        table = np.minimum.accumulate(table, axis=0)  # interpolation may rise by the last bit
        at = np.searchsorted(key, totals, side="right") - 1
        reached = at >= 0
        latency_s[reached, max_lanes - k :: max_lanes] = table[at[reached]]
        cores[reached, k - 1] = np.minimum(own[at[reached]] * k, solver.max_cores)

    waves = Waves(products.tolist())
    with np.errstate(divide="ignore"):
        throughput = batches * lanes / latency_s[-1]
    return _Choices(
        batch_sizes=batches.tolist(),
        lanes=lanes.tolist(),
        products=products.astype(np.intp),
        product_of=None if max_lanes == 1 else product_of.astype(np.intp),
        waves=waves,
        waves_of_choices=waves if max_lanes == 1 else Waves((batches * lanes).tolist()),
        latency_s=latency_s,
        cores=cores.tolist(),
        by_throughput=np.lexsort((lanes, batches, -throughput)),
    )


def _usable_lanes(solver: Solver) -> int:
    return min(solver.max_lanes, int(solver.max_cores / solver.min_cores + 1e-9))


def _lane_shares(solver: Solver, lanes: int) -> FloatArray:
    """Cores that each of so many lanes may have, ascending; if any share is allowed, a grid of them.

    The grid is one of totals, the same for every number of lanes: what fits within a total must be seen there,
    or fewer lanes that need a little less than the smallest total of more lanes would be overlooked.
    """
    if solver.core_step is None:
        smallest = solver.min_cores * np.arange(1, _usable_lanes(solver) + 1)
        totals = np.union1d(np.geomspace(solver.min_cores, solver.max_cores, _CONTINUOUS_TOTALS), smallest)
        totals = np.round(totals, _SAME_CORES)
        inside = (totals > solver.min_cores * lanes) & (totals < solver.max_cores)
        return np.concatenate(([solver.min_cores], totals[inside] / lanes, [solver.max_cores / lanes]))
    shares = np.array(solver.core_levels)
    return shares[np.round(shares * lanes, _SAME_CORES) <= round(solver.max_cores, _SAME_CORES)]


def _require(fine: bool, name: str, range_: str, value: object) -> None:
    if not fine:
        raise ValueError(f"{name} must be {range_}, got {value!r}")
