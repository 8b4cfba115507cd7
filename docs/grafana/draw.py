"""Draws the dashboard without Grafana: every panel's queries, as a Prometheus server answers them.

``python docs/grafana/draw.py http://127.0.0.1:9090 dashboard.png --last 180``; needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BOARD = Path(__file__).with_name("sponge.json")
UNITS = {"s": "s", "percentunit": "share", "reqps": "1/s", "ops": "1/s", "short": ""}
POINTS = 120


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
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server")
    parser.add_argument("out", type=Path)
    parser.add_argument("--last", type=int, default=180, help="seconds")
    options = parser.parse_args()
    board, now = json.loads(BOARD.read_text(encoding="utf-8")), time.time()
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(12, 0.27 * rows))
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, width = place["x"] / 24 + 0.04, place["w"] / 24 - 0.055
        bottom, height = 1 - (place["y"] + place["h"]) / rows + 0.018, place["h"] / rows - 0.045
        draw_panel(figure.add_axes((left, bottom, width, height)), panel, options.server, now, options.last)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
