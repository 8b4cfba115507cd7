"""The demo's parts; that it runs from end to end is in ``tests/test_cli.py``."""

from __future__ import annotations

from importlib import util

import numpy as np
import onnxruntime as ort
import pytest

from sponge.commands.demo import DemoSettings, best_batch_size, make_workload
from sponge.commands.detector import SIDE_PX, detector_path, pages
from sponge.commands.profile import batch_sizes_up_to, parse_shapes
from sponge.core.latency import LatencyModel
from sponge.workload import BandwidthTrace


def test_workload_depends_on_the_seed_alone() -> None:
    """All policies, and all who repeat the demo, meet the same requests."""
    one = make_workload(DemoSettings(seed=5), None, 30.0)
    same = make_workload(DemoSettings(seed=5), None, 30.0)
    other = make_workload(DemoSettings(seed=6), None, 30.0)
    assert np.array_equal(one.arrived_at_s, same.arrived_at_s)
    assert np.array_equal(one.deadline_s, same.deadline_s)
    assert not np.array_equal(one.arrived_at_s, other.arrived_at_s)


def test_workload_uses_the_given_trace_rate_payload_and_slo() -> None:
    """What is asked for is what is replayed."""
    trace = BandwidthTrace(times_s=[0.0], bytes_per_s=[1e6], end_s=60.0)
    settings = DemoSettings(arrivals="constant", payload_bytes=1e5, slo_s=0.5, duration_s=4.0, phones=3)
    workload = make_workload(settings, trace, 10.0)
    assert len(workload) == 40
    assert workload.network_s == pytest.approx(np.full(40, 0.1))
    assert workload.budget_s == pytest.approx(np.full(40, 0.4))


def test_phones_see_different_networks() -> None:
    """Their budgets differ at the same instant, which is what makes the order of service matter."""
    trace = BandwidthTrace(times_s=[0.0, 300.0], bytes_per_s=[1e6, 5e6], end_s=600.0)
    alone = make_workload(DemoSettings(phones=1), trace, 30.0)
    many = make_workload(DemoSettings(phones=30), trace, 30.0)
    assert np.ptp(alone.network_s) == pytest.approx(0.0, abs=1e-6)
    assert np.ptp(many.network_s) == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"slo_s": 0.0}, {"rate_rps": -1.0}, {"duration_s": float("inf")}, {"arrivals": "random"},
              {"max_cores": 0}, {"max_cores": 100_000}, {"phones": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """Before anything is measured."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemoSettings(**wrong)  # type: ignore[arg-type]


def test_too_short_a_run_is_refused() -> None:
    """A table of no requests says nothing."""
    with pytest.raises(ValueError, match="too short"):
        make_workload(DemoSettings(duration_s=1.0, arrivals="poisson"), None, 1e-6)


def test_batch_size_of_the_static_baseline_is_the_smallest_nearly_best() -> None:
    """The baseline must be configured as well as its owner could: no batching where batching does not pay."""
    pays = LatencyModel(gamma_s=0.01, epsilon_s=0.05, delta_s=0.0, eta_s=0.0)
    does_not = LatencyModel(gamma_s=0.02, epsilon_s=0.0, delta_s=0.0, eta_s=0.0)
    assert best_batch_size(pays, 2.0, 1) == 8
    assert best_batch_size(does_not, 2.0, 1) == 1


def test_detector_reads_the_pages() -> None:
    """The model is real and trained: it finds text where there are words, and none on a blank page."""
    session = ort.InferenceSession(detector_path(), providers=["CPUExecutionProvider"])
    page = pages(1, np.random.default_rng(0))[0]
    assert page.shape == (1, 3, SIDE_PX, SIDE_PX)
    assert page.dtype == np.float32
    share_with_words = float((session.run(None, {"x": page})[0] > 0.3).mean())
    share_on_blank = float((session.run(None, {"x": np.full_like(page, 0.85)})[0] > 0.3).mean())
    assert share_with_words > 0.05
    assert share_on_blank == 0.0


def test_missing_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever installed the plain package learns what the demo needs."""
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sponge-serving\[demo\]"):
        detector_path()


def test_shapes_are_read_as_typed() -> None:
    """Names may hold what names of inputs hold, an equals sign among it."""
    assert parse_shapes(["x=1,3,320,320", "a=b=7"]) == {"x": (1, 3, 320, 320), "a=b": (7,)}
    for wrong in ("x", "=1,2", "x=", "x=1,-2", "x=1,two", "x=0", "x=٣"):
        with pytest.raises(ValueError, match="shape must be like"):
            parse_shapes([wrong])
    with pytest.raises(ValueError, match="twice"):
        parse_shapes(["x=1", "x=2"])


def test_batch_sizes_double_up_to_the_largest() -> None:
    """The largest is always among them: nothing beyond it is ever served."""
    assert batch_sizes_up_to(1) == (1,)
    assert batch_sizes_up_to(8) == (1, 2, 4, 8)
    assert batch_sizes_up_to(6) == (1, 2, 4, 6)
