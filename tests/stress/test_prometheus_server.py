"""The dashboard's queries, answered by a real Prometheus that scrapes a real scheduler."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sponge.integrations.prometheus import collect
from sponge.live.cgroup import CgroupScaler
from sponge.live.scalers import best_scaler
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from tests.integrations.test_prometheus import SOLVER, Endpoint, busy, expressions
from tests.live import models

pytestmark = pytest.mark.stress

PROMETHEUS = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
VARIABLES = {"$scheduler": ".*", "$__rate_interval": "5s", "$__range_s": "10", "$__range": "10s"}
"""As Grafana would put them in."""


class Prometheus:
    """A server on loopback that scrapes one address twice a second."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self._address}/api/v1/query?{question}", timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@contextmanager
def prometheus(scraped: str, folder: Path) -> Iterator[Prometheus]:
    assert PROMETHEUS is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 400ms}\n"
        f"scrape_configs: [{{job_name: sponge, static_configs: [{{targets: ['{scraped}']}}]}}]\n"
    )
    command = [
        PROMETHEUS,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                        break
                except OSError:
                    assert server.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < until
                    time.sleep(0.1)
            yield Prometheus(address)
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus (Debian: apt-get install prometheus)")
def test_every_query_of_the_dashboard_has_an_answer(tmp_path: Path) -> None:
    """A panel without data looks the same as a healthy one with nothing to show."""
    endpoint = Endpoint()
    with (
        ElasticSession(models.lookup(), max_threads=2, max_lanes=2) as session,
        best_scaler() as scaler,  # type: ignore[attr-defined]
        Scheduler(session, SOLVER, scaler) as scheduler,
        prometheus(endpoint.address, tmp_path) as server,
    ):
        collect(scheduler, endpoint.registry)
        unanswered = [expression for expression in expressions() if not expression.startswith("label_values")]
        if not isinstance(scaler, CgroupScaler):
            unanswered = [expression for expression in unanswered if "throttled" not in expression]
        assert len(unanswered) > 25
        until = time.monotonic() + 60
        while unanswered:
            assert time.monotonic() < until, unanswered
            busy(scheduler)
            still = []
            for expression in unanswered:
                filled = expression
                for name, value in VARIABLES.items():
                    filled = filled.replace(name, value)
                answer = server.query(filled)
                if not answer or any(re.match("NaN|[+-]Inf", series["value"][1]) for series in answer):
                    still.append(expression)
            unanswered = still
        (met,) = server.query('sponge_requests_total{outcome="met"}')
        assert 0 < float(met["value"][1]) <= scheduler.statistics().met
    endpoint.close()
