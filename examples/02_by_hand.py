"""Put together by hand what `sponge.wrap` puts together.

Covers: `ElasticSession`, `Profiler`, `LatencyModel.fit`, `Solver`, `CgroupScaler`, `Settings`, `Scheduler`.
Scenario: you want to keep the profile where you like, plan with another percentile, or replace a part. Twenty pages
arrive at once, due in half a minute; then the scheduler says what it did.

Needs: pip install "sponge-serving[demo]" (for the model that it serves).
"""

from concurrent.futures import wait

import numpy as np

import sponge
from sponge.commands.detector import detector_path, pages

SEED = 7
SHAPES = {"x": (3, 320, 320)}


def scaler() -> sponge.CgroupScaler | None:
    """Return the quota where this machine allows one; without, the number of threads is the limit."""
    try:
        return sponge.CgroupScaler()
    except sponge.CgroupUnavailable:
        return None


def main() -> None:
    images = pages(20, np.random.default_rng(SEED))

    with sponge.ElasticSession(detector_path(), max_threads=1) as session:
        profile = sponge.Profiler(session, batch_sizes=(1, 2, 4), cores=(1.0,), shapes=SHAPES, budget_s=4.0).run()
        latency = sponge.LatencyModel.fit(profile, percentile=95)
        solver = sponge.Solver(latency, max_cores=1, max_batch_size=4)
        session.warm_up([1, 2, 4], shapes=SHAPES)

        quota = scaler()
        with sponge.Scheduler(session, solver, quota, settings=sponge.Settings(late="serve"), slo_s=30.0) as scheduler:
            wait([scheduler.submit({"x": image}) for image in images])
            statistics = scheduler.statistics()
        if quota is not None:
            quota.close()

    print(
        f"submitted {statistics.submitted}, answered by their deadline {statistics.met}, allocation changed: ", end=""
    )
    print(statistics.resizes > 0)


if __name__ == "__main__":
    main()
