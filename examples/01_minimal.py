"""Serve an ONNX model by each request's own deadline.

Covers: `sponge.wrap`, `Scheduler.submit` with a budget, `DeadlineExceeded`.
Scenario: photos of pages come from phones, and the network has left each of them a different time until the answer is
due. All that can be served in time are; one that cannot is told so at once, before any work goes into it.

Needs: pip install "sponge-serving[demo]" (for the model that it serves).
The first run measures the model for some seconds; later runs reuse what was measured.
"""

from concurrent.futures import wait

import numpy as np

import sponge
from sponge.commands.detector import detector_path, pages

SEED = 7
BUDGETS_S = (10.0, 20.0, 30.0, 1e-6)
"""Time left at arrival [s]; nothing could read a page in the last one's microsecond."""


def main() -> None:
    images = pages(len(BUDGETS_S), np.random.default_rng(SEED))

    with sponge.wrap(detector_path(), shapes={"x": (3, 320, 320)}, max_cores=1, profile_budget_s=5.0) as scheduler:
        futures = [
            scheduler.submit({"x": image}, budget_s=budget_s) for image, budget_s in zip(images, BUDGETS_S, strict=True)
        ]
        wait(futures)

    for budget_s, future in zip(BUDGETS_S, futures, strict=True):
        try:
            (probability,) = future.result()
        except sponge.DeadlineExceeded:
            print(f"{budget_s:9.6f} s left: cannot be met, said at once")
        else:
            text_share = float((probability > 0.3).mean())
            print(f"{budget_s:9.6f} s left: served, text on {text_share:.0%} of the page")


if __name__ == "__main__":
    main()
