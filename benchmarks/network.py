"""The generated network beside a real log: does `lte_like` do what the log does, second by second and to an upload?

Scenario
    The log by the second (finer ones are averaged), and as many generated traces as asked for, each as long as the log.
Given
    For each statistic the log's value, the mean over the generated traces, and the range that holds 90 % of them. The
    log is one journey: it should lie within the range of such journeys, not on their mean.
Final number
    How many statistics of the log lie within.
Out of scope
    Cells, speed, time of day, and clients that share a link.

* ``--trace FILE``: the log (Ghent 4G, Mahimahi or CSV). docs/workloads.md has the table for ten minutes on a bus.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from sponge.workload import BandwidthTrace, load_bandwidth, lte_like

UPLOAD_BYTES = 300e3
LAGS_S = (1, 2, 5)
LOW = 0.3
"""Share of the mean below which a second counts as bad."""


def autocorrelation(values: np.ndarray, lag: int) -> float:
    centred = values - values.mean()
    return float((centred[:-lag] * centred[lag:]).mean() / (centred**2).mean())


def statistics(trace: BandwidthTrace) -> dict[str, float]:
    """Return what is compared; uploads start every tenth of a second."""
    if np.median(np.diff(trace.times_s)) < 0.5:
        # Averaging over seconds smooths what is logged by the second anyway, at whatever fractions of it.
        trace = trace.resample(1.0)
    rate = trace.bytes_per_s
    mean = float(rate.mean())
    uploads_s = trace.upload_time_s(np.arange(0.0, trace.duration_s, 0.1), UPLOAD_BYTES)
    return {
        "mean [Mbit/s]": mean * 8e-6,
        "coefficient of variation": float(rate.std()) / mean,
        **{f"autocorrelation after {lag} s": autocorrelation(rate, lag) for lag in LAGS_S},
        f"seconds below {LOW:g} of the mean [%]": 100 * float((rate < LOW * mean).mean()),
        "worst second over the mean": float(rate.min()) / mean,
        "upload of 300 kB, median [ms]": 1000 * float(np.median(uploads_s)),
        "p99 [ms]": 1000 * float(np.percentile(uploads_s, 99)),
        "longest [ms]": 1000 * float(uploads_s.max()),
    }


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--traces", type=int, default=200, help="generated traces")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    log = load_bandwidth(options.trace)
    found = statistics(log)
    made = [statistics(lte_like(log.duration_s, np.random.default_rng(seed))) for seed in range(options.traces)]
    rows = {}
    for name, value in found.items():
        drawn = [each[name] for each in made]
        low, high = np.percentile(drawn, [5, 95]).tolist()
        rows[name] = {
            "log": value,
            "mean": float(np.mean(drawn)),
            "p5": low,
            "p95": high,
            "within": low <= value <= high,
        }
    within = sum(row["within"] for row in rows.values())
    if options.json:
        json.dump(
            {"log": options.trace.name, "traces": options.traces, "rows": rows, "within": within}, sys.stdout, indent=1
        )
        print()
        return 0
    print(f"| | {options.trace.name} | generated ({options.traces} traces of {log.duration_s:.0f} s) |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['log']:.3g} | {row['mean']:.3g} ({row['p5']:.3g}-{row['p95']:.3g}) |")
    print(f"\nwithin the range of 90 %: {within} of {len(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
