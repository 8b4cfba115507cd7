"""The four-term latency model: Amdahl's law over cores, linear in the batch size."""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core import fitting

Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.float64]

TYPICAL_PERCENTILE = 50.0
_SCALAR = (int, float, np.integer, np.floating)


@attrs.frozen
class LatencyModel:
    """The four-term latency of a batch, ``l(b, c) = (max(γ·b + ε, 0) / c + δ·b + η) · f(lanes)``.

    γ and ε are work that is spread over the cores, δ and η work that is not. ε may be negative (a batch of
    one can use its cores better than the straight line through larger batches says); the parallel part is
    then held at zero where the line would be negative, so that more cores never make a batch slower.

    Parameters
    ----------
    gamma_s, epsilon_s
        Parallel work per request, and per batch [core-seconds]; ``gamma_s >= 0``.
    delta_s, eta_s
        Serial work per request, and per batch [s]; both ``>= 0``.
    interference
        Relative slowdown for each further busy lane, >= 0: ``f(k) = 1 + interference·(k − 1)``.
    lane_factors
        Measured slowdowns as ``((lanes, factor), …)`` instead, for a slowdown that is not linear:
        interpolated between lane counts, and continued beyond the last with its last slope. ``f(1)`` is 1.
    typical
        The same at the median, where this model predicts a tail: what batches take on average of many. None: no other
        than this model.
    report
        How well the model agrees with what it was fitted to; None for a model that was not fitted.

    Raises
    ------
    ValueError
        If a coefficient is out of range or not finite, or a batch of one would take no time at all.

    References
    ----------
    Amdahl's law over cores and linear in the batch: the form that published vertical scalers of batched
    inference use.
    """

    gamma_s: float = attrs.field(converter=float)
    epsilon_s: float = attrs.field(converter=float)
    delta_s: float = attrs.field(converter=float)
    eta_s: float = attrs.field(converter=float)
    interference: float = attrs.field(default=0.0, converter=float, kw_only=True)
    lane_factors: tuple[tuple[int, float], ...] = attrs.field(default=(), kw_only=True)
    typical: LatencyModel | None = attrs.field(default=None, kw_only=True, eq=False, repr=False)
    report: fitting.FitReport | None = attrs.field(default=None, kw_only=True, eq=False, repr=False)

    @classmethod
    def fit(cls, profile: fitting.Measured, percentile: float = 99) -> LatencyModel:
        """Fit a model to a profile; ``.report`` tells how well, and ``.report.explain()`` in words.

        Parameters
        ----------
        profile
            Measured latencies, as `Profiler` makes them.
        percentile
            Percentile of each cell that is to be predicted [%], above 0 and below 100.

        Returns
        -------
        LatencyModel
            The four-term form, or a `LatencyTable` of the measurements if that form is more than
            `fitting.MEAN_ERROR_LIMIT` off on average or `fitting.WORST_ERROR_LIMIT` in one cell.

        Raises
        ------
        ValueError
            If *percentile* is out of range, or the profile has no cell measured with one lane busy.
        """
        check(0 < percentile < 100, "percentile", "above 0 and below 100", percentile)
        # a table is a model too, so its module imports this one
        from sponge.core.table import fit_latency

        model = fit_latency(profile.estimates(percentile), percentile)
        if percentile <= TYPICAL_PERCENTILE:
            return model
        return attrs.evolve(model, typical=fit_latency(profile.estimates(TYPICAL_PERCENTILE), TYPICAL_PERCENTILE))

    def __attrs_post_init__(self) -> None:
        for name in ("gamma_s", "epsilon_s", "delta_s", "eta_s", "interference"):
            value = getattr(self, name)
            if not np.isfinite(value) or (value < 0 and name != "epsilon_s"):
                raise ValueError(f"{name} must be finite{'' if name == 'epsilon_s' else ' and >= 0'}, got {value!r}")
        if not max(self.gamma_s + self.epsilon_s, 0.0) + self.delta_s + self.eta_s > 0:
            raise ValueError(
                "gamma_s, epsilon_s, delta_s and eta_s must give a batch of one a latency above 0, got "
                f"{(self.gamma_s, self.epsilon_s, self.delta_s, self.eta_s)!r}"
            )
        before = (1, 1.0)
        for lanes, factor in self.lane_factors:
            if lanes <= before[0] or not before[1] <= factor < np.inf:
                raise ValueError(
                    f"lane_factors must rise from (1, 1.0), each lane count once, got {self.lane_factors!r}"
                )
            before = (lanes, factor)

    # -- predictions

    @overload
    def latency_s(self, batch_size: float, cores: float, lanes: int = 1) -> float: ...
    @overload
    def latency_s(self, batch_size: Array, cores: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def latency_s(self, batch_size: float, cores: Array, lanes: int | Array = 1) -> FloatArray: ...
    def latency_s(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        """Predict the latency of a batch.

        Parameters
        ----------
        batch_size
            Requests in the batch, >= 1.
        cores
            CPU share of the lane that runs it [cores], > 0.
        lanes
            Lanes that are busy at the same time, this one included, >= 1.

        Returns
        -------
        float or ndarray
            Latency [s]: a ``float`` for scalars, else ``float64`` of the arguments' common (broadcast) shape.

        Raises
        ------
        ValueError
            If a batch size or lane count is below 1, or a CPU share not above 0.
        """
        if isinstance(batch_size, _SCALAR) and isinstance(cores, _SCALAR) and isinstance(lanes, _SCALAR):
            check(batch_size >= 1, "batch_size", ">= 1", batch_size)
            check(cores > 0, "cores", "> 0", cores)
            return self._latency_scalar(float(batch_size), float(cores)) * self.lane_factor(int(lanes))
        batches, shares = np.asarray(batch_size, np.float64), np.asarray(cores, np.float64)
        check(bool(np.all(batches >= 1)), "batch_size", ">= 1", batch_size)
        check(bool(np.all(shares > 0)), "cores", "> 0", cores)
        return np.asarray(self._latency_array(batches, shares) * self._factors(lanes))

    @overload
    def throughput_rps(self, batch_size: float, cores: float, lanes: int = 1) -> float: ...
    @overload
    def throughput_rps(self, batch_size: Array, cores: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def throughput_rps(self, batch_size: float, cores: Array, lanes: int | Array = 1) -> FloatArray: ...
    def throughput_rps(self, batch_size: Any, cores: Any, lanes: Any = 1) -> Any:
        """Predict the throughput of one lane that runs batches back to back: batch size over latency [1/s].

        Arguments, shapes and errors are those of `latency_s`.
        """
        latency: Any = self.latency_s(batch_size, cores, lanes)
        if isinstance(latency, float):
            return float(batch_size / latency)
        return np.asarray(np.asarray(batch_size, np.float64) / latency)

    @overload
    def cores_for(self, batch_size: float, latency_s: float, lanes: int = 1) -> float: ...
    @overload
    def cores_for(self, batch_size: Array, latency_s: float | Array, lanes: int | Array = 1) -> FloatArray: ...
    @overload
    def cores_for(self, batch_size: float, latency_s: Array, lanes: int | Array = 1) -> FloatArray: ...
    def cores_for(self, batch_size: Any, latency_s: Any, lanes: Any = 1) -> Any:
        """Return the smallest CPU share that keeps a batch within a latency, the inverse of `latency_s`.

        Parameters
        ----------
        batch_size
            Requests in the batch, >= 1.
        latency_s
            Latency that must not be exceeded [s]; any value.
        lanes
            Lanes that are busy at the same time, >= 1.

        Returns
        -------
        float or ndarray
            Cores of this one lane, continuous, exact up to rounding (some 1e-12 of the latency). ``inf``
            where no allocation is fast enough; 0 where any is. Shapes as for `latency_s`.

        Raises
        ------
        ValueError
            If a batch size or lane count is below 1 (of arrays, only lane counts are checked: this is the
            solver's inner loop).
        """
        if isinstance(batch_size, _SCALAR) and isinstance(latency_s, _SCALAR) and isinstance(lanes, _SCALAR):
            check(batch_size >= 1, "batch_size", ">= 1", batch_size)
            return self._cores_scalar(float(batch_size), float(latency_s) / self.lane_factor(int(lanes)))
        targets = np.asarray(latency_s, np.float64)
        if not (isinstance(lanes, int) and lanes == 1):
            targets = targets / self._factors(lanes)
        return self._cores_array(np.asarray(batch_size, np.float64), targets)

    def lane_factor(self, lanes: int) -> float:
        """Return how many times slower a batch is while *lanes* lanes are busy, >= 1; 1 for one lane.

        Raises
        ------
        ValueError
            If *lanes* is below 1.
        """
        if lanes == 1:
            return 1.0
        check(lanes >= 1, "lanes", ">= 1", lanes)
        if not self.lane_factors:
            return 1.0 + self.interference * (lanes - 1)
        low = (1, 1.0)
        slope = 0.0
        for high in self.lane_factors:
            slope = (high[1] - low[1]) / (high[0] - low[0])
            if lanes <= high[0]:
                break
            low = high
        return low[1] + slope * (lanes - low[0])

    def _factors(self, lanes: Any) -> Any:
        if isinstance(lanes, _SCALAR):
            return self.lane_factor(int(lanes))
        counts = np.asarray(lanes)
        return np.array([self.lane_factor(int(k)) for k in counts.ravel()]).reshape(counts.shape)

    # -- one lane; what `LatencyTable` replaces

    def _latency_scalar(self, batch_size: float, cores: float) -> float:
        parallel = self.gamma_s * batch_size + self.epsilon_s
        parallel_s = parallel / cores if parallel > 0 else 0.0
        return parallel_s + (self.delta_s * batch_size + self.eta_s)  # in this order, as for arrays

    def _latency_array(self, batch_size: FloatArray, cores: FloatArray) -> FloatArray:
        parallel = np.maximum(self.gamma_s * batch_size + self.epsilon_s, 0.0)
        return np.asarray(parallel / cores + (self.delta_s * batch_size + self.eta_s))

    def _cores_scalar(self, batch_size: float, latency_s: float) -> float:
        parallel = self.gamma_s * batch_size + self.epsilon_s
        left_s = latency_s - (self.delta_s * batch_size + self.eta_s)
        if parallel <= 0:
            return 0.0 if left_s >= 0 else np.inf
        return parallel / left_s if left_s > 0 else np.inf

    def _cores_array(self, batch_size: FloatArray, latency_s: FloatArray) -> FloatArray:
        parallel = np.maximum(self.gamma_s * batch_size + self.epsilon_s, 0.0)
        left_s = latency_s - (self.delta_s * batch_size + self.eta_s)
        parallel, left_s = np.broadcast_arrays(parallel, left_s)
        cores = np.full(left_s.shape, np.inf)
        np.divide(parallel, left_s, out=cores, where=left_s > 0)
        cores[(left_s == 0) & (parallel == 0)] = 0.0
        return cores


def check(fine: bool | np.bool_, name: str, range_: str, value: object) -> None:
    """Raise the ``ValueError`` of a bad argument unless it is *fine*."""
    if not fine:
        raise ValueError(f"{name} must be {range_}, got {value!r}")
