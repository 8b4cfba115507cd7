"""Profiling real models on the real kernel, with tiny budgets; and the choice of cells."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from sponge.core.latency import LatencyModel
from sponge.core.values import intra_op_threads
from sponge.live import profiling_plan as plan
from sponge.live.profiler import Profiler
from sponge.live.profiling_lanes import ProfilingLanes
from sponge.live.profiling_plan import OpenCell
from sponge.live.scalers import ThreadScaler
from sponge.live.session import ElasticSession
from tests.live import models


class Recorder(ThreadScaler):
    """Limits nothing, claims to be a quota, and records what it was asked for."""

    def __init__(self, *, granted: float = float("inf")) -> None:
        super().__init__()
        self.granted = granted
        self.asked: list[float] = []
        self.adopted: list[set[int]] = []

    @property
    def how(self) -> str:
        return "cgroup v2 quota"

    def adopt(self, thread_ids: Any) -> None:
        self.adopted.append(set(thread_ids))

    def scale(self, cores: float) -> float:
        self.asked.append(cores)
        return min(super().scale(cores), self.granted)


@pytest.fixture(scope="module")
def session() -> Any:
    with ElasticSession(models.identity(), max_threads=2) as elastic:
        yield elastic


def test_a_real_model_is_profiled_with_the_machines_own_cpu_control(tmp_path: Path) -> None:
    """The whole way: path in, quota set, profile out, saved, fitted."""
    path = models.save(models.identity(64), tmp_path / "identity.onnx")
    seen: list[tuple[int, int, str]] = []
    profile = Profiler(
        path, batch_sizes=(1, 4), budget_s=0.5, max_samples=30, progress=lambda *now: seen.append(now)
    ).run()
    assert profile.model_name == "identity.onnx"
    assert profile.input_shapes == {"x": (1, 64)}
    assert profile.batch_sizes == (1, 4)
    assert 1.0 in profile.cores
    assert all(cell.threads == intra_op_threads(cell.cores) for cell in profile.cells)
    assert all(len(cell.samples_s) >= 3 for cell in profile.cells)
    assert len(profile.model_hash) == 64
    assert profile.cpu_control
    profile.save(tmp_path / "p.json")
    assert type(profile).load(tmp_path / "p.json") == profile
    model = LatencyModel.fit(profile)
    assert model.latency_s(4, 0.5) >= model.latency_s(1, 1.0) > 0
    assert seen[-1][:2] == (100, 100)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_runs_are_made_as_when_serving(session: ElasticSession) -> None:
    """Quota for all busy lanes together, on the sessions' workers and the lanes' own threads, then given back."""
    scaler = Recorder()
    scaler.scale(7.0)
    profile = Profiler(
        session, batch_sizes=(1, 2), cores=(0.5, 1.0, 2.0), lanes=(1, 2), scaler=scaler, budget_s=0.3, max_samples=20
    ).run()
    assert {0.5, 1.0, 2.0} <= set(scaler.asked)
    workers_and_lanes, released = scaler.adopted
    assert set(session.thread_ids()) < workers_and_lanes
    assert len(workers_and_lanes - set(session.thread_ids())) == 2
    assert threading.get_native_id() not in workers_and_lanes
    assert released == set()
    assert scaler.cores == 7.0
    assert {(c.batch_size, c.cores) for c in profile.cells if c.lanes == 2} == {(1, 1.0), (2, 1.0)}
    assert profile.cpu_control == "cgroup v2 quota"


def test_whole_cores_only_where_threads_are_the_limit(session: ElasticSession) -> None:
    """Half a core would be measured as a whole one, under a wrong name."""
    profile = Profiler(session, batch_sizes=(1,), scaler=ThreadScaler(), budget_s=0.2, max_samples=10).run()
    assert profile.cores == (1.0, 2.0)
    assert any("fractions of a core" in note for note in profile.notes)
    with pytest.raises(ValueError, match="cores must be whole"):
        Profiler(session, cores=(0.5, 1), scaler=ThreadScaler()).run()


def test_cores_that_are_not_granted_are_left_out_and_said(session: ElasticSession) -> None:
    """Under a container's limit of one core, two would be measured as one."""
    profile = Profiler(session, batch_sizes=(1,), scaler=Recorder(granted=1.0), budget_s=0.2, max_samples=10).run()
    assert profile.cores == (0.5, 1.0)
    assert any("1.5; 2 cores" in note for note in profile.notes)


def test_the_users_own_request_is_measured(session: ElasticSession) -> None:
    """Models whose work depends on the values must be profiled with realistic ones."""
    request = {"x": np.array([[1, 2, 3, 4]], np.float32)}
    profiler = Profiler(session, inputs=request)
    np.testing.assert_array_equal(profiler._example(session, 3)["x"], np.repeat(request["x"], 3, axis=0))


def test_a_fixed_batch_axis_is_profiled_at_one() -> None:
    """Such a model is served one request at a time, so nothing else is worth measuring."""
    wrapped = ort.InferenceSession(models.fixed_batch())
    profile = Profiler(wrapped, scaler=ThreadScaler(), budget_s=0.2, max_samples=10).run()
    assert profile.batch_sizes == (1,)
    assert profile.input_shapes == {"x": (3, 4)}
    assert any("fixed" in note for note in profile.notes)


def test_what_the_model_raises_comes_out_and_the_scaler_is_given_back(session: ElasticSession) -> None:
    """A profile of a model that fails is none; the service's scaler must not stay limited."""
    scaler = Recorder()
    with pytest.raises(Exception, match="x"):
        Profiler(session, inputs={"x": np.zeros((1, 5), np.float32)}, scaler=scaler, budget_s=0.2).run()
    assert scaler.cores == float("inf")
    assert scaler.adopted[-1] == set()


def test_several_lanes_record_each_of_their_runs(session: ElasticSession) -> None:
    """All latencies of all busy lanes count."""
    with ProfilingLanes(session, 2) as lanes:
        samples = lanes.run(session.example_inputs(1), threads=1, lanes=2, runs=5)
        assert len(samples) == 10
        assert min(samples) > 0
        names = {thread.name for thread in threading.enumerate()}
        assert {"sponge-profile-0", "sponge-profile-1"} <= names
    assert not any(thread.name.startswith("sponge-profile") for thread in threading.enumerate())


def test_default_grid_is_dense_where_cores_are_few() -> None:
    """The steps that a plan chooses from, up to the machine's own maximum."""
    assert plan.default_shares(2, whole=False) == [0.5, 1.0, 1.5, 2.0]
    assert plan.default_shares(12, whole=False) == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert plan.default_shares(3, whole=True) == [1.0, 2.0, 3.0]
    assert [plan.default_lanes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_busy_lanes_fit_into_the_cores() -> None:
    """Two lanes of two cores are not measured on a machine of three."""
    cells = plan.grid((1, 2, 4), (1.0, 2.0, 3.0), (1, 2), 3)
    assert all(cores * lanes <= 3 for _, cores, lanes in cells)
    assert [cell for cell in cells if cell[2] == 2] == [(1, 1.0, 2), (2, 1.0, 2)]
    assert len(set(cells)) == len(cells)


def test_hopelessly_slow_cells_are_dropped_but_not_the_essential() -> None:
    """A model of 1 s per request: batch 16 on half a core would take 32 s per run."""
    guess = plan.expected_latency(1.0, 0.6, 2)
    assert guess(1, 2) == pytest.approx(0.6)
    assert guess(16, 0.5) == 32.0
    cells = [OpenCell(b, c, k, 1, guess(b, c)) for b, c, k in plan.grid((1, 2, 16), (0.5, 1, 2), (1, 2), 2)]
    kept, dropped = plan.affordable(cells, 12.0, 3)
    assert sum(cell.expected_s for cell in kept) * 3 <= 12.0
    assert {(c.batch_size, c.cores) for c in dropped} >= {(16, 0.5), (16, 1), (16, 2)}
    kept, _ = plan.affordable(cells, 0.1, 3)
    assert [(c.batch_size, c.cores, c.lanes) for c in kept] == [(1, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize(
    ("samples", "spread", "tail_runs", "settled"),
    [(400, 0.5, 0, True), (390, 0.01, 0, True), (390, 0.5, 0, False), (30, 0.01, 1_000, True), (30, 0.01, 999, False),
     (19, 0.01, 10_000, False), (30, 0.5, 10_000, False)],
)  # fmt: skip
def test_a_cell_is_settled_when_its_percentile_is_known(
    samples: int, spread: float, tail_runs: int, settled: bool
) -> None:
    """By its own runs, or by its median and the tails of its like; and in any case at the maximum."""
    cell = OpenCell(1, 1.0, 1, 1, 0.01)
    cell.samples_s = (0.01 * np.exp(np.random.default_rng(0).normal(0, spread, samples))).tolist()
    assert plan.is_settled(cell, tail_runs, percentile=99, relative_error=0.1, max_samples=400) is settled


def test_slow_cells_get_fewer_runs_per_visit() -> None:
    """Every cell gets about as much time, and none keeps the others waiting."""
    assert OpenCell(1, 1, 1, 1, 0.001).runs_for(0.1) == 20
    assert OpenCell(1, 1, 1, 1, 0.02).runs_for(0.1) == 5
    assert OpenCell(1, 1, 1, 1, 5.0).runs_for(0.1) == 1


@pytest.mark.parametrize("rich", [True, False])
def test_progress_goes_to_stderr(
    session: ElasticSession, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout is for results; without rich there are plain lines."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    Profiler(
        session, batch_sizes=(1,), cores=(1,), scaler=ThreadScaler(), budget_s=0.1, max_samples=5, progress=True
    ).run()
    printed = capsys.readouterr()
    assert printed.out == ""
    if not rich:
        assert "profiling: 100 of 100 %" in printed.err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0, 1)}, "batch_sizes"),
        ({"cores": (-1,)}, "cores"),
        ({"lanes": (0,)}, "lanes"),
        ({"percentile": 100}, "percentile"),
        ({"min_samples": 0}, "min_samples"),
        ({"min_samples": 5, "max_samples": 4}, "max_samples"),
        ({"budget_s": 0}, "budget_s"),
        ({"relative_error": 0}, "relative_error"),
    ],
)
def test_bad_arguments_are_named(session: ElasticSession, arguments: dict[str, Any], name: str) -> None:
    """An error tells which argument was wrong, before anything is measured."""
    with pytest.raises(ValueError, match=name):
        Profiler(session, **arguments)


@pytest.mark.parametrize("axis", ["cores", "lanes"])
def test_more_than_the_session_has_is_refused(session: ElasticSession, axis: str) -> None:
    """A profile cannot be measured on threads that are not there."""
    with pytest.raises(ValueError, match=f"{axis} must be at most"):
        Profiler(session, scaler=ThreadScaler(), **{axis: (1, 3)}).run()  # type: ignore[arg-type]
