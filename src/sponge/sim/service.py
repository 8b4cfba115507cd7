"""How long things take in a simulated service: batches, changes of the allocation, decisions.

Rules, and why they hold:

* Every kind of chance has a stream of its own, from which each batch (each decision) takes exactly one number. So the
  noise of the k-th batch that starts depends on the seed and on k alone, whatever else is switched on.
* The latency is the mean; noise has mean 1 and keeps it there. Stragglers come on top.
* A batch on fewer cores than it was planned with takes what the latency model says for that many.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import attrs
import numpy as np
import numpy.typing as npt

from sponge.core.latency import Latency, LatencyModel
from sponge.profile import Cell, Profile

_BLOCK = 4096
"""Random numbers drawn at a time: one call of numpy costs as much as some hundred numbers."""
_MAX_REMEMBERED = 65_536


def _within(low: float, high: float) -> Callable[[object, attrs.Attribute[float], float], None]:
    def check(_: object, attribute: attrs.Attribute[float], value: float) -> None:
        if not low <= value <= high or math.isinf(value):
            limits = f"finite and at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise ValueError(f"{attribute.name} must be {limits}, got {value!r}")

    return check


@attrs.frozen
class Service:
    """A simulated service: what a batch, a change of the allocation, and a decision take.

    Parameters
    ----------
    latency
        A latency model, whose prediction is the mean service time; or a profile, whose samples are drawn from (with
        replacement) in the nearest measured cell and moved to other batch sizes and cores as the model of its
        medians says. In a measured cell itself the service times are its samples.
    noise_cv
        Standard deviation of the service time over its mean, ≥ 0: each batch's time is multiplied by a random number
        of mean 1. With a profile it comes on top of the scatter of the samples.
    noise
        Its distribution: ``"lognormal"``, or ``"gamma"``, which with ``noise_cv=1`` is exponential.
    straggler_share, straggler_factor
        Share of the batches in [0, 1] that take, at random, so many times longer, ≥ 1; this does raise the mean.
    interference
        Slowdown for each further lane that is busy when a batch starts, ≥ 0: its time is multiplied by
        ``1 + interference·(busy − 1)``. None: what *latency* says of busy lanes.
    resize_delay_s
        From asking for more cores until they are in force [s], ≥ 0: 0 for a quota of this process's own, about 1 for
        a pod that is resized in place, 10 and more for a new replica.
    shrink_delay_s
        The same for fewer cores; None: as long as for more.
    decision_s, decision_cv
        Mean time that the controller takes for one event [s], ≥ 0, and standard deviation over mean (lognormal). What
        it decides happens that much later, and events that come meanwhile wait.
    slowdown
        How many times longer a batch takes that starts at an instant [s from the start of the workload]: a busy
        neighbour, a CPU that changes its frequency, a model that has become slower. It must return numbers above 0.
        None: 1 at all times.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    A resize that is under way is not finished first when another is asked for: the latest counts. More precisely, what
    is in force at *t* is the least that was asked for during ``[t − resize_delay_s, t − shrink_delay_s]``: a core is
    there once it has been wanted for long enough without a break. (If shrinking takes longer: the most that was asked
    for during ``[t − shrink_delay_s, t − resize_delay_s]``, which is the stabilisation window of horizontal
    autoscalers.) With equal delays that is what was asked for one delay ago.
    """

    latency: Latency | Profile
    noise_cv: float = attrs.field(default=0.0, kw_only=True, validator=_within(0, math.inf))
    noise: Literal["lognormal", "gamma"] = attrs.field(
        default="lognormal", kw_only=True, validator=attrs.validators.in_(("lognormal", "gamma"))
    )
    straggler_share: float = attrs.field(default=0.0, kw_only=True, validator=_within(0, 1))
    straggler_factor: float = attrs.field(default=3.0, kw_only=True, validator=_within(1, math.inf))
    interference: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_within(0, math.inf))
    )
    resize_delay_s: float = attrs.field(default=0.0, kw_only=True, validator=_within(0, math.inf))
    shrink_delay_s: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_within(0, math.inf))
    )
    decision_s: float = attrs.field(default=0.0, kw_only=True, validator=_within(0, math.inf))
    decision_cv: float = attrs.field(default=0.0, kw_only=True, validator=_within(0, math.inf))
    slowdown: Callable[[float], float] | None = attrs.field(default=None, kw_only=True)


class Times:
    """The times of one run of a `Service`, drawn as it goes.

    Parameters
    ----------
    service
        What to draw from.
    seed
        The same seed gives the same times in the same order.
    """

    def __init__(self, service: Service, seed: int) -> None:
        self._service = service
        noise, straggler, sample, decision = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
        self._factors = _factors(service, noise, straggler)
        self._decisions = _stream(lambda n: _noise("lognormal", service.decision_cv, decision, n))
        self._uniforms = _stream(sample.random)
        self._model: Latency
        self._cells: tuple[Cell, ...] = ()
        if isinstance(service.latency, Profile):
            self._model = LatencyModel.fit(service.latency, percentile=50)
            self._cells = service.latency.cells
        else:
            self._model = service.latency
        self._latencies: dict[tuple[int, float, int], float] = {}
        self._samples: dict[tuple[int, float, int], list[float]] = {}
        chance = service.noise_cv or service.straggler_share or self._cells
        self.plain = not chance and service.slowdown is None
        """Whether a batch takes exactly its latency."""

    def latency_s(self, rows: int, cores: float, lanes: int) -> float:
        """Return the time of a batch without chance [s]; ``inf`` on no cores."""
        key = (rows, cores, lanes)
        latency_s = self._latencies.get(key)
        if latency_s is None:
            if len(self._latencies) >= _MAX_REMEMBERED:  # shares of continuous cores are ever new
                self._latencies.clear()
            latency_s = self._latencies[key] = self._predict_s(rows, cores, lanes)
        return latency_s

    def factor(self, rows: int, cores: float, lanes: int, now: float = 0.0) -> float:
        """Draw how many times that the next batch takes, which starts *now*.

        Raises
        ------
        ValueError
            If the service's slowdown is not above 0.
        """
        if self.plain:
            return 1.0
        factor = next(self._factors)
        if self._service.slowdown is not None:
            slowdown = self._service.slowdown(now)
            if not 0 < slowdown < math.inf:
                raise ValueError(f"slowdown must be above 0 and finite, got {slowdown!r} at {now:g} s")
            factor *= slowdown
        if self._cells:
            samples = self._relative_samples(rows, cores, lanes)
            factor *= samples[int(next(self._uniforms) * len(samples))]
        return factor

    def decision_s(self) -> float:
        """Draw how long the next decision takes [s]."""
        mean_s = self._service.decision_s
        return mean_s * next(self._decisions) if mean_s else 0.0

    def _predict_s(self, rows: int, cores: float, lanes: int) -> float:
        if cores <= 0:
            return math.inf
        interference = self._service.interference
        if interference is None:
            return self._model.latency_s(rows, cores, lanes)
        return self._model.latency_s(rows, cores) * (1.0 + interference * (lanes - 1))

    def _relative_samples(self, rows: int, cores: float, lanes: int) -> list[float]:
        """Return the samples of the nearest cell over the model's latency there."""
        key = (rows, cores, lanes)
        if key not in self._samples:
            known_lanes = lanes if self._service.interference is None else 1

            def distance(cell: Cell) -> float:
                pairs = ((cell.batch_size, rows), (cell.cores, cores), (cell.lanes, known_lanes))
                return sum(abs(math.log(a / b)) for a, b in pairs)

            cell = min(self._cells, key=distance)
            expected_s = self._model.latency_s(cell.batch_size, cell.cores, cell.lanes)
            self._samples[key] = [sample / expected_s for sample in cell.samples_s]
        return self._samples[key]


class Resizer:
    """The cores in force, of what was asked for so far (see `Service`, Notes).

    Parameters
    ----------
    service
        Holds the delays.
    cores
        In force at the start; None: whatever is asked for first, at once.
    """

    def __init__(self, service: Service, cores: float | None) -> None:
        grow_s = service.resize_delay_s
        shrink_s = grow_s if service.shrink_delay_s is None else service.shrink_delay_s
        self._near_s, self._far_s = min(grow_s, shrink_s), max(grow_s, shrink_s)
        self._sign = 1.0 if grow_s >= shrink_s else -1.0
        self._coming: deque[tuple[float, float, float]] = deque()
        # What was asked for during the window, as (cores, until), without what a later and lesser wish outlives:
        # the first is the least. With the sign turned, the most.
        self._window: deque[tuple[float, float]] = deque()
        self.cores = math.inf if cores is None else cores
        """In force now; ``inf`` before anything was asked for."""
        if cores is not None:
            self._window.append((self._sign * cores, math.inf))
        self.next_at = math.inf
        """When to `advance` next [s]; ``inf`` if nothing is under way."""

    def ask(self, cores: float, now: float) -> bool:
        """Ask for an allocation; return whether it is in force already."""
        if not self._window:
            self._window.append((self._sign * cores, math.inf))
            self.cores = cores
            return True
        if not self._far_s:
            self.cores = cores
            return True
        settled = cores == self.cores and self.next_at == math.inf
        if not settled:
            self._coming.append((now + self._near_s, now + self._far_s, cores))
            self.advance(now)
        return settled

    def advance(self, now: float) -> bool:
        """Let what is due come into force; return whether that changed anything."""
        coming, window, sign = self._coming, self._window, self._sign
        while coming and coming[0][0] <= now:
            _, until, cores = coming.popleft()
            window[-1] = (window[-1][0], until)
            while window and window[-1][0] >= sign * cores:
                window.pop()
            window.append((sign * cores, math.inf))
        while window[0][1] <= now:
            window.popleft()
        self.next_at = min(coming[0][0] if coming else math.inf, window[0][1])
        before, self.cores = self.cores, sign * window[0][0]
        return self.cores != before


def _stream(draw: Callable[[int], npt.NDArray[np.float64]]) -> Iterator[float]:
    while True:
        yield from draw(_BLOCK).tolist()


def _noise(kind: str, cv: float, rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """Draw numbers above 0 with mean 1 and this coefficient of variation."""
    if cv == 0:
        return np.ones(count)
    if kind == "gamma":
        return rng.gamma(1 / cv**2, cv**2, count)
    variance = math.log1p(cv**2)
    return rng.lognormal(-variance / 2, math.sqrt(variance), count)


def _factors(service: Service, noise: np.random.Generator, straggler: np.random.Generator) -> Iterator[float]:
    def draw(count: int) -> npt.NDArray[np.float64]:
        factors = _noise(service.noise, service.noise_cv, noise, count)
        late = straggler.random(count) < service.straggler_share
        return np.where(late, factors * service.straggler_factor, factors)

    return _stream(draw)
