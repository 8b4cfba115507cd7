"""Bandwidth over time, and how long an upload takes under it.

A trace is a step function of bytes per second. Everything here is exact for such a function: an upload that
meets an outage waits it out, and one that outlives the trace goes on at its beginning (``loops=True``) or
at the last bandwidth (``loops=False``). Each request has the link to itself; clients that share one are not
modelled. Reading log files is the work of `sponge.workload.logs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

MAX_BYTES_PER_S = 1e15
MIN_MEAN_BYTES_PER_S = 1e-3
MIN_DURATION_S = 1e-3
MAX_TIME_S = 1e10
"""Bounds far outside of any network; inside them no sum or quotient here overflows."""
LTE_BYTES_PER_S = 3.45e6
"""Mean of `lte_like` if nothing else is asked for: 27.6 Mbit/s, as in the log that it resembles."""


def _as_floats(values: Sequence[float] | npt.ArrayLike) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


@attrs.frozen(kw_only=True, eq=False)
class BandwidthTrace:
    """A step function of bandwidth: ``bytes_per_s[i]`` holds from ``times_s[i]`` to the next time, or to
    ``end_s``.

    Parameters
    ----------
    times_s
        Start of each step [s], shape ``(n_steps,)``, strictly increasing; the first is 0.
    bytes_per_s
        Bandwidth of each step [bytes/s], shape ``(n_steps,)``, ≥ 0; an outage is 0.
    end_s
        End of the last step [s].
    loops
        Whether the trace starts again at *end_s*. If not, its last bandwidth holds for ever.

    Raises
    ------
    ValueError
        If the times do not increase from 0 to *end_s*, a bandwidth is negative or not finite, the trace is
        shorter than a millisecond, or it carries no data at all.
    """

    times_s: FloatArray = attrs.field(converter=_as_floats)
    bytes_per_s: FloatArray = attrs.field(converter=_as_floats)
    end_s: float = attrs.field(converter=float)
    loops: bool = True
    _edges_s: FloatArray = attrs.field(init=False, repr=False)
    _sent_bytes: FloatArray = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _check_steps(self.times_s, self.bytes_per_s, self.end_s)
        edges_s = np.append(self.times_s, self.end_s)
        sent_bytes = np.concatenate([[0.0], np.cumsum(self.bytes_per_s * np.diff(edges_s))])
        if sent_bytes[-1] < MIN_MEAN_BYTES_PER_S * self.end_s:
            raise ValueError(f"bytes_per_s must carry data: it delivers {sent_bytes[-1]:g} bytes in {self.end_s:g} s")
        object.__setattr__(self, "_edges_s", edges_s)
        object.__setattr__(self, "_sent_bytes", sent_bytes)

    @property
    def duration_s(self) -> float:
        """Length of the trace [s]."""
        return self.end_s

    @property
    def mean_bytes_per_s(self) -> float:
        """Bandwidth averaged over time [bytes/s]."""
        return float(self._sent_bytes[-1]) / self.end_s

    def at(self, time_s: npt.ArrayLike) -> FloatArray:
        """Return the bandwidth in force at given instants.

        Parameters
        ----------
        time_s
            Instants [s], any shape, ≥ 0.

        Returns
        -------
        ndarray
            Bandwidth [bytes/s], of the same shape.
        """
        phase_s, _ = self._phase(_nonnegative("time_s", time_s))
        step = np.searchsorted(self.times_s, phase_s, side="right") - 1
        return np.asarray(self.bytes_per_s[step], dtype=np.float64)

    def resample(self, step_s: float = 1.0) -> BandwidthTrace:
        """Return the trace averaged over steps of *step_s* seconds; the last step may be shorter.

        Raises
        ------
        ValueError
            If *step_s* is not positive, or so small that more than ten million steps would be made.
        """
        if not (step_s > 0 and self.end_s / step_s <= 1e7):
            raise ValueError(f"step_s must be positive and give at most 10 million steps, got {step_s!r}")
        starts_s = np.arange(math.ceil(self.end_s / step_s)) * step_s
        starts_s = starts_s[starts_s < self.end_s]
        edges_s = np.append(starts_s, self.end_s)
        delivered = np.diff(np.interp(edges_s, self._edges_s, self._sent_bytes))
        return BandwidthTrace(
            times_s=starts_s, bytes_per_s=delivered / np.diff(edges_s), end_s=self.end_s, loops=self.loops
        )

    def upload_time_s(
        self, sent_at_s: npt.ArrayLike, payload_bytes: npt.ArrayLike, *, shortcut: bool = False
    ) -> FloatArray:
        """Return how long it takes to send payloads that start at given instants.

        The result is the smallest u ≥ 0 with ∫ bandwidth(t) dt ≥ payload over [sent, sent + u].

        Parameters
        ----------
        sent_at_s
            Start of each upload [s from the start of the trace], ≥ 0.
        payload_bytes
            Size of each [bytes], ≥ 0; broadcast against *sent_at_s*.
        shortcut
            Divide by the bandwidth in force when the upload starts, as if it lasted: what the published
            results do. Much too optimistic or pessimistic where the bandwidth changes during the upload. A
            trace with steps much shorter than an upload (packet-delivery files) should be resampled to one
            second first.

        Returns
        -------
        ndarray
            Upload times [s] of the broadcast shape; ``inf`` if the upload never ends (no bandwidth holds
            for ever).

        Raises
        ------
        ValueError
            If an instant or a size is negative or not finite.
        """
        sent, payload = np.broadcast_arrays(
            _nonnegative("sent_at_s", sent_at_s), _nonnegative("payload_bytes", payload_bytes)
        )
        if shortcut:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(payload > 0, payload / self.at(sent), 0.0)
        phase_s, beyond_s = self._phase(sent)
        target = np.interp(phase_s, self._edges_s, self._sent_bytes) + payload
        if self.loops:
            duration_s = self._looped_end(target) - phase_s
        else:
            duration_s = self._held_end(target, payload, beyond_s) - phase_s
        return np.where(payload > 0, np.maximum(duration_s, 0.0), 0.0)

    def _phase(self, time_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return each instant's place in the trace and, without loops, how far it lies beyond the end [s]."""
        if self.loops:
            phase_s = np.mod(time_s, self.end_s)
            return phase_s, np.zeros_like(phase_s)
        return np.minimum(time_s, self.end_s), np.maximum(time_s - self.end_s, 0.0)

    def _crossing(self, target: FloatArray) -> FloatArray:
        """Return the first instant by which *target* bytes (0 < target ≤ total) are delivered [s]."""
        edge = np.clip(np.searchsorted(self._sent_bytes, target, side="left"), 1, len(self.bytes_per_s))
        rate = self.bytes_per_s[edge - 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            into_step_s = np.where(rate > 0, (target - self._sent_bytes[edge - 1]) / rate, 0.0)
        return np.asarray(self._edges_s[edge - 1] + into_step_s, dtype=np.float64)

    def _looped_end(self, target: FloatArray) -> FloatArray:
        total = float(self._sent_bytes[-1])
        # A target that is a whole number of rounds is reached at the end of the last of them, not after it:
        # the next round may begin with an outage.
        rounds = np.maximum(np.ceil(target / total) - 1.0, 0.0)
        rest = np.clip(target - rounds * total, 0.0, total)
        return rounds * self.end_s + self._crossing(rest)

    def _held_end(self, target: FloatArray, payload: FloatArray, beyond_s: FloatArray) -> FloatArray:
        total, last = float(self._sent_bytes[-1]), float(self.bytes_per_s[-1])
        excess = np.where(beyond_s > 0, payload, target - total)
        with np.errstate(divide="ignore", invalid="ignore"):
            after_s = np.where(excess > 0, excess / last, 0.0)
        return np.where(excess > 0, self.end_s + after_s, self._crossing(np.minimum(target, total)))


def _nonnegative(name: str, values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if not np.all(np.isfinite(array) & (array >= 0)):
        bad = array[~(np.isfinite(array) & (array >= 0))].flat[0]
        raise ValueError(f"{name} must be finite and not negative, got {bad!r}")
    return array


def _check_steps(times_s: FloatArray, bytes_per_s: FloatArray, end_s: float) -> None:
    if times_s.ndim != 1 or times_s.shape != bytes_per_s.shape or times_s.size == 0:
        raise ValueError(
            "times_s and bytes_per_s must be one-dimensional, of equal length and not empty, "
            f"got shapes {times_s.shape} and {bytes_per_s.shape}"
        )
    if times_s[0] != 0.0:
        raise ValueError(f"times_s must start at 0, got {times_s[0]!r}")
    edges_s = np.append(times_s, end_s)
    if not (np.all(np.isfinite(edges_s)) and np.all(np.diff(edges_s) > 0)):
        raise ValueError("times_s must be finite and strictly increasing up to end_s")
    if not MIN_DURATION_S <= end_s <= MAX_TIME_S:
        raise ValueError(f"end_s must be between {MIN_DURATION_S:g} and {MAX_TIME_S:g}, got {end_s!r}")
    if not np.all((bytes_per_s >= 0) & (bytes_per_s <= MAX_BYTES_PER_S)):
        raise ValueError(f"bytes_per_s must be between 0 and {MAX_BYTES_PER_S:g} everywhere")


def lte_like(
    duration_s: float,
    rng: np.random.Generator,
    *,
    mean_bytes_per_s: float = LTE_BYTES_PER_S,
    sigma: float = 0.35,
    correlation: float = 0.86,
    noise_share: float = 0.08,
    dip_share: float = 0.015,
    dip_depth: float = 0.25,
    dip_length_s: float = 1.4,
) -> BandwidthTrace:
    """Return a synthetic trace, one step a second, that behaves like a phone's uplink on a bus.

    The logarithm of the bandwidth is Gaussian with standard deviation *sigma*: a first-order autoregression
    with *correlation* from one second to the next, plus white noise which carries *noise_share* of the
    variance. A two-state Markov chain multiplies it by *dip_depth* during dips, which last *dip_length_s*
    on average (at least a second each) and take *dip_share* of the time. The default values were chosen to
    resemble a ten-minute 4G log taken on a bus (mean 27.6 Mbit/s, coefficient of variation 0.37,
    autocorrelation 0.75, 0.63 and 0.44 after 1, 2 and 5 s, 1.5 % of the seconds below 0.3 of the mean,
    worst second 0.13 of the mean). In the long run a trace with these values has

    - mean *mean_bytes_per_s* exactly: E = exp(μ + σ²/2)·(1 − p + p·d) fixes μ (p: *dip_share*, d:
      *dip_depth*);
    - coefficient of variation sqrt(exp(σ²)·(1 − p + p·d²)/(1 − p + p·d)² − 1) = 0.37;
    - autocorrelation near 0.75 after 1 s, 0.63 after 2 s and 0.39 after 5 s;
    - about 1.2 % of the seconds below 0.3 of the mean.

    A short trace strays from these, as real ones do: consecutive seconds resemble each other.

    Parameters
    ----------
    duration_s
        Length [s], rounded up to whole seconds, ≥ 1.
    rng
        Source of randomness; the same state gives the same trace.
    mean_bytes_per_s
        Long-run mean [bytes/s]; the default is 27.6 Mbit/s.
    sigma, correlation, noise_share
        Of the logarithm of the bandwidth, as said above.
    dip_share, dip_depth, dip_length_s
        Share of the time in dips, in [0, 0.5); factor of the bandwidth in a dip, in [0, 1] (0: an outage);
        mean length of a dip [s], ≥ 1.

    Raises
    ------
    ValueError
        If a parameter is outside of its range.
    """
    _check_generator(duration_s, mean_bytes_per_s, sigma, correlation, noise_share)
    if not (0 <= dip_share < 0.5 and 0 <= dip_depth <= 1 and dip_length_s >= 1):
        raise ValueError(
            "dip_share must be in [0, 0.5), dip_depth in [0, 1] and dip_length_s ≥ 1, "
            f"got {dip_share!r}, {dip_depth!r} and {dip_length_s!r}"
        )
    n = math.ceil(duration_s)
    slow = _autoregression(rng.standard_normal(n), correlation)
    noise = rng.standard_normal(n)
    log_rate = sigma * (math.sqrt(1 - noise_share) * slow + math.sqrt(noise_share) * noise)
    factor = np.where(_dips(rng.random(n), dip_share, 1 / dip_length_s), dip_depth, 1.0)
    mu = math.log(mean_bytes_per_s) - sigma**2 / 2 - math.log(1 - dip_share + dip_share * dip_depth)
    return BandwidthTrace(times_s=np.arange(n), bytes_per_s=np.exp(mu + log_rate) * factor, end_s=n)


def _check_generator(
    duration_s: float, mean_bytes_per_s: float, sigma: float, correlation: float, noise_share: float
) -> None:
    if not 1 <= duration_s <= 1e7:
        raise ValueError(f"duration_s must be between 1 and 10 million, got {duration_s!r}")
    if not 1 <= mean_bytes_per_s <= 1e12:
        raise ValueError(f"mean_bytes_per_s must be between 1 and 1e12, got {mean_bytes_per_s!r}")
    if not (0 <= sigma <= 1 and 0 <= correlation < 1 and 0 <= noise_share <= 1):
        raise ValueError(
            "sigma and noise_share must be in [0, 1] and correlation in [0, 1), "
            f"got {sigma!r}, {noise_share!r} and {correlation!r}"
        )


def _autoregression(innovations: FloatArray, correlation: float) -> FloatArray:
    """Return a stationary first-order autoregression of unit variance."""
    scale = math.sqrt(1 - correlation**2)
    state = float(innovations[0])
    values = np.empty_like(innovations)
    values[0] = state
    for i, innovation in enumerate(innovations[1:].tolist(), start=1):
        state = correlation * state + scale * innovation
        values[i] = state
    return values


def _dips(uniforms: FloatArray, share: float, leave: float) -> npt.NDArray[np.bool_]:
    """Return where a stationary two-state chain is in its dip state."""
    enter = leave * share / (1 - share)
    inside = False
    states = np.empty(len(uniforms), dtype=np.bool_)
    for i, uniform in enumerate(uniforms.tolist()):
        threshold = share if i == 0 else (1 - leave if inside else enter)
        inside = uniform < threshold
        states[i] = inside
    return states
