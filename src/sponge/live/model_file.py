"""Where a model comes from, its hash, and its optimised form on disk.

Sessions of several widths must not hold a copy of the weights each. ONNX Runtime maps *external* weights into memory,
and pages of one file are shared by all who map it; but the optimiser makes new tensors and the kernels rearrange
("prepack") them, both in private memory. So the optimised model is saved once, with weights and prepacked weights in a
file beside it, and every session loads that with optimisations off: nothing is left to make privately.

The saved form holds layouts for this CPU and this build of ONNX Runtime, so both are part of its key.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import onnxruntime as ort

from sponge.errors import UnsupportedModel
from sponge.files import open_data, write_data
from sponge.live.cache import CacheDirectory, why_not_trusted
from sponge.live.session_options import SessionSettings
from sponge.profile.checks import mapping, read_json

MODEL_NAME, WEIGHTS_NAME, MANIFEST_NAME = "model.onnx", "weights.bin", "manifest.json"
FORMAT = 1
"""Part of the key; raise it when what is saved, or how, changes."""

MIN_EXTERNAL_BYTES = 1024
"""Smaller tensors stay in the model file: a mapping each would cost a page of 4 KiB."""

UNFINISHED = ".saving-"
_MOST_FILES = 100

_LOCATION = re.compile(rb"\x0a\x08location\x12")


@attrs.frozen(kw_only=True)
class ModelSource:
    """A model as a file or as bytes; exactly one is given."""

    path: str | None = None
    data: bytes | None = None
    data_folder: str | None = None
    """Where external weights lie; beside the model file unless the session was told otherwise."""

    @property
    def argument(self) -> str | bytes:
        """What ``InferenceSession`` takes."""
        if self.path is not None:
            return self.path
        assert self.data is not None
        return self.data

    @property
    def ort_format(self) -> bool:
        """Whether it is a model in ONNX Runtime's own format, which cannot be optimised and saved again."""
        if self.path is None:
            return self.data is not None and self.data[4:8] == b"ORTM"
        with open(self.path, "rb") as file:
            return file.read(8)[4:8] == b"ORTM"

    def digest(self) -> str:
        """Return the SHA-256 of the model and of the external weight files it names, as far as they are found."""
        if self.path is None or os.path.getsize(self.path) == 0:
            return self._digest(self.data or b"")
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return self._digest(content)

    def _digest(self, content: bytes | mmap.mmap) -> str:
        digest = hashlib.sha256(content)
        for path in self._external_files(content):
            digest.update(path.name.encode())
            with open_data(path) as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def _external_files(self, content: bytes | mmap.mmap) -> Iterator[Path]:
        folder = Path(self.data_folder or (Path(self.path).parent if self.path is not None else "."))
        for name in sorted(external_locations(content)):
            path = folder / name
            if path.is_file():
                if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
                    # Newer versions of ONNX Runtime refuse it too: a model is data, and names no files of others.
                    raise UnsupportedModel(
                        f"the model's external weights {name!r} lie outside of its folder {folder}: put them beside it"
                    )
                yield path


def external_locations(content: bytes | mmap.mmap) -> set[str]:
    """Return the file names under which a serialised ONNX model keeps external weights.

    The entries are protobuf pairs of the key ``location`` and a length-delimited value (onnx.proto,
    ``TensorProto.external_data``); finding them by their bytes spares a dependency on the ``onnx`` package. A false
    match can only add a file that exists beside the model to its hash.
    """
    names = set()
    for match in _LOCATION.finditer(content):
        position, length, shift = match.end(), 0, 0
        while position < len(content) and shift < 28:
            byte = content[position]
            position, length, shift = position + 1, length | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        name = content[position : position + length].decode(errors="replace")
        if name and length <= 4096 and "\0" not in name:
            names.add(name)
    return names


def find_source(session_or_path: Any) -> ModelSource:
    """Return the model behind a path, its bytes, or an existing ``InferenceSession``.

    Raises
    ------
    TypeError
        If it is none of these.
    FileNotFoundError
        If the file is not there (any more).
    UnsupportedModel
        If the session does not say what it was made from.
    """
    if isinstance(session_or_path, (str, os.PathLike)):
        return _file_source(os.fspath(session_or_path))
    if isinstance(session_or_path, (bytes, bytearray)):
        return ModelSource(data=bytes(session_or_path))
    if not isinstance(session_or_path, ort.InferenceSession):
        raise TypeError(
            "session_or_path must be an onnxruntime.InferenceSession, a path or the bytes of a model, "
            f"got {type(session_or_path).__name__}"
        )
    # ONNX Runtime has no public way back from a session to its model.
    path, data = getattr(session_or_path, "_model_path", None), getattr(session_or_path, "_model_bytes", None)
    if path:
        return _file_source(os.fspath(path))
    if data:
        return ModelSource(data=bytes(data))
    raise UnsupportedModel(
        "the session does not tell which model it was made from: pass the path or the bytes of the model instead"
    )


def _file_source(path: str | bytes) -> ModelSource:
    name = os.fsdecode(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"there is no model file {name!r} (current directory: {os.getcwd()})")
    return ModelSource(path=os.path.abspath(name))


@functools.cache
def machine_identity() -> str:
    """Return what a saved model depends on besides the model: CPU features and the build of ONNX Runtime."""
    build = ort.get_build_info() if hasattr(ort, "get_build_info") else ""
    wanted = ("flags", "features", "model name", "cpu part", "cpu implementer")
    lines: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip().lower() in wanted:
                    lines.setdefault(name.strip().lower(), value.strip())
    except OSError:
        lines["processor"] = platform.processor()
    return repr((ort.get_version_string(), build, platform.machine(), sorted(lines.items())))


def saved_model_key(model_hash: str, settings: SessionSettings) -> str:
    """Return the name of a saved model's folder in the cache."""
    rest = hashlib.sha256(repr((FORMAT, machine_identity(), settings.identity())).encode()).hexdigest()
    return f"{model_hash[:24]}-{rest[:24]}"


def why_not_saved(source: ModelSource, settings: SessionSettings) -> str:
    """Return why a model's optimised form cannot serve all sessions, or an empty string."""
    if source.ort_format:
        return "it is in ONNX Runtime's own format"
    if not settings.on_cpu_only:
        return f"its providers {[p if isinstance(p, str) else p[0] for p in settings.providers]} are not the CPU alone"
    return ""


def find_saved(cache: CacheDirectory, key: str) -> Path | None:
    """Return the saved model of that key if it is there in full."""
    folder = cache.path / "models" / key
    try:
        sizes = mapping(read_json(folder / MANIFEST_NAME), "the manifest", most=_MOST_FILES)
        names = [MANIFEST_NAME, *sizes]
        if MODEL_NAME not in sizes or any(os.path.basename(name) != name for name in names):
            return None
        if why_not_trusted(folder) or any(why_not_trusted(folder / name) for name in names):
            return None
        whole_sizes = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return None
    return folder / MODEL_NAME if whole_sizes else None


def save(cache: CacheDirectory, key: str, source: ModelSource, settings: SessionSettings) -> Path:
    """Optimise the model, write it with its weights under *key* and return its path.

    The folder is written privately and renamed when complete; if another process has been faster, its result stays.
    Raises what ONNX Runtime raises for a model that it cannot load or save, and OSError where nothing can be written.
    """
    models = cache.path / "models"
    models.mkdir(mode=0o700, exist_ok=True)
    if problem := why_not_trusted(models):
        raise OSError(f"{models} cannot be used: {problem}")
    _remove_leftovers(models)
    work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=models))  # mode 0700
    try:
        options = settings.saving_options(str(work / MODEL_NAME), WEIGHTS_NAME, MIN_EXTERNAL_BYTES)
        ort.InferenceSession(source.argument, options, providers=list(settings.providers))
        sizes = {}
        for file in work.iterdir():
            file.chmod(0o600)
            sizes[file.name] = file.stat().st_size
            _flush(file)  # after a crash of the machine weights of the right size might be zeros
        write_data(work / MANIFEST_NAME, json.dumps(sizes).encode())
        final = models / key
        for _ in range(2):
            try:
                work.rename(final)
                break
            except OSError:
                if find_saved(cache, key) is not None:
                    break
                # An incomplete entry (a full disk, a crash), or something that is not ours, is in the way.
                _clear(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    saved = find_saved(cache, key)
    if saved is None:
        raise OSError(f"the optimised model could not be kept in {final}")
    return saved


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """Remove what is there; of a link, the link."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(models: Path) -> None:
    """Remove what killed processes left half-written; nothing takes a day to save."""
    for path in models.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path, ignore_errors=True)


def discard(saved: Path) -> None:
    """Remove a saved model that turned out not to load; sessions that have it mapped are not disturbed."""
    shutil.rmtree(saved.parent, ignore_errors=True)
