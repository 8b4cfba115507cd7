"""Makes ONNX Runtime sessions of one model, of any width, over shared weights where that is possible.

It holds what the sessions have in common: model, settings, the saved optimised model, and the notes on what could not
be kept. When the optimised model cannot be saved, or not be loaded again, sessions are made from the original model:
they work the same but hold a copy of the weights each, which is noted.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import onnxruntime as ort

from sponge.errors import UnsupportedModel
from sponge.live import model_file
from sponge.live.cache import open_cache
from sponge.live.session_options import EXTERNAL_DATA_FOLDER, SessionSettings, read_settings
from sponge.live.tensors import TensorSpec

NOT_SHARED = "every session holds its own copy of the weights"


class SessionFactory:
    """Sessions of one model; see `sponge.ElasticSession` for the parameters."""

    def __init__(
        self,
        session_or_path: Any,
        *,
        spinning: bool,
        cache_dir: str | os.PathLike[str] | None,
        sess_options: Any,
        providers: Sequence[Any] | None,
        provider_options: Sequence[Mapping[str, Any]] | None,
        custom_op_libraries: Iterable[str | os.PathLike[str]],
        config_entries: Mapping[str, str] | None,
    ) -> None:
        source = model_file.find_source(session_or_path)
        libraries = tuple(os.path.abspath(library) for library in custom_op_libraries)
        if missing := [library for library in libraries if not os.path.isfile(library)]:
            raise FileNotFoundError(f"custom_op_libraries: there is no file {missing[0]!r}")
        given = {"sess_options": sess_options, "providers": providers, "provider_options": provider_options}
        if not isinstance(session_or_path, ort.InferenceSession):
            self._wrapped = None
            if any(value is not None for value in given.values()):
                # Made once as the user means it: what the options hold shows in the session, and mistakes are told.
                self._wrapped = _make(source, **given)
        elif named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} must not be given with an InferenceSession: it is read from the session")
        else:
            self._wrapped = session_or_path
        settings = SessionSettings() if self._wrapped is None else read_settings(self._wrapped)
        config = {**settings.config, **(config_entries or {})}
        self._settings = attrs.evolve(
            settings, spinning=spinning, custom_op_libraries=libraries, config=config, notes=()
        )
        self._source = attrs.evolve(source, data_folder=config.get(EXTERNAL_DATA_FOLDER))
        self._saved: Path | None = None
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self.model_hash = self._source.digest()
        self.notes = list(settings.notes)
        self._cache = open_cache(cache_dir)
        if self._cache.note:
            self.notes.append(self._cache.note)

    def open(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Optimise and save the model if that was not done before; return its inputs and outputs."""
        self._prepare()
        described = first = self.make(1)
        if self._wrapped is not None:
            described = self._wrapped
            free_dimensions = _free_dimensions(first, self._wrapped)
            if free_dimensions:
                self._settings = attrs.evolve(self._settings, free_dimensions=free_dimensions)
                self._prepare()
        # Its own pool and memory must not outlive their use here if the caller lets the session go.
        self._wrapped = None
        inputs = tuple(TensorSpec.of(arg, role="input") for arg in described.get_inputs())
        outputs = tuple(TensorSpec.of(arg, role="output") for arg in described.get_outputs())
        return inputs, outputs

    def make(self, threads: int) -> Any:
        """Return a new session of *threads* intra-op threads, the caller's among them."""
        if self._saved is not None:
            try:
                return self._kept(self._load(threads))
            except Exception:
                # Damaged, or removed by someone who cleared the cache: once more from the original.
                model_file.discard(self._saved)
                self._prepare()
        if self._saved is not None:
            try:
                return self._kept(self._load(threads))
            except Exception as error:
                self._saved = None
                self._note(f"the optimised model cannot be loaded again ({_brief(error)}): {NOT_SHARED}")
        options = self._settings.options(threads)
        return self._kept(_make(self._source, sess_options=options, providers=list(self._settings.providers)))

    def close(self) -> None:
        """Remove what was temporary; sessions that are still in use keep working."""
        self._cache.close()

    def leave_to_parent(self) -> None:
        """In a forked child: never destroy the sessions, for that joins threads that are not here, and crashes."""
        for session in list(self._made):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
        self._cache.leave_to_parent()

    def _kept(self, session: Any) -> Any:
        self._made.add(getattr(session, "_sess", session))
        return session

    def _load(self, threads: int) -> Any:
        settings = self._settings.for_saved_model()
        return ort.InferenceSession(str(self._saved), settings.options(threads), providers=list(settings.providers))

    def _prepare(self) -> None:
        """Find or make the saved model, or note why there is none."""
        self._saved = None
        reason = model_file.why_not_saved(self._source, self._settings)
        if not reason:
            key = model_file.saved_model_key(self.model_hash, self._settings)
            self._saved = model_file.find_saved(self._cache, key)
            if self._saved is not None:
                return
            try:
                self._saved = model_file.save(self._cache, key, self._source, self._settings)
                return
            except Exception as error:  # ONNX Runtime's errors have no base class but Exception
                reason = _brief(error)
        self._note(f"the model's optimised form cannot be saved ({reason}): {NOT_SHARED}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _make(source: model_file.ModelSource, **arguments: Any) -> Any:
    try:
        return ort.InferenceSession(source.argument, **arguments)
    except Exception as error:
        name = source.path or "the given bytes"
        advice = ""
        if "is not a registered function/op" in str(error) or "No Op registered" in str(error):
            advice = ". If it uses custom operators, pass their library as custom_op_libraries"
        raise UnsupportedModel(f"ONNX Runtime cannot load the model in {name}: {_brief(error)}{advice}") from error


def _free_dimensions(ours: Any, theirs: Any) -> dict[str, int]:
    """Return the sizes that a session's options gave to named axes, seen by comparing it with one without them."""
    inputs = zip(ours.get_inputs(), theirs.get_inputs(), strict=True)
    return {
        our_dim: their_dim
        for our_input, their_input in inputs
        for our_dim, their_dim in zip(our_input.shape, their_input.shape, strict=True)
        if isinstance(our_dim, str) and isinstance(their_dim, int)
    }


def _brief(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0] if len(text[0]) <= 300 else text[0][:297] + "..."
