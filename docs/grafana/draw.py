"""Draws the dashboard without Grafana: a Prometheus server answers the panels' queries about a scheduler under load.

``python docs/grafana/draw.py docs/dashboard.png``, on a machine that has nothing else to do. The demo's text detector
is served for three minutes to phones on a generated LTE-like network; each minute there is a surge of ten seconds.

Needs: ``pip install "sponge-serving[demo,prometheus]"``, and the program prometheus (Debian: ``apt-get install
prometheus``), or the environment variable PROMETHEUS with its path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prometheus_client import CollectorRegistry, start_http_server

import sponge
from sponge.commands.detector import detector_path, pages
from sponge.integrations.prometheus import collect
from sponge.workload import SloClass, Traffic, lte_like, surges

BOARD = Path(__file__).with_name("sponge.json")
UNITS = {"s": "s", "percentunit": "share", "reqps": "1/s", "ops": "1/s", "short": ""}
POINTS = 120
SEED = 1
RATE_RPS = 6.0
SLO_S = 0.8


@contextmanager
def prometheus(scraped: int, port: int) -> Iterator[str]:
    """A server that scrapes a port of this machine each second."""
    program = os.environ.get("PROMETHEUS") or shutil.which("prometheus") or "prometheus"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 900ms}\n"
            f"scrape_configs: [{{job_name: sponge, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}]\n"
        )
        options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        with subprocess.Popen([program, *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]) as it:
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                it.terminate()


@contextmanager
def served(seconds: int, registry: CollectorRegistry) -> Iterator[None]:
    """A scheduler that has been under load for so long; open loop."""
    images = pages(8, np.random.default_rng(SEED))
    traffic = Traffic(rate_rps=RATE_RPS, duration_s=seconds, arrivals=surges, slos=(SloClass(SLO_S),))
    workload = traffic.workload(lte_like(seconds, np.random.default_rng(SEED)), SEED)
    with sponge.wrap(detector_path(), max_cores=2, shapes={"x": (3, 320, 320)}, max_batch_size=4) as scheduler:
        collect(scheduler, registry, name="detector")
        zero = scheduler.now() + 0.1
        for index, arrives_s in enumerate(workload.arrived_at_s.tolist()):
            time.sleep(max(0.0, zero + arrives_s - scheduler.now()))
            deadline = zero + float(workload.deadline_s[index])
            scheduler.submit({"x": images[index % len(images)]}, deadline=deadline)
        time.sleep(1.5)  # one more scrape
        yield


def filled(expression: str, last_s: int) -> str:
    """The query as Grafana would send it, with its variables put in."""
    variables = {"$scheduler": ".*", "$__rate_interval": "10s", "$__range_s": str(last_s), "$__range": f"{last_s}s"}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    return expression


def ask(server: str, path: str, **question: Any) -> list[dict[str, Any]]:
    """The answer of the server to one query."""
    with urllib.request.urlopen(f"{server}/api/v1/{path}?{urllib.parse.urlencode(question)}", timeout=30) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found


def legend(text: str, labels: dict[str, str]) -> str:
    """The series' name, with its labels put in."""
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def draw_panel(axes: Axes, panel: dict[str, Any], server: str, now: float, last_s: int) -> None:
    """One panel, by its type."""
    unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    axes.set_title(panel["title"], fontsize=9, loc="left")
    if panel["type"] == "stat":
        (answer,) = ask(server, "query", query=filled(panel["targets"][0]["expr"], last_s), time=now)
        value = float(answer["value"][1])
        text = f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g}"
        axes.text(0.5, 0.4, text, fontsize=20, ha="center", va="center", color="#2a7d2e")
        axes.axis("off")
        return
    for target in panel["targets"]:
        query = filled(target["expr"], last_s)
        for series in ask(server, "query_range", query=query, start=now - last_s, end=now, step=last_s / POINTS):
            points = [(float(t) - now, float(value)) for t, value in series["values"]]
            axes.plot(*zip(*points, strict=True), lw=1, label=legend(target["legendFormat"], series["metric"]))
    axes.set_ylabel(unit, fontsize=7)
    axes.set_xlim(-last_s, 0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6, loc="upper left", ncols=3, frameon=False)
    if panel["fieldConfig"]["defaults"].get("min") == 0:
        axes.set_ylim(bottom=0, top=1.25 * axes.get_ylim()[1])


def main() -> None:
    """Serve, ask and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--port", type=int, default=9494, help="of Prometheus; metrics are on the next one")
    options = parser.parse_args()
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(12, 0.27 * rows))
    registry = CollectorRegistry()
    server, _ = start_http_server(options.port + 1, "127.0.0.1", registry)
    with prometheus(options.port + 1, options.port) as address, served(options.seconds, registry):
        now = time.time()
        for panel in board["panels"]:
            place = panel["gridPos"]
            left, width = place["x"] / 24 + 0.04, place["w"] / 24 - 0.055
            bottom, height = 1 - (place["y"] + place["h"]) / rows + 0.018, place["h"] / rows - 0.045
            draw_panel(figure.add_axes((left, bottom, width, height)), panel, address, now, options.seconds)
    server.shutdown()
    figure.savefig(options.out, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
