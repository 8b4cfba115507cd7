"""The optimised model on disk: shared by all sessions and processes, private, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sponge import ElasticSession, UnsupportedModel
from sponge.live.cache import default_cache_path, open_cache
from sponge.live.model_file import (
    MODEL_NAME,
    WEIGHTS_NAME,
    ModelSource,
    external_locations,
    saved_model_key,
    why_not_saved,
)
from sponge.live.session_options import SessionSettings
from tests.live import models

CHAIN = models.matmul_chain(2, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the user's own cache out of the tests."""
    monkeypatch.setenv("SPONGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "models").iterdir())


def agrees(elastic: ElasticSession, model: bytes = CHAIN) -> bool:
    inputs = elastic.example_inputs(3)
    expected = ort.InferenceSession(model).run(None, inputs)[0]
    return all(np.array_equal(elastic.run(inputs, threads=n)[0], expected) for n in elastic.widths)


def test_saved_model_is_private_and_reused(cache):
    """It holds the user's model and is loaded as code is: nobody else may read or write it; and it is made once."""
    for _ in range(2):
        with ElasticSession(CHAIN, max_threads=2) as elastic:
            assert elastic.notes == ()
            assert agrees(elastic)
            (entry,) = entries(cache)
            if _ == 0:
                written = (entry / WEIGHTS_NAME).stat().st_mtime_ns
            assert (entry / WEIGHTS_NAME).stat().st_mtime_ns == written
    assert entry.name.startswith(elastic.model_hash[:24])
    assert (entry / WEIGHTS_NAME).stat().st_size >= 2 * 2 * 128 * 128 * 4  # weights, and the same prepacked
    for path in [cache, cache / "models", entry]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in entry.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_changes_the_optimised_model_changes_its_key():
    """Options, custom-op libraries and free dimensions all lead to another file; logging does not."""
    level = "graph_optimization_level"
    base = SessionSettings(attributes={level: ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "log_severity_level": 2})
    same = SessionSettings(attributes={level: ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "log_severity_level": 4})
    others = [
        SessionSettings(attributes={level: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC}),
        SessionSettings(attributes=base.attributes, config={"session.disable_quant_qdq": "1"}),
        SessionSettings(attributes=base.attributes, free_dimensions={"batch": 2}),
        SessionSettings(attributes=base.attributes, custom_op_libraries=(__file__,)),
    ]
    keys = {saved_model_key("0" * 64, settings) for settings in [base, *others]}
    assert len(keys) == 5
    assert saved_model_key("0" * 64, same) == saved_model_key("0" * 64, base)
    assert saved_model_key("1" * 64, base) not in keys


def test_an_extra_session_costs_no_copy_of_the_weights(tmp_path):
    """The reason for all this: 64 MiB of weights, and further sessions that take a small part of that."""
    path = models.save(models.matmul_chain(16, 1024), tmp_path / "large.onnx")
    script = """
import sys
from sponge import ElasticSession

def memory_mib():
    with open("/proc/self/smaps_rollup") as file:
        kib = {line.split()[0]: int(line.split()[1]) for line in file if line.split()[0] in ("Pss:", "Anonymous:")}
    return max(kib["Pss:"] / 1024, kib["Anonymous:"] / 1024)  # Pss: a page that is mapped twice counts once

with ElasticSession(sys.argv[1], max_threads=2) as elastic:
    elastic.warm_up([4])
    before = memory_mib()
    sessions = [elastic._factory.make(threads) for threads in (2, 2, 2, 2)]
    inputs = elastic.example_inputs(4)
    outputs = [session.run(None, inputs)[0] for session in sessions]
    after = memory_mib()
    assert all((output == outputs[0]).all() for output in outputs)
    print(elastic.notes, (after - before) / len(sessions))
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    notes, mib = done.stdout.rsplit(maxsplit=1)
    assert notes == "()"
    assert float(mib) < 8, f"{mib} MiB per session of a model of 64 MiB"


def test_processes_that_save_the_same_model_do_not_disturb_each_other(tmp_path, cache):
    """Workers of a web server start at the same moment with an empty cache."""
    path = models.save(models.matmul_chain(8, 256), tmp_path / "model.onnx")
    script = """
import sys
from sponge import ElasticSession
sys.stdin.read()
with ElasticSession(sys.argv[1], max_threads=2) as elastic:
    print(elastic.notes, elastic.run(elastic.example_inputs(2))[0].sum())
"""
    command = [sys.executable, "-c", script, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.close()
    answers = set()
    for process in processes:
        answers.add(process.stdout.read())
        errors = process.stderr.read()
        assert process.wait() == 0, errors
        process.stdout.close()
        process.stderr.close()
    (answer,) = answers
    assert answer.startswith("() ")
    assert len(entries(cache)) == 1


def test_a_cut_off_file_is_written_anew(cache):
    """A full disk or a crash may leave half a file; loading it would fail or, worse, read zeros."""
    ElasticSession(CHAIN, max_threads=1).close()
    (entry,) = entries(cache)
    whole = (entry / WEIGHTS_NAME).stat().st_size
    os.truncate(entry / WEIGHTS_NAME, whole // 2)
    with ElasticSession(CHAIN, max_threads=2) as elastic:
        assert elastic.notes == ()
        assert agrees(elastic)
    assert entries(cache) == [entry]
    assert (entry / WEIGHTS_NAME).stat().st_size == whole


def test_a_damaged_file_is_written_anew(cache):
    """Right size but wrong content: ONNX Runtime refuses it, and the original is at hand."""
    ElasticSession(CHAIN, max_threads=1).close()
    (entry,) = entries(cache)
    size = (entry / MODEL_NAME).stat().st_size
    (entry / MODEL_NAME).write_bytes(b"\xff" * size)
    with ElasticSession(CHAIN, max_threads=2) as elastic:
        assert elastic.notes == ()
        assert agrees(elastic)
    assert entries(cache) == [entry]


def test_leftovers_of_killed_processes_are_removed(cache):
    """A process that dies while saving would otherwise leave a copy of the weights for ever; a live one is spared."""
    for name in ("old", "young"):
        (cache / "models" / f".saving-{name}").mkdir(parents=True)
        (cache / "models" / f".saving-{name}" / WEIGHTS_NAME).write_bytes(b"0")
    cache.chmod(0o700)
    os.utime(cache / "models" / ".saving-old", (0, 0))
    ElasticSession(CHAIN, max_threads=1).close()
    assert [path.name for path in entries(cache) if path.name.startswith(".")] == [".saving-young"]


HOSTILE = [
    *("", "[]", "3", "{}", json.dumps({"other": 1}), "[" * 100_000, '{"model.onnx": NaN}', '{"model.onnx": 1, ' * 3),
    json.dumps({MODEL_NAME: 5, "../../secret": 5}),
    json.dumps({f"{i}": 5 for i in range(101)}),
    '{"model.onnx": 1, "model.onnx": 1}',
    '{"model.onnx": "' + "x" * 2**25 + '"}',
]


@pytest.mark.parametrize("manifest", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_manifest_is_written_anew(cache, manifest):
    """Whatever the manifest has become, the answer is to make the entry again."""
    ElasticSession(CHAIN, max_threads=1).close()
    (entry,) = entries(cache)
    (entry / "manifest.json").write_text(manifest)
    with ElasticSession(CHAIN, max_threads=1) as elastic:
        assert elastic.notes == ()
    assert set(json.loads((entry / "manifest.json").read_text())) == {MODEL_NAME, WEIGHTS_NAME}


def test_a_cache_cleared_while_serving_does_no_harm(cache):
    """Sessions keep what they have mapped, and further ones are made from the original."""
    with ElasticSession(CHAIN, max_threads=4) as elastic:
        shutil.rmtree(cache)
        assert agrees(elastic)
        elastic.reserve(2)
        assert agrees(elastic)


def test_an_unusable_cache_directory_is_replaced_and_noted(tmp_path, monkeypatch):
    """Read-only containers have no cache: serving works all the same and the user is told what to set."""
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with ElasticSession(CHAIN, max_threads=2, cache_dir=blocked / "cache") as elastic:
        (note,) = elastic.notes
        assert f"the cache directory {blocked / 'cache'} cannot be used" in note
        assert "SPONGE_CACHE_DIR" in note
        temporary = elastic._factory._cache.path
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
        assert agrees(elastic)
    assert not temporary.exists()


def test_a_cache_directory_that_others_may_write_to_is_not_trusted(tmp_path):
    """Who can put a model there decides what this process computes."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    opened = open_cache(shared)
    assert "other users may write to it" in opened.note
    assert opened.path != shared
    opened.close()
    assert not opened.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to someone else")
def test_a_cache_directory_of_someone_else_is_not_trusted(tmp_path):
    """As above, by owner."""
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 12345, 12345)
    opened = open_cache(theirs)
    assert "it belongs to user 12345" in opened.note
    opened.close()


def test_a_cache_directory_that_others_may_exchange_is_not_trusted(tmp_path):
    """Where all may write, or in somebody else's, a directory of ours can be renamed and another put there."""
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o777)
    opened = open_cache(above / "cache")
    assert f"all users may write to {above}" in opened.note
    opened.close()
    above.chmod(0o1777)
    assert open_cache(above / "cache").note == "", "as in /tmp, nobody else may rename it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to someone else")
def test_a_cache_directory_in_that_of_someone_else_is_not_trusted(tmp_path):
    """As with ``sudo`` that keeps HOME: what root loads must not be theirs to exchange."""
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    os.chown(home, 12345, 12345)
    opened = open_cache(home / ".cache" / "sponge")
    assert f"{home} belongs to user 12345" in opened.note
    opened.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to someone else")
def test_a_cache_directory_through_a_link_of_someone_else_is_not_trusted(tmp_path):
    """In /tmp anybody can have a name lead to a directory of ours; a link of our own is our business."""
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(ours)
    assert open_cache(link).path == ours
    os.chown(link, 12345, 12345, follow_symlinks=False)
    opened = open_cache(link)
    assert "it is a link made by user 12345" in opened.note
    opened.close()
    assert list(ours.iterdir()) == []


@pytest.mark.parametrize("kind", ["linked entry", "linked weights", "second name", "open to others"])
def test_a_saved_model_that_is_not_ours_alone_is_written_anew(cache, tmp_path, kind):
    """What is loaded decides what is computed: links planted in the cache are replaced, not followed."""
    ElasticSession(CHAIN, max_threads=1).close()
    (entry,) = entries(cache)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(entry, elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    weights = entry / WEIGHTS_NAME
    if kind == "linked entry":
        shutil.rmtree(entry)
        entry.symlink_to(elsewhere)
    elif kind == "open to others":
        weights.chmod(0o666)
    else:
        weights.unlink()
        (weights.symlink_to if kind == "linked weights" else weights.hardlink_to)(elsewhere / WEIGHTS_NAME)
    with ElasticSession(CHAIN, max_threads=1) as elastic:
        assert elastic.notes == ()
        assert agrees(elastic)
    assert entries(cache) == [entry]
    for path in (entry, *entry.iterdir()):
        status = path.lstat()
        assert stat.S_IMODE(status.st_mode) == (0o700 if path == entry else 0o600)
        assert path == entry or status.st_nlink == 1
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_a_folder_of_saved_models_that_is_a_link_is_not_used(cache, tmp_path):
    """Nothing is written outside of the cache; the model is served from its original."""
    cache.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (cache / "models").symlink_to(tmp_path / "elsewhere")
    with ElasticSession(CHAIN, max_threads=1) as elastic:
        (note,) = elastic.notes
        assert "models is a link or a special file" in note
        assert agrees(elastic)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_default_cache_directory(monkeypatch):
    """The documented places, in their order; relative XDG paths are to be ignored."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SPONGE_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_path() == Path("/a")
    monkeypatch.delenv("SPONGE_CACHE_DIR")
    assert default_cache_path() == Path("/b/sponge")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_path() == Path("/home/someone/.cache/sponge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_path() == Path("/home/someone/.cache/sponge")


def test_a_model_that_cannot_be_saved_is_served_and_noted(cache):
    """Sessions of the original model cost memory, not correctness."""
    cache.mkdir(mode=0o700)
    (cache / "models").write_text("in the way")
    with ElasticSession(CHAIN, max_threads=4, max_lanes=2) as elastic:
        (note,) = elastic.notes
        assert "optimised form cannot be saved" in note
        assert "every session holds its own copy of the weights" in note
        assert agrees(elastic)


def test_a_saved_model_that_never_loads_is_given_up_and_noted(monkeypatch):
    """Models exist whose optimised form ONNX Runtime writes but cannot read; here the reading is made to fail."""
    monkeypatch.setattr("sponge.live.session_factory.model_file.save", lambda *_: Path("/absent/model.onnx"))
    with ElasticSession(CHAIN, max_threads=2) as elastic:
        (note,) = elastic.notes
        assert "the optimised model cannot be loaded again" in note
        assert agrees(elastic)


def test_models_in_onnx_runtimes_own_format_are_served_and_noted(tmp_path):
    """They are optimised already and cannot be saved with external weights."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(CHAIN, options)
    for given in (tmp_path / "model.ort", (tmp_path / "model.ort").read_bytes()):
        with ElasticSession(given, max_threads=2) as elastic:
            (note,) = elastic.notes
            assert "it is in ONNX Runtime's own format" in note
            assert agrees(elastic)


def test_providers_other_than_the_cpu_are_not_saved():
    """They compile nodes or place them on devices; only the original model is sure to load again."""
    source = ModelSource(data=CHAIN)
    azure = SessionSettings(providers=[("AzureExecutionProvider", {}), ("CPUExecutionProvider", {})])
    assert why_not_saved(source, azure) == ""
    openvino = SessionSettings(providers=["OpenVINOExecutionProvider", "CPUExecutionProvider"])
    assert "['OpenVINOExecutionProvider', 'CPUExecutionProvider'] are not the CPU alone" in why_not_saved(
        source, openvino
    )


def save_with_external_weights(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    model = onnx.load_from_string(CHAIN)
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def test_external_weights_belong_to_the_hash(tmp_path):
    """Two fine-tuned models may have the same graph file: their profiles and saved models must not be mixed up."""
    path = save_with_external_weights(tmp_path / "external")
    assert external_locations(path.read_bytes()) == {"weights.data"}
    before = ModelSource(path=str(path)).digest()
    with ElasticSession(path, max_threads=2) as elastic:
        assert elastic.model_hash == before
        assert elastic.notes == ()
        assert agrees(elastic)
    weights = bytearray((path.parent / "weights.data").read_bytes())
    weights[-1] ^= 1
    (path.parent / "weights.data").write_bytes(weights)
    assert ModelSource(path=str(path)).digest() != before


@pytest.mark.parametrize("kind", ["absolute", "above"])
def test_external_weights_outside_of_the_folder_are_refused(tmp_path, kind):
    """A model is data: it may not have other files read, such as one that never ends."""
    path = save_with_external_weights(tmp_path / "external")
    outside = tmp_path / "outside.data"
    (path.parent / "weights.data").rename(outside)
    location = str(outside) if kind == "absolute" else "x/../../outside.data"
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    (path.parent / "x").mkdir()
    with pytest.raises(UnsupportedModel, match="lie outside of its folder") as caught:
        ElasticSession(path, max_threads=1)
    assert repr(location) in str(caught.value)


def test_external_weights_of_a_model_given_as_bytes(tmp_path):
    """The session's option says where they lie; it must reach the saving session and not the ones that load."""
    path = save_with_external_weights(tmp_path / "external")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(path.read_bytes(), options)
    with ElasticSession(session, max_threads=2) as elastic:
        assert elastic.model_hash == ModelSource(path=str(path)).digest()
        assert not [note for note in elastic.notes if "copy of the weights" in note]
        assert agrees(elastic)


def test_external_locations_survive_hostile_bytes():
    """Weights may hold any bytes: the search must neither fail nor run away."""
    key = b"\x0a\x08location\x12"
    assert external_locations(key) == set()
    assert external_locations(key + b"\x05a/b.c") == {"a/b.c"}
    assert external_locations(key + b"\x81\x02" + b"n" * 257) == {"n" * 257}
    assert external_locations(key + b"\xff" * 20) == set()
    assert external_locations(key + b"\x03a\0b") == set()
    assert external_locations(key + b"\xff") == set()
    assert external_locations(b"no weights outside") == set()
