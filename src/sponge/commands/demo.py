"""``sponge demo``: one model, one workload, several policies, one table.

Every policy meets the same requests with the same deadlines on the same scheduler, sessions and kernel; only the
controller differs. The load is scaled to the machine by the profile that is measured first, so that it means the
same on a fast machine as on a slow one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from sponge.commands.detector import INPUT_NAME, SIDE_PX, detector_path, pages
from sponge.commands.replay import AllocationRecorder, Inputs, Progress, Replayed, replay
from sponge.core.controller import Controller
from sponge.core.latency import Latency, LatencyModel
from sponge.core.protocol import ControllerProtocol
from sponge.core.solver import Solver
from sponge.live.profiler import Profiler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession, available_cpus
from sponge.measure import Recording, Series, Summary, print_table, save_figure, summarise, to_json, write_report
from sponge.profile import Profile
from sponge.sim.baselines import StaticController
from sponge.workload import PROCESSES, BandwidthTrace, Workload, load_bandwidth, lte_like

MOST_CORES = 4
"""By default: enough to see the difference, and one client thread can drive the load of as many."""
MAX_BATCH_SIZE = 8
LOAD = 1 / 3
"""Default rate, as a share of what single-core lanes on all cores can serve."""
PROFILE_S = 10.0
"""Time for the profile [s]: enough for the median, rough for the 99th percentile."""
BUSY_MACHINE_CORES = 0.15
"""Other processes that take more than this make the comparison doubtful."""
GENERATED_TRACE_S = 600.0
_SHAPES = {INPUT_NAME: (3, SIDE_PX, SIDE_PX)}


@attrs.frozen(kw_only=True)
class DemoSettings:
    """What the demo was asked for; None: chosen as the command's help says."""

    trace: Path | None = None
    rate_rps: float | None = attrs.field(default=None)
    slo_s: float = attrs.field(default=0.6)
    duration_s: float = attrs.field(default=12.0)
    payload_bytes: float = 500e3
    arrivals: str = attrs.field(default="bursts")
    phones: int = attrs.field(default=20)
    seed: int = 0
    max_cores: int | None = attrs.field(default=None)
    profile_s: float = PROFILE_S

    def __attrs_post_init__(self) -> None:
        for name in ("rate_rps", "slo_s", "duration_s", "profile_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.phones < 1:
            raise ValueError(f"phones must be at least 1, got {self.phones!r}")
        if self.arrivals not in PROCESSES:
            raise ValueError(f"arrivals must be one of {', '.join(PROCESSES)}, got {self.arrivals!r}")
        if self.max_cores is not None and not 1 <= self.max_cores <= available_cpus():
            raise ValueError(
                f"max_cores must be between 1 and the {available_cpus()} CPUs that this process may use, "
                f"got {self.max_cores!r}"
            )


@attrs.frozen(kw_only=True)
class DemoResult:
    """What came of the demo."""

    settings: dict[str, Any]
    """As used: what was asked for, and what was chosen."""
    summaries: Sequence[Summary]
    series: Sequence[Series]
    cores_used_by_others: Sequence[float]
    """During each policy's run."""
    recordings: Sequence[Recording]
    """Of each policy's run, as its scheduler saw it."""

    def to_json(self) -> dict[str, Any]:
        """Return settings and summaries as JSON values."""
        policies = [
            to_json(summary) | {"cores_used_by_others": None if math.isnan(others) else round(others, 3)}
            for summary, others in zip(self.summaries, self.cores_used_by_others, strict=True)
        ]
        return {"settings": self.settings, "policies": policies}

    def print(self) -> None:
        """Print the table, and a warning if the machine was not the demo's own."""
        print_table(self.summaries)
        most = max(self.cores_used_by_others)
        if most > BUSY_MACHINE_CORES:
            print(
                f"Other processes used up to {most:.1f} cores of this machine meanwhile: the runs were disturbed, and "
                "unequally. Repeat on an idle machine."
            )

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw budgets, cores and misses over time; errors as of `sponge.measure.save_figure`."""
        save_figure(path, self.series, title=self._title())

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write what `draw` draws, and more, as one HTML page; errors as of `sponge.measure.write_report`."""
        note = "Requests count from when they were handed over; the table of the command counts from their schedule."
        settings = {name: str(value) for name, value in self.settings.items()}
        write_report(path, self.recordings, title=self._title(), notes=[note], settings=settings)

    def _title(self) -> str:
        used = self.settings
        return (
            f"{used['rate_rps']:.0f} requests/s ({used['arrivals']}), {used['payload_bytes'] / 1000:.0f} kB each over "
            f"{used['network']}, answer due {used['slo_s']:g} s after sending"
        )


@attrs.frozen(kw_only=True)
class _Policy:
    name: str
    controller: ControllerProtocol


def run_demo(settings: DemoSettings, *, quiet: bool = False) -> DemoResult:
    """Profile the model, then replay one workload under each policy.

    Parameters
    ----------
    settings
        See `DemoSettings`.
    quiet
        Print nothing, for machines.

    Raises
    ------
    ImportError
        If the model's package is not installed.
    TraceError
        If the bandwidth log cannot be read.
    ValueError
        If no request would be sent.
    """
    trace = None if settings.trace is None else load_bandwidth(settings.trace)
    cores = settings.max_cores or min(available_cpus(), MOST_CORES)
    with ElasticSession(detector_path(), max_threads=cores, max_lanes=cores) as session:
        profile = _measure(session, settings.profile_s, quiet=quiet)
        typical = LatencyModel.fit(profile, 50)
        capacity_rps = cores * typical.throughput_rps(1, 1.0, cores)
        rate_rps = LOAD * capacity_rps if settings.rate_rps is None else settings.rate_rps
        workload = make_workload(settings, trace, rate_rps)
        used = _used(settings, trace, cores, rate_rps, capacity_rps, workload)
        if not quiet:
            print(_headline(used))
        session.warm_up(range(1, MAX_BATCH_SIZE + 1), shapes=_SHAPES)
        inputs = [{INPUT_NAME: page} for page in pages(8, np.random.default_rng([settings.seed, 2]))]
        runs, recordings = {}, []
        for policy in _policies(profile, cores):
            runs[policy.name], recording = _run(session, policy, workload, inputs, quiet=quiet)
            recordings.append(recording)
    return DemoResult(
        settings=used,
        summaries=[
            summarise(name, run.outcomes, run.allocation, cpu_seconds_used=run.cpu_seconds_used)
            for name, run in runs.items()
        ],
        series=[Series(policy=name, outcomes=run.outcomes, allocation=run.allocation) for name, run in runs.items()],
        cores_used_by_others=[run.cores_used_by_others for run in runs.values()],
        recordings=recordings,
    )


def make_workload(settings: DemoSettings, trace: BandwidthTrace | None, rate_rps: float) -> Workload:
    """Return the requests: send times and network from seeds of their own, the same for every policy.

    Each request is of a random phone, and each phone is at a random place of the trace.

    Raises
    ------
    ValueError
        If no request would be sent.
    """
    if trace is None:
        trace = lte_like(GENERATED_TRACE_S, np.random.default_rng([settings.seed, 0]))
    process = PROCESSES[settings.arrivals]
    sends = process(rate_rps, settings.duration_s, np.random.default_rng([settings.seed, 1]))
    if not len(sends):
        raise ValueError(f"duration_s={settings.duration_s:g} is too short for a request at {rate_rps:g} a second")
    rng = np.random.default_rng([settings.seed, 3])
    places_s = rng.random(settings.phones) * trace.duration_s
    offset_s = rng.choice(places_s, len(sends))
    return Workload.from_network(sends, trace, settings.payload_bytes, settings.slo_s, offset_s=offset_s)


def _measure(session: ElasticSession, budget_s: float, *, quiet: bool) -> Profile:
    """Profile the model, briefly, as it will be served."""
    return Profiler(
        session,
        batch_sizes=(1, 2, 4, MAX_BATCH_SIZE),
        shapes=_SHAPES,
        budget_s=budget_s,
        progress=not quiet,
        model_name=detector_path().name,
    ).run()


def _policies(profile: Profile, cores: int) -> list[_Policy]:
    """Return the policies to compare; the static ones with the batch size that the profile advises."""
    typical, latency = LatencyModel.fit(profile, 50), LatencyModel.fit(profile, 99)
    wide = best_batch_size(typical, cores, 1)
    narrow = best_batch_size(typical, 1.0, cores)
    solver = Solver(latency, max_cores=cores, max_batch_size=MAX_BATCH_SIZE, max_lanes=cores)
    policies = [
        _Policy(
            name="static, FIFO, one by one",
            controller=StaticController(cores, order="fifo", max_batch_size=1, latency=typical),
        ),
        _Policy(
            name=f"static, EDF, {_batches(wide)}",
            controller=StaticController(cores, order="edf", max_batch_size=wide, drop_late=True, latency=typical),
        ),
    ]
    if cores > 1:
        side_by_side = StaticController(
            cores, order="edf", max_batch_size=narrow, lanes=cores, drop_late=True, latency=typical
        )
        policies.append(_Policy(name=f"static, EDF, {cores} lanes, {_batches(narrow)}", controller=side_by_side))
    return [*policies, _Policy(name="sponge", controller=Controller(solver))]


def _batches(largest: int) -> str:
    return "one by one" if largest == 1 else f"batches to {largest}"


def best_batch_size(latency: Latency, lane_cores: float, lanes: int) -> int:
    """Return the smallest batch size within 5 % of the best throughput: what a careful operator would configure."""
    sizes = np.arange(1, MAX_BATCH_SIZE + 1)
    throughput_rps = latency.throughput_rps(sizes, lane_cores, lanes)
    return int(sizes[throughput_rps >= 0.95 * throughput_rps.max()][0])


def _run(
    session: ElasticSession, policy: _Policy, workload: Workload, inputs: Sequence[Inputs], *, quiet: bool
) -> tuple[Replayed, Recording]:
    recorder = AllocationRecorder()
    with (
        _progress(policy.name, len(workload), quiet=quiet) as progress,
        contextlib.closing(best_scaler()) as scaler,
        Scheduler(session, scaler=scaler, controller=policy.controller, recorder=recorder) as scheduler,
    ):
        scheduler.record(max(2 * len(workload), 1000))
        replayed = replay(workload, scheduler, recorder, inputs, progress=progress)
        return replayed, scheduler.recording(policy.name)


@contextlib.contextmanager
def _progress(name: str, total: int, *, quiet: bool) -> Iterator[Progress | None]:
    """Show a bar on standard error while the requests are answered."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread of its own: it would take the interpreter from the threads that are measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(name, total=total)

        def show(sent: int, answered: int) -> None:
            bar.update(task, completed=answered)
            bar.refresh()

        yield show
        bar.update(task, completed=total)
        bar.refresh()


def _used(
    settings: DemoSettings,
    trace: BandwidthTrace | None,
    cores: int,
    rate_rps: float,
    capacity_rps: float,
    workload: Workload,
) -> dict[str, Any]:
    return {
        "model": detector_path().name,
        "input_shape": [1, *_SHAPES[INPUT_NAME]],
        "max_cores": cores,
        "capacity_rps": round(capacity_rps, 2),
        "rate_rps": round(rate_rps, 2),
        "requests": len(workload),
        "arrivals": settings.arrivals,
        "phones": settings.phones,
        "payload_bytes": settings.payload_bytes,
        "network": "a generated LTE-like network" if trace is None else settings.trace.name if settings.trace else "",
        "slo_s": settings.slo_s,
        "duration_s": settings.duration_s,
        "seed": settings.seed,
        "budget_at_arrival_s": {
            f"p{percentile}": round(float(np.percentile(workload.budget_s, percentile)), 4)
            for percentile in (0, 5, 50, 95)
        },
    }


def _headline(used: dict[str, Any]) -> str:
    budgets = used["budget_at_arrival_s"]
    return (
        f"{used['requests']} pages in {used['duration_s']:g} s ({used['arrivals']} of {used['rate_rps']:.1f}/s; "
        f"{used['max_cores']} cores can serve {used['capacity_rps']:.1f}/s), {used['payload_bytes'] / 1000:g} kB each "
        f"from {used['phones']} phones on {used['network']}, seed {used['seed']}.\n"
        f"Answers are due {used['slo_s']:g} s after sending; at arrival that leaves {budgets['p0']:.2f} s to the "
        f"tightest, {budgets['p50']:.2f} s to the median.\n"
        "Every policy gets the same requests; response times run from the scheduled arrival. The static policies hold "
        "all cores,\nand batch as far as the profile shows it to pay (smallest size within 5 % of the best throughput)."
    )
