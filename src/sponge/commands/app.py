"""What the command line takes: options and their texts. The work is in the module of each command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import sponge
from sponge.errors import SpongeError

app = typer.Typer(
    help="Meet each request's own deadline on an ONNX model with as few CPU cores as possible.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would take units and defaults in brackets for markup, and drop them
    pretty_exceptions_enable=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else.")]

_Report = Annotated[
    Path | None, typer.Option("--report", help="Write the runs here as one HTML page with interactive plots.")
]


@contextmanager
def _told_errors() -> Iterator[None]:
    """Turn errors that name their cause into one line and exit status 1; others stay tracebacks."""
    try:
        yield
    except (SpongeError, ValueError, OSError, ImportError) as error:
        print(f"sponge: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("sponge: stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def _check_outputs(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before the work whose result it is to hold."""
    for path in paths:
        folder = None if path is None else path.absolute().parent
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no directory {folder}; name another place")
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write {path}: this user may not write to {folder}; name another place")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sponge {sponge.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before the command."""


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Say what CPU control this machine allows, and why, and which versions are installed."""
    from sponge.commands.doctor import examine, explain

    with _told_errors():
        found = examine()
        _print_json(found.to_json()) if as_json else print(explain(found))


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="An ONNX model.")],
    max_cores: Annotated[
        int | None, typer.Option(help="Most cores to measure.  [default: all that this process may use]", min=1)
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch to measure.", min=1)] = 8,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of an input's axes, such as images=1,3,640,640; for each with free axes."),
    ] = None,
    budget_s: Annotated[float, typer.Option(help="Time to spend on measuring [s].", min=1.0)] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Save the profile here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the profile here (.png, .svg or .pdf).")] = None,
    as_json: _Json = False,
) -> None:
    """Measure a model's latency over batch sizes and cores."""
    from sponge.commands.profile import measure, next_step, parse_shapes

    with _told_errors():
        _check_outputs(out, plot)
        measured = measure(
            model,
            max_cores=max_cores,
            max_batch_size=max_batch,
            shapes=parse_shapes(shape or []),
            budget_s=budget_s,
            quiet=as_json,
        )
        _print_json(measured.to_json()) if as_json else print(measured.explain())
        if out is not None:
            measured.profile.save(out)
        if not as_json:
            print(f"\n{next_step(out)}")
        if plot is not None:
            measured.profile.plot(plot)


@app.command()
def demo(
    trace: Annotated[
        Path | None,
        typer.Option(help="Bandwidth log: Ghent 4G, Mahimahi or CSV.  [default: a generated LTE-like one]"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second.  [default: a third of what all cores can serve, as measured]"),
    ] = None,
    slo: Annotated[float, typer.Option(help="Time from sending to the answer [s].")] = 0.6,
    duration: Annotated[float, typer.Option(help="Length of each run [s].", min=1.0)] = 12.0,
    payload_kb: Annotated[float, typer.Option(help="Size of each upload [1000 bytes].", min=0.0)] = 500.0,
    arrivals: Annotated[str, typer.Option(help="When clients send: bursts, poisson or constant.")] = "bursts",
    phones: Annotated[int, typer.Option(help="Phones, each at its own place of the log.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the network and the send times, the same for all.", min=0)] = 0,
    max_cores: Annotated[
        int | None, typer.Option(help="Most cores to use.  [default: what this process may use, at most 4]", min=1)
    ] = None,
    profile_s: Annotated[float, typer.Option(help="Time for measuring the model first [s].", min=1.0)] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Draw the runs here (.png, .svg, .pdf).  [default: sponge-demo.png, without --json]"),
    ] = None,
    report: _Report = None,
    as_json: _Json = False,
) -> None:
    """Serve a real text detector to phones on a 4G network: static allocations against sponge."""
    from sponge.commands.demo import DemoSettings, run_demo

    with _told_errors():
        settings = DemoSettings(
            trace=trace,
            rate_rps=rate,
            slo_s=slo,
            duration_s=duration,
            payload_bytes=1000 * payload_kb,
            arrivals=arrivals,
            phones=phones,
            seed=seed,
            max_cores=max_cores,
            profile_s=profile_s,
        )
        picture = out or (None if as_json else Path("sponge-demo.png"))
        _check_outputs(picture, report)
        result = run_demo(settings, quiet=as_json)
        _print_json(result.to_json()) if as_json else result.print()
        if picture is not None:
            result.draw(picture)
            print(f"picture: {picture.absolute()}", file=sys.stderr if as_json else sys.stdout)
        if report is not None:
            result.report(report)
            print(f"report: {report.absolute()}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def simulate(
    profile_path: Annotated[
        Path | None, typer.Argument(metavar="PROFILE", help="A profile, as sponge profile --out saves it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a profile: gamma,epsilon,delta,eta [s]; a batch of b on c cores takes "
            "(gamma*b + epsilon)/c + delta*b + eta."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Bandwidth log: Ghent 4G, Mahimahi or CSV.  [default: a generated LTE-like one]"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, on average.  [default: 20]")] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(help="When clients send: poisson, constant, bursts, markov or surges.  [default: poisson]"),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            help="Instead of a rate: so many clients, each of which waits for its answer, then thinks.", min=1
        ),
    ] = None,
    think: Annotated[
        float | None,
        typer.Option(help="With --clients: mean time from an answer to the next request [s].  [default: 1]"),
    ] = None,
    payload_kb: Annotated[
        float, typer.Option(help="Mean size of an upload [1000 bytes]; 0: no network.", min=0.0)
    ] = 300.0,
    payload_cv: Annotated[
        float, typer.Option(help="Standard deviation of the size over its mean (log-normal).", min=0.0)
    ] = 0.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="Time from sending to the answer [s]; again for more classes, as SECONDS:WEIGHT.  [default: 1]"
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Length of a run [s].  [default: of the log, at most 600; else 300; less at high rates]"),
    ] = None,
    max_cores: Annotated[
        list[str] | None,
        typer.Option(help="Cores to try, such as 2,4,8.  [default: search for the fewest that do, up to 64]"),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Largest batch.  [default: as in the profile, or 8]", min=1)
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(help="Most batches side by side.  [default: one for each core]", min=1)
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="sponge, sponge-one-lane, published, static, static-lanes, fifo, window, online-fit, horizontal or "
            "vertical; again for several.  [default: sponge]"
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of service times over their mean.", min=0.0)] = 0.0,
    stragglers: Annotated[
        float, typer.Option(help="Share of batches that take three times as long.", min=0.0, max=1.0)
    ] = 0.0,
    interference: Annotated[
        float | None,
        typer.Option(
            help="Slowdown for each further busy lane, such as 0.03.  [default: as the profile says]", min=0.0
        ),
    ] = None,
    resize_delay: Annotated[
        float | None,
        typer.Option(help="Until other cores are there [s].  [default: 0; vertical 1, horizontal 10]", min=0.0),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs, each with other requests.", min=1)] = 3,
    target: Annotated[float, typer.Option(help="Deadlines to be met [% of those not lost at arrival].")] = 99.9,
    out: Annotated[Path | None, typer.Option(help="Draw the runs with enough cores here (.png, .svg, .pdf).")] = None,
    report: _Report = None,
    as_json: _Json = False,
) -> None:
    """Say how many cores a model needs for a network and an SLO."""
    from sponge.commands.simulate import run_simulations
    from sponge.commands.simulate_input import SimulateSettings, parse_cores, parse_slos, read_latency, read_load

    def show(name: str, cores: int) -> None:
        print(f"\r\033[Ksimulating {name} with {cores} cores ...", end="", file=sys.stderr, flush=True)

    with _told_errors():
        _check_outputs(out, report)
        latency, profile = read_latency(profile_path, model)
        settings = SimulateSettings(
            latency=latency,
            profile=profile,
            trace=trace,
            **read_load(rate, arrivals, clients, think),
            payload_bytes=1000 * payload_kb,
            payload_cv=payload_cv,
            slos=parse_slos(slo or ["1"]),
            duration_s=duration,
            max_cores=parse_cores(max_cores or []),
            max_batch_size=max_batch_size,
            max_lanes=lanes,
            policies=tuple(dict.fromkeys(policy or ["sponge"])),
            noise_cv=noise,
            straggler_share=stragglers,
            interference=interference,
            resize_delay_s=resize_delay,
            seeds=seeds,
            target_pct=target,
        )
        shown = sys.stderr.isatty() and not as_json
        try:
            answer = run_simulations(settings, show if shown else None)
        finally:
            if shown:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        _print_json(answer.to_json()) if as_json else print(answer.explain())
        if out is not None:
            answer.draw(out)
            print(f"picture: {out.absolute()}", file=sys.stderr if as_json else sys.stdout)
        if report is not None:
            answer.report(report)
            print(f"report: {report.absolute()}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def top(
    which: Annotated[
        str | None,
        typer.Argument(metavar="[PID|SOCKET]", help="Of the scheduler.  [default: the only one there is]"),
    ] = None,
    interval: Annotated[float, typer.Option(help="Between refreshes [s].", min=0.05)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each interval.")] = False,
) -> None:
    """Watch a running scheduler of another process, which must run with SPONGE_STATUS=1."""
    from sponge.commands.top import run

    with _told_errors():
        run(which, interval_s=interval, once=once, as_json=as_json)
