"""``sponge.wrap`` on real models: profile once, reuse, clean up."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnxruntime as ort
import pytest

import sponge
from sponge.live.session import ElasticSession
from sponge.live.wrap import _usable_cores
from tests.live import models

FAST = {"max_cores": 2, "profile_budget_s": 0.5, "cpu_control": "threads"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of this module share, as processes of a service would."""
    path = tmp_path_factory.mktemp("cache")
    path.chmod(0o700)
    return path


def profiles(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("profile-*.json")}


def test_few_lines_serve_a_session(cache: Path) -> None:
    """The README's example: the session stays the user's, before and after."""
    session = ort.InferenceSession(models.convolutions())
    image = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    expected = session.run(None, {"image": image})[0]
    threads = threading.active_count()
    with sponge.wrap(session, slo_s=30.0, cache_dir=cache, copy_inputs=True, name="photos", **FAST) as scheduler:
        reused = image.copy()
        future = scheduler.submit({"image": reused}, budget_s=30.0)
        reused.fill(0.0)
        assert np.allclose(future.result(60)[0], expected, atol=1e-5)
        assert scheduler.submit({"image": image}).result(60)
        assert scheduler.statistics().cpu_control == "threads"
        assert scheduler.controller.max_lanes == 2
        assert scheduler.name == "photos"
        assert "photos-lane-1" in {thread.name for thread in threading.enumerate()}
    assert threading.active_count() == threads
    assert np.array_equal(session.run(None, {"image": image})[0], expected)


def test_profile_is_measured_once(cache: Path) -> None:
    """The second start of the same set-up takes what the first one measured; another set-up does not."""
    model = models.identity()
    calls: list[str] = []
    sponge.wrap(model, cache_dir=cache, progress=lambda done, total, text: calls.append(text), **FAST).close()
    before = profiles(cache)
    assert calls
    calls.clear()
    sponge.wrap(model, cache_dir=cache, progress=lambda done, total, text: calls.append(text), **FAST).close()
    assert profiles(cache) == before
    assert not calls
    sponge.wrap(model, cache_dir=cache, **{**FAST, "max_cores": 1}).close()
    assert len(profiles(cache)) == len(before) + 1


def test_damaged_profile_is_measured_again(cache: Path, tmp_path: Path) -> None:
    """A half-written disk must not keep a service from starting."""
    tmp_path.chmod(0o700)
    model = models.identity()
    sponge.wrap(model, cache_dir=tmp_path, **FAST).close()
    (path,) = tmp_path.glob("profile-*.json")
    path.write_text('{"format": "sponge-profile", "cells": []}')
    sponge.wrap(model, cache_dir=tmp_path, **FAST).close()
    assert sponge.Profile.load(path).cells


def test_a_profile_that_cannot_be_kept_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a minute at every start has a cause that the user can do away with."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    sponge.wrap(models.identity(), cache_dir=shared, **FAST).close()
    assert "will be measured again at the next start" in caplog.text
    assert "SPONGE_CACHE_DIR" in caplog.text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first call that says nothing for half a minute looks like one that hangs; a log has no use for it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    sponge.wrap(models.identity(), cache_dir=tmp_path, **FAST).close()
    assert ("profiling: 100 of 100 %" in capsys.readouterr().err) == terminal


def test_more_cores_than_there_are_is_told_of(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An example's ``max_cores=8`` on a machine of two plans with cores that do not exist."""
    there = _usable_cores()
    sponge.wrap(models.identity(), cache_dir=cache, **{**FAST, "max_cores": math.ceil(there)}).close()
    assert "may use" not in caplog.text
    sponge.wrap(models.identity(), cache_dir=cache, **{**FAST, "max_cores": math.ceil(there) + 1}).close()
    assert f"max_cores={math.ceil(there) + 1}, but this process may use {there:g}" in caplog.text


def test_processes_that_start_together_share_one_profile(tmp_path: Path) -> None:
    """Two that profiled at once would measure each other: one measures, the other waits for its result."""
    tmp_path.chmod(0o700)
    path = models.save(models.identity(), tmp_path / "model.onnx")
    script = f"""
import sponge
measured = []
sponge.wrap({str(path)!r}, max_cores=1, profile_budget_s=0.5, cpu_control="threads",
            progress=lambda *_: measured.append(1)).close()
print(bool(measured))
"""
    environment = {**os.environ, "SPONGE_CACHE_DIR": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in running)
    assert said == ["False", "False", "True"]
    assert len(profiles(tmp_path / "cache")) == 1


def test_foreign_profile_is_refused_unless_forced(cache: Path, tmp_path: Path) -> None:
    """Plans made with another machine's numbers miss deadlines for no visible reason."""
    with ElasticSession(models.identity(), max_threads=1, cache_dir=cache) as session:
        profile = sponge.Profiler(session, cores=[1.0], batch_sizes=[1, 2], lanes=[1], budget_s=0.3).run()
    foreign = attrs.evolve(profile, machine={**profile.machine, "cpu": "Another CPU"})
    path = tmp_path / "profile.json"
    foreign.save(path)
    options: dict[str, Any] = {"max_cores": 1, "cpu_control": "threads", "cache_dir": cache}
    for given in (foreign, path, str(path)):
        with pytest.raises(sponge.ProfileMismatch, match="Another CPU"):
            sponge.wrap(models.identity(), profile=given, **options)
    with pytest.raises(sponge.ProfileMismatch, match="model"):
        sponge.wrap(models.strings(), profile=profile, **options)
    with sponge.wrap(models.identity(), profile=path, force=True, slo_s=30, **options) as scheduler:
        assert scheduler.submit({"x": np.zeros((1, 4), np.float32)}).result(60)


def test_fixed_batch_axis_is_served_one_by_one(cache: Path) -> None:
    """Nothing to choose but cores."""
    with sponge.wrap(models.fixed_batch(), cache_dir=cache, slo_s=30, **FAST) as scheduler:
        assert scheduler.controller.max_batch_size == 1
        assert scheduler.submit({"x": np.ones((3, 4), np.float32)}).result(60)[0].sum() == 24


def test_open_axes_need_a_size(cache: Path) -> None:
    """By shapes or by an example request; without, the message says which axis of which input."""
    image = np.zeros((1, 3, 8, 8), np.float32)
    example = {"image": image, "scale": np.ones((1, 1), np.float32), "tag": np.array([1])}
    with pytest.raises(ValueError, match="image"):
        sponge.wrap(models.several(), cache_dir=cache, **FAST)
    with sponge.wrap(models.several(), inputs=example, cache_dir=cache, slo_s=30, **FAST) as scheduler:
        assert scheduler.submit(example).result(60)[2].tolist() == [2]


def test_failed_start_leaves_nothing_behind(cache: Path) -> None:
    """Threads and sessions made on the way are closed when a later step fails."""
    threads = threading.active_count()
    tasks = set(os.listdir("/proc/self/task"))
    with pytest.raises(ValueError, match="max_batch_size"):
        sponge.wrap(models.identity(), max_batch_size=0, cache_dir=cache, **FAST)
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/task")) <= tasks


@pytest.mark.parametrize("max_cores", [0, -1.0, float("nan"), float("inf")])
def test_impossible_core_counts_are_refused(max_cores: float) -> None:
    """Naming argument and value."""
    with pytest.raises(ValueError, match="max_cores must be positive and finite"):
        sponge.wrap(models.identity(), max_cores=max_cores)


def test_container_quota_limits_the_default(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """In a container of 1.5 CPUs on a large host, the host's CPUs are not ours."""
    probe = attrs.evolve(sponge.CgroupScaler.probe(), container_quota_cores=1.5)
    monkeypatch.setattr(sponge.CgroupScaler, "probe", staticmethod(lambda: probe))
    monkeypatch.setattr("sponge.live.wrap.available_cpus", lambda: 64)
    with sponge.wrap(models.identity(), cache_dir=cache, profile_budget_s=0.5, cpu_control="threads") as scheduler:
        assert scheduler.controller.solver.max_cores == 1.5  # type: ignore[attr-defined]
        assert scheduler.controller.solver.core_levels == (1.0, 1.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("max_cores", "levels"),
    [(1.25, (1.0,)), (1.5, (1.0, 1.5)), (1.75, (1.0, 1.25, 1.5, 1.75)), (2, (1.0, 2.0)), (0.5, (0.5,))],
)
def test_allocations_come_as_near_to_the_cores_as_pays(
    cache: Path, max_cores: float, levels: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter of a core above a whole one is head-room and said to be; three quarters are used."""
    caplog.set_level("INFO", logger="sponge")
    options: dict[str, Any] = {**FAST, "max_cores": max_cores}
    with sponge.wrap(models.identity(), cache_dir=cache, **options) as scheduler:
        assert scheduler.controller.solver.core_levels == levels  # type: ignore[attr-defined]
    assert ("is head-room" in caplog.text) == (max_cores == 1.25)


def test_profile_belongs_to_the_request_that_it_was_measured_with(cache: Path) -> None:
    """The time of a model with a loop is that of its input: random numbers of the same shape say nothing."""

    def measured(inputs: dict[str, np.ndarray[Any, Any]]) -> bool:
        calls: list[str] = []
        with sponge.wrap(
            models.loop(), inputs=inputs, cache_dir=cache, progress=lambda _, __, text: calls.append(text), **FAST
        ):
            return bool(calls)

    few = {"x": np.zeros(1, np.float32), "rounds": np.array([1])}
    many = {**few, "rounds": np.array([200])}
    assert [measured(one) for one in (few, many, few, dict(reversed(few.items())))] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["link", "second name", "open to others", "pipe"])
def test_kept_profile_that_is_not_ours_alone_is_measured_again(tmp_path: Path, kind: str) -> None:
    """Whatever stands in its place is neither read nor written to."""
    tmp_path.chmod(0o700)
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    sponge.wrap(models.identity(), cache_dir=cache, **FAST).close()
    (path,) = cache.glob("profile-*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes().replace(b'"notes":[]', b'"notes":["planted"]')
    elsewhere.write_bytes(content)
    if kind == "open to others":
        path.write_bytes(content)
        path.chmod(0o666)
    else:
        path.unlink()
        {"link": path.symlink_to, "second name": path.hardlink_to, "pipe": lambda _: os.mkfifo(path)}[kind](elsewhere)
    sponge.wrap(models.identity(), cache_dir=cache, **FAST).close()
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert (status.st_nlink, status.st_mode & 0o777) == (1, 0o600)
    assert b"planted" not in path.read_bytes()
    assert elsewhere.read_bytes() == content
