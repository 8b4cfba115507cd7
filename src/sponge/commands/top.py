"""``sponge top``: a running scheduler of another process, live in the terminal.

The scheduler must serve its status (``SPONGE_STATUS=1``, or `sponge.Scheduler.serve_status`). What it tells are counts;
rates are the differences of two of its answers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sponge.live.status import is_served, runtime_directory

if TYPE_CHECKING:
    from rich.console import RenderableType

Status: TypeAlias = dict[str, Any]

TIMEOUT_S = 5.0
LONGEST_CHART = 60
"""Refreshes that the small charts show on a wide terminal."""
TEXT_WIDTH = 64
"""Columns that are left to the text beside the charts."""
_BARS = " ▁▂▃▄▅▆▇█"
_HOW_TO = "start the service with SPONGE_STATUS=1 in its environment, or call scheduler.serve_status() in it"


class Ended(Exception):
    """The scheduler does not answer any more."""


def find(which: str | None) -> Path:
    """Return the socket of a process's id, a path, or the only one there is.

    Raises
    ------
    ValueError
        If there is none, or more than one to choose from.
    """
    if which is not None and not which.isdigit():
        return Path(which)
    directory = runtime_directory()
    served = [path for path in sorted(directory.glob("*.sock")) if is_served(path)]
    if which is not None:
        served = [path for path in served if path.name.startswith(f"{which}-")]
    if len(served) == 1:
        return served[0]
    if not served:
        of = "" if which is None else f" of process {which}"
        raise ValueError(f"no scheduler{of} serves its status in {directory}: {_HOW_TO}")
    lines = "\n".join(f"  {path}" for path in served)
    raise ValueError(f"several schedulers serve their status; name a process's id or one of\n{lines}")


def read(path: Path) -> Status:
    """Ask a scheduler for its status.

    Raises
    ------
    Ended
        If nobody answers.
    """
    chunks = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            while chunk := connection.recv(65536):
                chunks.append(chunk)
        status: Status = json.loads(b"".join(chunks))
    except (OSError, ValueError) as error:
        raise Ended(f"{path}: {error}") from error
    return status


def rates(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return what happened each second between two answers of a scheduler."""
    span_s = after["now"] - before["now"]
    old, new = before["statistics"], after["statistics"]

    def rate(change: float) -> float:
        return change / span_s if span_s > 0 else 0.0

    names = ("submitted", "met", "late", "failed", "cancelled", "batches", "resizes")
    found = {name: rate(new[name] - old[name]) for name in names}
    found["rejected"] = rate(sum(new["rejected"].values()) - sum(old["rejected"].values()))
    found["missed"] = found["late"] + found["failed"] + found["rejected"]
    found["allocated_cores"] = rate(new["allocated_core_s"] - old["allocated_core_s"])
    found["used_cores"] = rate(new["cpu_s"] - old["cpu_s"])
    throttled = [answer["condition"]["throttled_s"] for answer in (before, after)]
    found["throttled"] = rate(throttled[1] - throttled[0]) if None not in throttled else 0.0
    return found


@contextmanager
def pauses() -> Iterator[Callable[[float], bool]]:
    """Give a sleep [s] that tells whether the user has pressed Ctrl-C, now or since the last one.

    As an exception, it could fall into the middle of a drawing and leave the terminal in disorder.
    """
    reader, writer = os.pipe()
    before = signal.signal(signal.SIGINT, lambda *_: os.write(writer, b"!"))
    try:
        yield lambda seconds: bool(select.select([reader], [], [], seconds)[0])
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(reader)
        os.close(writer)


def follow(path: Path, interval_s: float, pause: Callable[[float], bool]) -> Iterator[Status]:
    """Yield a scheduler's status with its ``rates`` after each interval, until it ends.

    Raises
    ------
    KeyboardInterrupt
        If *pause* says so.
    """
    before = read(path)
    while True:
        if pause(interval_s):
            raise KeyboardInterrupt
        try:
            after = read(path)
        except Ended:
            return
        yield {**after, "rates": rates(before, after)}
        before = after


def run(which: str | None, *, interval_s: float, once: bool, as_json: bool) -> None:
    """Show a scheduler until it ends or the user has enough.

    Raises
    ------
    ValueError
        If no scheduler is found, or it does not answer.
    """
    path = find(which)
    with pauses() as pause:
        answers = follow(path, interval_s, pause)
        try:
            first = next(answers, None)
        except Ended as error:
            raise ValueError(f"the scheduler does not answer: {error}") from error
        if first is None:
            raise ValueError(f"the scheduler at {path} has ended")
        shown = chain([first], () if once else answers)
        if as_json:
            for status in shown:
                print(json.dumps(status, allow_nan=False), flush=True)
            return
        _show(shown, once)
    if not once:
        print(f"the scheduler of process {first['pid']} has ended", file=sys.stderr)


def _show(answers: Iterable[Status], once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    view = View(0 if once else max(0, min(LONGEST_CHART, console.width - TEXT_WIDTH)))
    if once:
        for status in answers:
            console.print(view.draw(status), soft_wrap=not console.is_terminal)
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        for status in answers:
            live.update(view.draw(status), refresh=True)


class View:
    """Draws answers, and remembers as many of the earlier ones as its charts have columns."""

    def __init__(self, chart_width: int) -> None:
        self._chart_width = chart_width
        self._history: dict[str, deque[float]] = {
            name: deque(maxlen=chart_width) for name in ("submitted", "missed", "allocated_cores", "used_cores")
        }

    def draw(self, status: Status) -> RenderableType:
        """Return what the terminal shows."""
        from rich.console import Group
        from rich.text import Text

        for name, values in self._history.items():
            values.append(status["rates"][name])
        command = os.path.basename(status["command"].split(" ")[0]) or "python"
        limits = status["condition"]["max_cores"]
        headline = Text.assemble(
            ("sponge top  ", "bold"),
            f"{status['name']!r} of process {status['pid']} ({command}), seen for {_duration(status['watched_s'])}; ",
            "" if limits is None else f"at most {limits:g} cores, ",
            f"{status['max_lanes']} lanes, {status['max_batch_size']} rows; {status['statistics']['cpu_control']}",
        )
        return Group(headline, Text(), self._load(status), Text(), _outcomes(status), Text(), _recent(status))

    def _load(self, status: Status) -> RenderableType:
        from rich.table import Table

        found, now, rate = status["statistics"], status["condition"], status["rates"]
        largest = max(now["max_cores"] or 0.0, *self._history["allocated_cores"], *self._history["used_cores"], 0.0)
        table = Table(box=None, pad_edge=False, show_header=False)
        for column in ("left", "right", "left", "left"):
            table.add_column(justify=column, no_wrap=True)
        cores = f"{rate['allocated_cores']:.2f}"
        resizes = f"now {found['cores']:g}; {rate['resizes']:.1f} resizes/s"
        if found["cpu_control_errors"]:
            resizes += f"; {found['cpu_control_errors']} refused"
        table.add_row("cores allocated", cores, self._chart("allocated_cores", largest), resizes)
        throttled = f"throttled {100 * rate['throttled']:.1f} % of the time" if now["throttled_s"] is not None else ""
        table.add_row("cores used", f"{rate['used_cores']:.2f}", self._chart("used_cores", largest), throttled)
        queue = f"{found['waiting']} waiting, {found['running']} running"
        table.add_row("requests/s", f"{rate['submitted']:.1f}", self._chart("submitted"), queue)
        drift = "" if now["drift_scale"] is None else f"{now['drift_scale']:.2f} × as long as profiled"
        table.add_row("missed/s", f"{rate['missed']:.1f}", self._chart("missed"), drift)
        return table

    def _chart(self, name: str, largest: float | None = None) -> str:
        values = self._history[name]
        top = max(largest or 0.0, *values, 1e-9)
        return "".join(_BARS[min(8, int(8 * value / top + 0.5))] for value in values).rjust(self._chart_width)


def _outcomes(status: Status) -> RenderableType:
    from rich.table import Table

    found, rate = status["statistics"], status["rates"]
    rejected = found["rejected"]
    columns = {
        "met": (found["met"], rate["met"]),
        "late": (found["late"], rate["late"]),
        "turned away": (sum(rejected.values()), rate["rejected"]),
        "failed": (found["failed"], rate["failed"]),
        "cancelled": (found["cancelled"], rate["cancelled"]),
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("requests", min_width=16)
    for name in columns:
        table.add_column(name, justify="right", min_width=10)
    table.add_row("in all", *(f"{count:,}" for count, _ in columns.values()))
    table.add_row("each second", *(f"{each:.1f}" for _, each in columns.values()))
    judged = sum(count for name, (count, _) in columns.items() if name != "cancelled")
    share = f"{100 * found['met'] / judged:.2f} % of the deadlines met" if judged else "nothing has ended yet"
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in rejected.items() if count)
    table.caption = share + (f"; turned away: {reasons}" if reasons else "")
    table.caption_justify = "left"
    return table


_ROWS = {
    "budget at arrival": ("budget_s", 1000.0, " ms"),
    "queue delay": ("queue_delay_s", 1000.0, " ms"),
    "response": ("response_s", 1000.0, " ms"),
    "rows of a batch": ("batch_rows", 1.0, ""),
    "measured / predicted": ("measured_over_predicted", 1.0, ""),
}


def _recent(status: Status) -> RenderableType:
    from rich.table import Table

    recent = status["recent"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"last {recent['requests']:,} requests", min_width=20)
    for percentile in ("p1", "p50", "p95", "p99"):
        table.add_column(percentile, justify="right", min_width=10)
    for title, (name, factor, unit) in _ROWS.items():
        spread = recent[name] or {}
        known = (f"{factor * spread[p]:.3g}{unit}" if p in spread else "–" for p in ("p1", "p50", "p95", "p99"))
        table.add_row(title, *known)
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
