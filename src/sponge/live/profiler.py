"""Profiler: measure a model's latency over batch sizes, CPU shares and busy lanes, as it will be served.

* Every run is made as in service: on a lane's thread, with the thread count that goes with the share of cores, and
  with the quota in force for exactly the threads that run the model. Only ``session.run`` is timed: handing a batch
  to its lane is the scheduler's time, not the model's.
* Measuring goes in rounds over all cells, each round in a new random order and a few runs at a time. A host that
  slows down for a second then slows a little of every cell, and does not look like a property of one.
* The first run of a session at a batch size is slower by design (memory is laid out) and is made before measuring.
  The first run after *switching* to a cell is kept: a service switches all the time.
* A cell is settled when its percentile is known closely enough. What cannot be settled within the time allowed is
  said in the profile; what is too slow to be measured at all is left out, and said too.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from sponge.core.values import intra_op_threads
from sponge.live import profiling_plan as plan
from sponge.live.profiling_lanes import ProfilingLanes
from sponge.live.profiling_plan import OpenCell
from sponge.live.scalers import CpuScaler, best_scaler
from sponge.live.session import ElasticSession, SessionOrModel
from sponge.profile import Cell, Profile, machine_fingerprint, package_versions

Progress: TypeAlias = Callable[[int, int, str], None]
Array: TypeAlias = "np.ndarray[Any, Any]"

WHOLE_CORES_ONLY = ("threads", "affinity")
"""Ways of limiting that know whole cores only: a fraction would measure the next whole number, under a wrong name."""


class Profiler:
    """Measures an ONNX model on this machine.

    Parameters
    ----------
    session
        What is served: an `ElasticSession`, or an ``onnxruntime.InferenceSession`` or a model's path, which is
        wrapped in one for the time of the measurement.
    batch_sizes
        By default 1, 2, 4, 8 and 16; only 1 where the model fixes its batch axis.
    cores
        Shares of one lane [cores]; by default 0.5, 1, 1.5, 2, 3, 4, 6, 8, then doubling, up to all there are. Only
        whole ones where nothing but the thread count or affinity limits them.
    lanes
        Numbers of busy lanes; by default powers of two that fit. Several lanes are measured on a few cells only, to
        see how they slow each other.
    scaler
        Limits the CPU share; by default `best_scaler`'s choice. Whatever it limited before it limits no longer.
    shapes
        By input name the sizes of its axes, for models that leave others than the batch open.
    inputs
        One request to measure with (its first row is repeated along the batch axis); random numbers by default.
        Give one if the model's work depends on the values.
    percentile
        Percentile that is to be known [%].
    min_samples, max_samples
        Runs of each cell, at least and at most (at most `MAX_SAMPLES_PER_CELL` are kept).
    budget_s
        Time for all of it [s]. Cells that would need more are left out, the slowest first; a single request on whole
        cores is measured `min_samples` times whatever it takes.
    relative_error
        A cell is settled when the percentile's 95 % interval is within this share of it either way; or, since a p99
        takes hundreds of runs of its own, when its median is known to half of that and other cells of its thread
        count have 1,000 runs from which to borrow the tail.
    progress
        Called as ``progress(done, total, text)``; True shows a bar (with rich installed) or lines on stderr.
    seed
        Of the order of measurement and of random inputs.
    model_name
        For reports; by default the name of the file, where there is one.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        session: ElasticSession | SessionOrModel,
        *,
        batch_sizes: Iterable[int] | None = None,
        cores: Iterable[float] | None = None,
        lanes: Iterable[int] | None = None,
        scaler: CpuScaler | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        inputs: Mapping[str, Array] | None = None,
        percentile: float = 99,
        min_samples: int = 3,
        max_samples: int = 400,
        budget_s: float = 25.0,
        relative_error: float = 0.1,
        progress: Progress | bool | None = None,
        seed: int = 0,
        model_name: str | None = None,
    ) -> None:
        self._batch_sizes = _ascending("batch_sizes", batch_sizes, 1)
        self._cores = _ascending("cores", cores, 0.01)
        self._lanes = _ascending("lanes", lanes, 1)
        for name, value, fine in (
            ("percentile", percentile, 0 < percentile < 100),
            ("min_samples", min_samples, min_samples >= 1),
            ("max_samples", max_samples, max_samples >= min_samples),
            ("budget_s", budget_s, budget_s > 0),
            ("relative_error", relative_error, relative_error > 0),
        ):
            if not fine:
                raise ValueError(f"{name} is out of range: {value!r}")
        self._session = session
        self._scaler = scaler
        self._shapes = shapes
        self._inputs = inputs
        self._percentile = percentile
        self._min_samples = min_samples
        self._max_samples = max_samples
        self._budget_s = budget_s
        self._relative_error = relative_error
        self._progress = progress
        self._random = np.random.default_rng(seed)
        self._seed = seed
        self._name = _name_of(session) if model_name is None else model_name
        self._notes: list[str] = []

    def run(self) -> Profile:
        """Measure, and return the profile.

        Raises
        ------
        CpuControlError
            If the kernel refuses a quota that it allowed before.
        Exception
            What the model raises for the inputs.
        """
        own_session = not isinstance(self._session, ElasticSession)
        session = self._session if isinstance(self._session, ElasticSession) else ElasticSession(self._session)
        try:
            scaler = best_scaler("auto") if self._scaler is None else self._scaler
            before = scaler.cores
            try:
                return self._run(session, scaler)
            finally:
                if self._scaler is None:
                    scaler.close()
                else:
                    scaler.adopt(())
                    scaler.scale(before)
        finally:
            if own_session:
                session.close()

    def _run(self, session: ElasticSession, scaler: CpuScaler) -> Profile:
        self._notes = []
        batch_sizes, shares, lanes = self._axes(session, scaler)
        session.reserve(lanes[-1])
        examples = {size: self._example(session, size) for size in batch_sizes}
        shapes = {
            name: array.shape[1:] if session.dynamic_batch else array.shape
            for name, array in examples[batch_sizes[0]].items()
        }
        started_at = time.perf_counter()
        session.warm_up(batch_sizes[:1], shapes=shapes)
        with ProfilingLanes(session, lanes[-1]) as runners, _Display(self._progress) as show:
            scaler.adopt((*session.thread_ids(), *runners.thread_ids))
            measure = _Measure(session, scaler, runners, examples)
            cells = self._affordable(measure, plan.grid(batch_sizes, shares, lanes, session.max_threads), session)
            session.warm_up({cell.batch_size for cell in cells} - set(batch_sizes[:1]), shapes=shapes)
            self._measure_all(measure, cells, started_at + self._budget_s, show)
        return self._profile(scaler.how, session, cells, shapes)

    def _axes(self, session: ElasticSession, scaler: CpuScaler) -> tuple[list[int], list[float], list[int]]:
        """Return batch sizes, shares and lane counts that this session and scaler can do."""
        most = session.max_threads
        batch_sizes = list(self._batch_sizes or plan.BATCH_SIZES)
        if not session.dynamic_batch:
            batch_sizes = [1]
            self._notes.append("The model's batch axis is fixed: only batch size 1 was measured.")
        whole = scaler.how in WHOLE_CORES_ONLY
        shares = list(self._cores) or plan.default_shares(most, whole=whole)
        if shares[-1] > most:
            raise ValueError(f"cores must be at most the session's max_threads ({most}), got {shares[-1]!r}")
        if whole and any(share != int(share) for share in shares):
            raise ValueError(f"cores must be whole numbers where CPU is limited by {scaler.how}, got {shares!r}")
        if whole:
            self._notes.append(f"CPU was limited by {scaler.how}: fractions of a core were not measured.")
        lanes = list(self._lanes) or plan.default_lanes(most)
        if lanes[-1] > most:
            raise ValueError(f"lanes must be at most the session's max_threads ({most}), got {lanes[-1]!r}")
        offered = {share: scaler.scale(share) for share in shares}
        missing = [share for share in shares if offered[share] < share * 0.999]
        if missing:
            self._notes.append(f"Not measured, as less is granted here: {_listed(f'{c:g}' for c in missing)} cores.")
            shares = [share for share in shares if share not in missing]
        if not shares:
            raise ValueError(
                f"cores: none of {sorted(offered)!r} is granted here; the limit is {max(offered.values())}"
            )
        return batch_sizes, shares, sorted({1, *lanes})

    def _example(self, session: ElasticSession, batch_size: int) -> dict[str, Array]:
        if self._inputs is None:
            return session.example_inputs(batch_size, shapes=self._shapes, seed=self._seed)
        if not session.dynamic_batch:
            return dict(self._inputs)
        return {name: np.repeat(array[:1], batch_size, axis=0) for name, array in self._inputs.items()}

    def _affordable(
        self, measure: _Measure, grid: Sequence[tuple[int, float, int]], session: ElasticSession
    ) -> list[OpenCell]:
        """Make the cells, without those that would take too long; a single request tells what to expect."""
        size = min(size for size, _, _ in grid)
        shares = sorted({share for _, share, _ in grid})
        near_one = min(shares, key=lambda share: abs(share - 1))
        pilots = {}
        for share in {near_one, shares[-1]}:
            pilot = OpenCell(size, share, 1, session.width_for(intra_op_threads(share)), 1.0)
            pilots[share] = float(np.median(measure(pilot, 3))) / size
        guess = plan.expected_latency(pilots[near_one] * min(near_one, 1), pilots[shares[-1]], shares[-1])
        cells = [OpenCell(b, c, k, session.width_for(intra_op_threads(c)), guess(b, c)) for b, c, k in grid]
        # a part of the time is left for warming up, and because a guess may be wrong
        kept, dropped = plan.affordable(cells, 0.75 * self._budget_s, self._min_samples)
        if dropped:
            self._notes.append(f"Left out, as too slow for a budget of {self._budget_s:g} s: {_listed(dropped)}.")
        return kept

    def _measure_all(self, measure: _Measure, cells: list[OpenCell], end: float, show: _Display) -> None:
        """Visit unsettled cells in random order, round after round, until all are settled or time is up.

        A slow cell that has had its minimum waits until the others have had as much time.
        """
        started_at = time.perf_counter()
        visit_s = plan.visit_time(self._budget_s, len(cells))
        while unsettled := [cell for cell in cells if not cell.settled]:
            fair_s = sum(cell.spent_s for cell in unsettled) / len(unsettled)
            for k in self._random.permutation(len(unsettled)):
                cell = unsettled[int(k)]
                missing = self._min_samples - len(cell.samples_s)
                now = time.perf_counter()
                if missing <= 0 and (now >= end or cell.spent_s > fair_s):
                    continue
                runs = -(-missing // cell.lanes) if now >= end else cell.runs_for(visit_s)
                cell.samples_s += measure(cell, runs)
                settled = sum(other.settled for other in cells) / len(cells)
                spent = min((now - started_at) / max(end - started_at, 1e-9), 1.0)
                show(min(int(100 * max(settled, spent)), 99), 100, f"{cell}: {cell.latency_s * 1e3:.1f} ms")
            self._settle(cells)
            if time.perf_counter() >= end and all(len(cell.samples_s) >= self._min_samples for cell in cells):
                break
        show(100, 100, f"{sum(len(cell.samples_s) for cell in cells)} runs of {len(cells)} cells")

    def _settle(self, cells: Sequence[OpenCell]) -> None:
        runs: dict[int, int] = {}
        for cell in cells:
            runs[cell.threads] = runs.get(cell.threads, 0) + len(cell.samples_s)
        for cell in cells:
            cell.settled = plan.is_settled(
                cell,
                runs[cell.threads],
                percentile=self._percentile,
                relative_error=self._relative_error,
                max_samples=self._max_samples,
            )

    def _profile(
        self, how: str, session: ElasticSession, cells: Sequence[OpenCell], shapes: Mapping[str, Sequence[int]]
    ) -> Profile:
        unsettled = sum(not cell.settled for cell in cells)
        if unsettled:
            self._notes.append(
                f"{unsettled} of {len(cells)} cells were not settled to {self._relative_error:.0%} of their "
                f"p{self._percentile:g} within {self._budget_s:g} s; a larger budget would make them surer."
            )
        return Profile(
            cells=[
                Cell.of(
                    batch_size=cell.batch_size,
                    cores=cell.cores,
                    lanes=cell.lanes,
                    threads=cell.threads,
                    samples_s=cell.samples_s,
                    settled=cell.settled,
                    seed=self._seed,
                )
                for cell in sorted(cells, key=lambda cell: (cell.lanes, cell.batch_size, cell.cores))
            ],
            model_hash=session.model_hash,
            model_name=self._name,
            input_shapes={
                name: (1, *shape) if session.dynamic_batch else tuple(shape) for name, shape in shapes.items()
            },
            machine=machine_fingerprint(),
            versions=package_versions(),
            cpu_control=how,
            measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            notes=tuple(self._notes),
        )


class _Measure:
    """Runs a cell as it would be served, with its quota, and returns the service times [s]."""

    def __init__(
        self,
        session: ElasticSession,
        scaler: CpuScaler,
        runners: ProfilingLanes,
        examples: Mapping[int, Mapping[str, Array]],
    ) -> None:
        self._scaler = scaler
        self._runners = runners
        self._examples = examples

    def __call__(self, cell: OpenCell, runs: int) -> list[float]:
        self._scaler.scale(cell.cores * cell.lanes)
        inputs = self._examples[cell.batch_size]
        return self._runners.run(inputs, threads=cell.threads, lanes=cell.lanes, runs=runs)


class _Display:
    """Shows progress: to a callback, as a bar if rich is there, else as lines on stderr; or not at all."""

    def __init__(self, progress: Progress | bool | None) -> None:
        self._callback = progress if callable(progress) else None
        self._bar: Any = None
        self._shown = -1
        self._lines = progress is True
        if progress is True:
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ImportError:
                return
            self._lines = False
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("profiling", total=100)

    def __call__(self, done: int, total: int, text: str) -> None:
        if self._callback is not None:
            self._callback(done, total, text)
        elif self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif self._lines and (done - self._shown >= 10 or done == total):
            self._shown = done
            print(f"profiling: {done} of {total} %, {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _ascending(name: str, values: Iterable[Any] | None, least: float) -> tuple[Any, ...]:
    if values is None:
        return ()
    chosen = tuple(sorted(set(values)))
    if not chosen or not all(least <= value < float("inf") for value in chosen):
        raise ValueError(f"{name} must hold numbers of at least {least:g}, got {chosen!r}")
    return chosen


def _listed(things: Iterable[object]) -> str:
    return "; ".join(map(str, things))


def _name_of(session: object) -> str:
    if isinstance(session, (str, os.PathLike)):
        return os.path.basename(os.fspath(session))
    path = getattr(session, "_model_path", None)
    return os.path.basename(path) if isinstance(path, str) else ""
