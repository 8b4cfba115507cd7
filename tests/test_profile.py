"""A profile survives the disk, refuses what it was not measured on, and takes no harm from a bad file."""

from __future__ import annotations

import copy
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sponge.errors import ProfileMismatch
from sponge.profile import Cell, Profile, machine_fingerprint, package_versions


def a_profile() -> Profile:
    rng = np.random.default_rng(0)
    return Profile(
        cells=[
            Cell.of(
                batch_size=b,
                cores=c,
                lanes=k,
                threads=1 if c < 1.5 else 2,
                samples_s=(0.01 * b / c + 0.002) * np.exp(rng.normal(0, 0.05, 12)),
                settled=b < 4,
            )
            for b in (1, 2, 4)
            for c in (0.5, 1.0, 2.0)
            for k in (1, 2)
        ],
        model_hash="ab12",
        model_name="détecteur.onnx",
        input_shapes={"x": (1, 3, 32, 32)},
        machine=machine_fingerprint(),
        versions=package_versions(),
        cpu_control="cgroup v2 quota",
        measured_at="2026-01-02T03:04:05+00:00",
        notes=("Left out: nothing.",),
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    """What is saved is what is loaded, sample by sample."""
    path = tmp_path / "p.json"
    profile = a_profile()
    profile.save(path)
    assert Profile.load(path) == profile
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["p.json"]


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """A profile that cannot be written must not destroy the one that is there."""
    path = tmp_path / "p.json"
    a_profile().save(path)
    before = path.read_bytes()
    bad = attrs.evolve(a_profile(), model_name="\ud800")
    with pytest.raises(UnicodeEncodeError):
        bad.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.json"]


def test_samples_beyond_the_cap_are_a_random_choice() -> None:
    """A long measurement stays a small file, and its distribution stays the same."""
    cell = Cell.of(batch_size=1, cores=1, threads=1, samples_s=np.linspace(0.01, 0.02, 50_000))
    assert len(cell.samples_s) == 1_000
    assert cell.runs == 50_000
    assert np.median(cell.samples_s) == pytest.approx(0.015, abs=0.001)
    assert Cell.of(batch_size=1, cores=1, threads=1, samples_s=[1e-8]).samples_s == (1e-6,)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"model_hash": "cd34"}, "model"),
        ({"machine": {"cpu": "another"}}, "machine's cpu"),
        ({"machine": {"cpus": "512"}}, "machine's cpus"),
        ({"versions": {"onnxruntime": "0.1"}}, "onnxruntime"),
        ({"cpu_control": "threads"}, "CPU control"),
    ],
)
def test_mismatch_is_refused_unless_forced(tmp_path: Path, what: Any, named: str) -> None:
    """Latencies of another model or machine would break every promise; force is the user's own risk."""
    path = tmp_path / "p.json"
    a_profile().save(path)
    with pytest.raises(ProfileMismatch) as caught:
        Profile.load(path, expect=what)
    assert list(caught.value.differences) == [named]
    assert Profile.load(path, expect=what, force=True) == a_profile()


def test_the_same_machine_and_model_pass() -> None:
    """Only what runs the model counts: another Python or NumPy does not matter."""
    versions = {**package_versions(), "python": "2.7", "numpy": "0"}
    a_profile().check("ab12", machine_fingerprint(), versions, cpu_control="cgroup v2 quota")
    with pytest.raises(ProfileMismatch):
        attrs.evolve(a_profile(), machine={}).check(machine=machine_fingerprint())


def test_fingerprint_does_not_name_the_machine() -> None:
    """A profile may be shared: it tells the kind of CPU and nobody's host name."""
    facts = machine_fingerprint()
    assert set(facts) == {"architecture", "cpus", "cpu", "instruction_sets"}
    assert all(isinstance(value, str) and value for value in facts.values())
    assert os.uname().nodename not in facts.values()


def _set(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format",), "else", "format"),
        (("version",), 2, "version"),
        (("model",), None, "model"),
        (("model", "hash"), 5, "model.hash"),
        (("model", "name"), "x" * 10_000, "model.name"),
        (("model", "input_shapes", "x"), [1, -3], "model.input_shapes"),
        (("machine", "cpu"), 1, "machine"),
        (("notes",), {}, "notes"),
        (("cells",), [], "cells"),
        (("cells", 1, "cores"), 0, r"cells\[1\].cores"),
        (("cells", 1, "cores"), 10**400, r"cells\[1\].cores"),
        (("cells", 0, "cores"), True, r"cells\[0\].cores"),
        (("cells", 0, "batch_size"), 1.5, r"cells\[0\].batch_size"),
        (("cells", 0, "settled"), 1, r"cells\[0\].settled"),
        (("cells", 0, "samples_us"), [], r"cells\[0\].samples_us"),
        (("cells", 0, "samples_us"), [1] * 1_001, r"cells\[0\].samples_us"),
        (("cells", 2, "samples_us", 3), -1, r"cells\[2\].samples_us\[3\]"),
        (("cells", 2, "samples_us", 3), "7", r"cells\[2\].samples_us\[3\]"),
    ],
)
def test_wrong_field_is_named(path: tuple[Any, ...], value: Any, named: str) -> None:
    """Whoever edited the file learns where."""
    with pytest.raises(ValueError, match=named):
        Profile.from_dict(_set(a_profile().to_dict(), path, value))


def test_the_same_cell_twice_is_refused() -> None:
    """Which of the two would count?"""
    data = a_profile().to_dict()
    data["cells"].append(data["cells"][0])
    with pytest.raises(ValueError, match="cells"):
        Profile.from_dict(data)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"format": NaN}', b"null", b"[]", b"9" * 10_000, b'"\\ud800"'],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """Not a profile, not even JSON, or made to exhaust a parser: one kind of error, naming the file."""
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json is not a usable profile"):
        Profile.load(path)


def test_a_member_that_is_there_twice_is_refused_by_name(tmp_path: Path) -> None:
    """JSON does not say which of two counts; readers differ."""
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(a_profile().to_dict()).replace('"cells":', '"notes": [], "cells":'))
    with pytest.raises(ValueError, match=r"twice\.json is not a usable profile: 'notes' is there twice"):
        Profile.load(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better told when it is measured than when it is needed; and what was there stays."""
    path = tmp_path / "profile.json"
    a_profile().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("sponge.profile.checks.MAX_FILE_BYTES", len(before) - 1)
    with pytest.raises(ValueError, match=f"cells must fit into {len(before) - 1} bytes"):
        a_profile().save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", ["cells", "machine", "model", "notes"])
def test_missing_member_is_named(missing: str) -> None:
    """As a wrong one is."""
    data = a_profile().to_dict()
    del data[missing]
    with pytest.raises(ValueError, match=f"^{missing}"):
        Profile.from_dict(data)


def test_a_pipe_or_directory_is_refused_without_waiting(tmp_path: Path) -> None:
    """Opening a pipe would block the service at start."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="regular file"):
            Profile.load(path)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
GOOD = a_profile().to_dict()
paths = st.sampled_from(
    [(key,) for key in GOOD]
    + [("model", key) for key in GOOD["model"]]
    + [("cells", 0)]
    + [("cells", 0, key) for key in GOOD["cells"][0]]
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(paths, junk)
def test_hostile_fields_give_clear_errors_only(path: tuple[Any, ...], value: Any) -> None:
    """Any JSON in any place: a ValueError, or a profile that can be saved again."""
    try:
        profile = Profile.from_dict(_set(GOOD, path, value))
    except ValueError:
        return
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict(), allow_nan=False))) == profile


def test_bad_cells_are_refused_at_construction() -> None:
    """Values are validated once, where they are made."""
    for change in ({"samples_s": ()}, {"samples_s": (0.0,)}, {"cores": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Cell(**{"batch_size": 1, "cores": 1.0, "threads": 1, "samples_s": (0.1,), **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cells"):
        Profile(cells=())
    with pytest.raises(KeyError):
        a_profile().cell(3, 1.0)
    assert a_profile().cell(4, 2.0, 2).lanes == 2


def test_summary_tells_which_allocations_are_worth_it() -> None:
    """A row per cell, the worthwhile ones marked, and honesty about the tail."""
    profile = a_profile()
    text = profile.summary()
    rows = [line for line in text.splitlines() if line[:5].strip().isdigit()]
    assert len(rows) == len(profile.cells)
    assert sum(row.endswith("*") for row in rows) == 9  # every step pays in this made-up model
    assert "too few runs to bound the p99" in text
    assert "Cheapest: batch 4" in text
    assert "Left out: nothing." in text


def test_summary_of_a_model_of_microseconds() -> None:
    """A scikit-learn model takes three of them: its table is no column of zeros, and stays in its columns."""
    cells = [Cell.of(batch_size=b, cores=1, threads=1, samples_s=[3e-6] * 400) for b in (1, 8)]
    rows = attrs.evolve(a_profile(), cells=cells).summary().splitlines()[3:5]
    assert [row.split()[5:7] for row in rows] == [["0.003", "0.003"]] * 2
    assert {len(row.rstrip(" *")) for row in rows} == {len(a_profile().summary().splitlines()[2])}


def test_plot_draws_every_batch_size(tmp_path: Path) -> None:
    """Points with intervals and a line for each, saved where asked."""
    path = tmp_path / "p.png"
    figure = a_profile().plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["batch 1", "batch 2", "batch 4"]


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"sponge-serving\[plot\]"):
        a_profile().plot()
