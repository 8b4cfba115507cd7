"""The metrics as Prometheus sees them: scraped over a socket, linted by its own tool, and right."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from sponge.core.latency import LatencyModel
from sponge.core.solver import Solver
from sponge.integrations.prometheus import COUNTERS, GAUGES, HISTOGRAMS, SchedulerCollector, collect
from sponge.live.scalers import ThreadScaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.live import models
from tests.live.cgroup_here import needs_quota

SOLVER = Solver(LatencyModel(1e-5, 1e-5, 1e-5, 1e-4), max_cores=2, max_batch_size=16, max_lanes=2)
PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
"""Of the Debian package prometheus."""


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    """Looks up a table: an index out of range makes the model raise."""
    with ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as made:
        yield made


def index(value: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"i": np.array([value], dtype=np.int64)}


class Endpoint:
    """A registry behind prometheus_client's own HTTP server on loopback."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._server, self._thread = start_http_server(0, "127.0.0.1", self.registry)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def text(self, accept: str = "text/plain") -> str:
        request = urllib.request.Request(f"http://{self.address}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by its name and labels, without the scheduler's."""
        return {
            (sample.name, frozenset(item for item in sample.labels.items() if item[0] != "scheduler")): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


def busy(scheduler: Scheduler) -> None:
    """A hundred requests of all fates, whose answers all observers have seen when this returns."""
    futures = [scheduler.submit(index(1000 if i % 50 == 7 else i), budget_s=60) for i in range(100)]
    futures += [scheduler.submit(index(1), budget_s=-1) for _ in range(5)]
    futures += [scheduler.submit(index(1), budget_s=math.inf)]
    wait(futures)


def counts(samples: dict[Any, float], name: str) -> float:
    return samples[f"{name}_count", frozenset()]


def test_a_scrape_tells_what_the_scheduler_counted(session: ElasticSession, endpoint: Endpoint) -> None:
    """Over a real socket, through the client library's own server and parser."""
    with Scheduler(session, SOLVER, name="detector") as scheduler:
        collector = SchedulerCollector(scheduler, endpoint.registry)
        busy(scheduler)
    # Closed, but still shown, and nothing moves any more.
    found, seen = scheduler.statistics(), endpoint.samples()
    outcomes = {dict(labels)["outcome"]: n for (name, labels), n in seen.items() if name == "sponge_requests_total"}
    assert outcomes == {
        "met": found.met,
        "late": found.late,
        "failed": 2,
        "cancelled": 0,
        "rejected_deadline": 5,
        "rejected_queue_full": 0,
        "rejected_closed": 0,
    }
    assert sum(outcomes.values()) == found.submitted == 106
    assert seen["sponge_batches_total", frozenset()] == found.batches == counts(seen, "sponge_batch_rows")
    assert seen["sponge_allocated_core_seconds_total", frozenset()] == pytest.approx(found.allocated_core_s)
    assert seen["sponge_cpu_seconds_total", frozenset()] == pytest.approx(found.cpu_s)
    assert seen["sponge_queue_length", frozenset()] == 0
    assert seen["sponge_max_cores", frozenset()] == 2
    assert seen["sponge_drift_ratio", frozenset()] > 0
    assert counts(seen, "sponge_request_budget_seconds") == 105  # but for the one without a deadline
    assert seen["sponge_request_slack_seconds_bucket", frozenset({("le", "0.0")})] == 5
    assert seen["sponge_request_slack_seconds_bucket", frozenset({("le", "+Inf")})] == 105
    assert counts(seen, "sponge_queue_delay_seconds") == found.met + found.late + found.failed
    assert counts(seen, "sponge_response_seconds") == found.met + found.late
    assert 0 < counts(seen, "sponge_latency_model_ratio") == counts(seen, "sponge_batch_duration_seconds")
    text = endpoint.text()
    assert 'sponge_info{cpu_control="threads",scheduler="detector",version="' in text
    collector.close()
    collector.close()
    assert endpoint.text() == ""


def test_allocation_that_is_not_in_force_is_shown(session: ElasticSession, endpoint: Endpoint) -> None:
    """An alarm can be set on it; it goes out when the kernel takes the allocation again."""

    class Shaky(ThreadScaler):
        broken = True

        def scale(self, cores: float) -> float:
            if self.broken:
                raise OSError("gone")
            return super().scale(cores)

    with Scheduler(session, SOLVER, Shaky()) as scheduler:
        SchedulerCollector(scheduler, endpoint.registry)
        assert endpoint.samples()["sponge_cpu_control_fault", frozenset()] == 1
        Shaky.broken = False
        ends_at = time.monotonic() + 30
        while endpoint.samples()["sponge_cpu_control_fault", frozenset()] and time.monotonic() < ends_at:
            scheduler.submit(index(1), budget_s=60).result(60)
        assert endpoint.samples()["sponge_cpu_control_fault", frozenset()] == 0


def test_every_metric_is_shown_and_described(session: ElasticSession, endpoint: Endpoint) -> None:
    """In both formats that Prometheus asks for; no label but the two that are bounded."""
    with Scheduler(session, SOLVER) as scheduler:
        collect(scheduler, endpoint.registry)
        busy(scheduler)
        plain = list(text_string_to_metric_families(endpoint.text()))
        modern = list(parse_openmetrics(endpoint.text("application/openmetrics-text; version=1.0.0")))
    names = {"sponge", *COUNTERS, *GAUGES, *HISTOGRAMS}
    assert {family.name for family in modern} == names
    assert {family.name for family in plain} == (names - {"sponge"}) | {"sponge_info"}
    for family in modern:
        assert family.documentation
        if family.name != "sponge_throttled_seconds":  # only where there is a quota
            assert family.samples
        for sample in family.samples:
            assert set(sample.labels) <= {"scheduler", "outcome", "le", "version", "cpu_control"}


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_promtool_finds_nothing_to_say(session: ElasticSession, endpoint: Endpoint) -> None:
    """Prometheus's own lint of names, units and types."""
    assert PROMTOOL is not None
    with Scheduler(session, SOLVER) as scheduler:
        collect(scheduler, endpoint.registry)
        busy(scheduler)
        text = endpoint.text()
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_closing_the_scheduler_takes_its_metrics_away(session: ElasticSession, endpoint: Endpoint) -> None:
    """And leaves those of others; two of one name cannot be told apart, and are refused."""
    with Scheduler(session, SOLVER, name="one") as one:
        collect(one, endpoint.registry)
        with Scheduler(session, SOLVER, name="one") as other:
            with pytest.raises(
                ValueError, match="name must differ among the schedulers of a registry, got 'one' again"
            ):
                collect(other, endpoint.registry)
            collect(other, endpoint.registry, name="two")
            assert set(re.findall(r'scheduler="(\w+)"', endpoint.text())) == {"one", "two"}
        assert set(re.findall(r'scheduler="(\w+)"', endpoint.text())) == {"one"}
    assert endpoint.text() == ""


def test_metrics_do_not_keep_a_scheduler_alive(session: ElasticSession, endpoint: Endpoint) -> None:
    """A service that makes a scheduler for each model version must not collect the old ones."""
    scheduler = Scheduler(session, SOLVER)
    collect(scheduler, endpoint.registry)
    service = scheduler._service
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del scheduler
        gc.collect()
    assert "sponge_batches_total{" not in endpoint.text()
    service.close(True, 30)  # waits for the end that the garbage collection has begun
    assert service.ended
    assert endpoint.text() == ""


@needs_quota
def test_throttled_time_is_the_kernels(session: ElasticSession, endpoint: Endpoint) -> None:
    """Where there is a quota, the kernel's own count of it is shown."""
    from sponge.live.cgroup import CgroupScaler

    with CgroupScaler() as scaler, Scheduler(session, SOLVER, scaler) as scheduler:
        collect(scheduler, endpoint.registry)
        busy(scheduler)
        before = scaler.throttled_s()
        shown = endpoint.samples()["sponge_throttled_seconds_total", frozenset()]
        assert before <= shown <= scaler.throttled_s()
        assert 'cpu_control="cgroup v' in endpoint.text()


DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "sponge.json"


def expressions() -> list[str]:
    """Every query of the dashboard, its panels' and its variables'."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    variables = [variable for variable in board["templating"]["list"] if variable["type"] == "query"]
    return found + [variable["query"]["query"] for variable in variables]


def test_dashboard_asks_for_metrics_that_there_are(session: ElasticSession, endpoint: Endpoint) -> None:
    """A renamed metric must not leave a panel empty without anybody noticing, nor a metric go unseen."""
    with Scheduler(session, SOLVER) as scheduler:
        collect(scheduler, endpoint.registry)
        busy(scheduler)
        families = list(text_string_to_metric_families(endpoint.text()))
    shown = {sample.name for family in families for sample in family.samples} | {"sponge_throttled_seconds_total"}
    asked = {name for expression in expressions() for name in re.findall(r"\bsponge_\w+", expression)}
    assert asked <= shown
    bases = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert bases >= {*COUNTERS, *GAUGES, *HISTOGRAMS}
