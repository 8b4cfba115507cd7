"""ElasticSession: one model, whose intra-op threads change between two runs at no cost.

ONNX Runtime fixes the thread count when a session is made. So there is a session per *width* (number of threads), made
before serving, over shared weights (see `sponge.live.model_file`) and one shared arena; changing the width is choosing
another session.

Rules:

* A session of two or more threads runs one batch at a time: several callers would oversubscribe its pool. For every
  such width there are as many sessions as lanes fit into the threads, and a run borrows a free one or waits for it.
* At one thread the caller does all the work, there is no pool to oversubscribe, and one session serves all lanes.
* Nothing is built or loaded while serving; `ElasticSession.reserve` is called before.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeAlias

import numpy as np
import onnxruntime as ort

from sponge.live.batching import part
from sponge.live.session_factory import SessionFactory
from sponge.live.tensors import GroupKey, TensorSpec, check_strings, find_batch_axis, make_check, make_examples
from sponge.live.workers import Workers

_log = logging.getLogger("sponge")

Array = np.ndarray[Any, Any]
SessionOrModel: TypeAlias = ort.InferenceSession | str | os.PathLike[str] | bytes
"""What an `ElasticSession` is made of: a session, the path of a model, or its bytes."""

ALL_WIDTHS_UP_TO = 16
"""Up to this many threads every width gets its sessions; beyond, every fourth, to bound the number of threads."""


class ElasticSession:
    """An ONNX model whose number of intra-op threads is chosen anew for every run.

    Parameters
    ----------
    session_or_path
        An ``onnxruntime.InferenceSession`` (its model, providers and options are taken over as far as ONNX Runtime
        lets them be read, and `notes` tells the rest; the session stays the caller's, with its own copy of the weights
        until it is let go), a path, or a model's bytes.
    max_threads
        Largest number of threads of a run, and of all lanes together; by default the CPUs this process may use.
    max_lanes
        How many batches may run at the same time, see `reserve`.
    widths
        Numbers of threads to be ready for; by default 1 to *max_threads*, thinned out above 16.
    spinning
        Whether workers wait for work by spinning. It burns CPU time after every run and hurts under a CPU quota.
    cache_dir
        Where the optimised model is kept; by default ``$SPONGE_CACHE_DIR``, ``$XDG_CACHE_HOME/sponge`` or
        ``~/.cache/sponge``. A temporary directory is used, and noted, where that is not private or not writable.
    sess_options, providers, provider_options
        As for ``InferenceSession``; only with a path or bytes.
    custom_op_libraries
        Shared libraries with the custom operators of the model.
    config_entries
        Session configuration entries for every session, over those of the wrapped session; for instance
        ``{"session.force_spinning_stop": "1"}`` with ``spinning=True``.

    Raises
    ------
    UnsupportedModel
        If an input or output is not a dense tensor of a NumPy type, or the model cannot be loaded.
    FileNotFoundError
        If the model's file does not exist.
    ValueError, TypeError
        If an argument is out of range or of the wrong type.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dynamic_batch: bool
    """Whether requests can be joined along axis 0. If not, each is run alone and counts as one row."""
    fixed_batch_rows: int | None
    """Size of axis 0 where the model fixes it at one number for all inputs."""
    separable: bool
    """Whether the outputs of joined requests can be parted again, as far as is known: false once a run has shown that
    an output does not have one row for each row of the inputs."""
    max_threads: int
    max_lanes: int
    widths: tuple[int, ...]

    def __init__(
        self,
        session_or_path: SessionOrModel,
        *,
        max_threads: int | None = None,
        max_lanes: int = 1,
        widths: Iterable[int] | None = None,
        spinning: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        custom_op_libraries: Iterable[str | os.PathLike[str]] = (),
        config_entries: Mapping[str, str] | None = None,
    ) -> None:
        self.max_threads = _at_least_one("max_threads", available_cpus() if max_threads is None else max_threads)
        self.max_lanes = _at_least_one("max_lanes", max_lanes)
        self.widths = _widths(widths, self.max_threads)
        self._threads = self.widths[-1]
        self._factory = SessionFactory(
            session_or_path,
            spinning=spinning,
            cache_dir=cache_dir,
            sess_options=sess_options,
            providers=providers,
            provider_options=provider_options,
            custom_op_libraries=custom_op_libraries,
            config_entries=config_entries,
        )
        self._workers = Workers()
        self._build_lock = threading.Lock()
        self._run_options = ort.RunOptions()
        self._closed = False
        self._why_closed = "the ElasticSession is closed"
        self._pid = os.getpid()
        _sessions.add(self)
        # Per width the sessions that no run has borrowed, as their bound `run`; None in place of one means closed.
        self._free: dict[int, queue.SimpleQueue[Any]] = {width: queue.SimpleQueue() for width in self.widths}
        self._built = dict.fromkeys(self.widths, 0)
        self._run_single: Any = None
        self.inputs, self.outputs = self._workers.build(self._factory.open)
        axis = find_batch_axis(self.inputs, self.outputs)
        self.dynamic_batch, self.fixed_batch_rows = axis.dynamic, axis.fixed_rows
        self.separable = self.dynamic_batch
        self._factory.notes.extend(axis.notes)
        self._check = make_check(self.inputs, dynamic_batch=self.dynamic_batch)
        self._n_inputs = len(self.inputs)
        self._text = tuple(spec.name for spec in self.inputs if spec.dtype.kind == "O")
        self._output_names = [spec.name for spec in self.outputs]
        self.reserve(self.max_lanes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be kept from the wrapped session, and other things to know, in plain words."""
        return tuple(self._factory.notes)

    @property
    def model_hash(self) -> str:
        """SHA-256 of the model, its external weights included."""
        return self._factory.model_hash

    @property
    def threads(self) -> int:
        """Intra-op threads of a run that does not name its own, the calling thread among them."""
        return self._threads

    def set_threads(self, threads: int) -> None:
        """Change `threads`; runs that are under way keep theirs. Raises ValueError if it is none of `widths`."""
        if threads not in self._free:
            raise self._no_width(threads)
        self._threads = threads

    def width_for(self, threads: int) -> int:
        """Return the largest of `widths` that is at most *threads*, or the smallest there is."""
        return max((width for width in self.widths if width <= threads), default=self.widths[0])

    def run(self, inputs: Mapping[str, Array], *, threads: int | None = None) -> list[Array]:
        """Run the model; callable from several threads at once.

        Waits while all sessions of that width are busy, which does not happen with at most `max_lanes` callers whose
        threads add up to at most `max_threads`.

        Parameters
        ----------
        inputs
            Array by input name; see `check` for what is expected. Shapes and dtypes are left to ONNX Runtime here.
        threads
            Number of threads of this run, one of `widths`; the property of the same name if not given.

        Returns
        -------
        list of ndarray
            The model's outputs in its order.

        Raises
        ------
        ValueError
            If *threads* is none of `widths`, or an input is missing.
        TypeError
            If an array of strings holds anything else.
        RuntimeError
            If the session is closed.
        Exception
            What ONNX Runtime raises for inputs that do not fit.
        """
        width = self._threads if threads is None else threads
        if type(inputs) is not dict:  # the only mapping that ONNX Runtime takes
            inputs = dict(inputs)
        if len(inputs) != self._n_inputs:
            self._refuse_missing(inputs)
        for name in self._text:
            check_strings(name, inputs[name])
        if width == 1 and (run := self._run_single) is not None:
            outputs: list[Array] = run(self._output_names, inputs, self._run_options)
            return outputs
        free = self._free.get(width)
        if free is None:
            raise self._no_width(width)
        run = free.get()
        if run is None:
            free.put(None)  # for the next who waits
            raise RuntimeError(self._why_closed)
        try:
            outputs = run(self._output_names, inputs, self._run_options)
        finally:
            free.put(run)
        return outputs

    def check(self, inputs: Mapping[str, Array]) -> tuple[int, GroupKey]:
        """Validate the inputs of one request and return its rows and the key of requests it may share a batch with.

        Every input must be there, as an array of the declared dtype and rank with the declared sizes, and all with the
        same number of rows, at least one. Arrays need not be contiguous. Where the batch axis is not free
        (`dynamic_batch` is False) a request counts as one row.

        Raises
        ------
        ValueError
            For a missing or unknown input, a wrong shape, unequal or no rows.
        TypeError
            For something that is no array, or of another dtype; nothing is cast.
        """
        return self._check(inputs)

    def example_inputs(
        self, batch_size: int, *, shapes: Mapping[str, Sequence[int]] | None = None, seed: int = 0
    ) -> dict[str, Array]:
        """Return random inputs: floats in [0, 1), integers 0 or 1, booleans, short strings.

        Parameters
        ----------
        batch_size
            Rows, at least 1; must be 1 where the batch axis is not free.
        shapes
            By input name the sizes of its axes, with or without the batch axis; needed for free axes only.
        seed
            Of the random numbers.

        Raises
        ------
        ValueError
            If an axis has no size, or *shapes* contradicts the model.
        """
        return make_examples(self.inputs, batch_size, dynamic_batch=self.dynamic_batch, shapes=shapes, seed=seed)

    def warm_up(self, batch_sizes: Iterable[int], *, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Run every session once at each batch size: first runs are slower. Arguments as for `example_inputs`."""
        examples = [self.example_inputs(size, shapes=shapes) for size in sorted(set(batch_sizes), reverse=True)]
        for width in self.widths:
            # All sessions of a width are borrowed before the first is given back, or one might be run twice.
            borrowed: list[Any] = []
            try:
                for _ in range(self._built[width]):
                    borrowed.append(self._free[width].get())
                    if borrowed[-1] is None:
                        raise RuntimeError(self._why_closed)
                for run, example in itertools.product(borrowed, examples):
                    outputs = run(self._output_names, example, None)
                    if self.separable and part(outputs, [len(next(iter(example.values())))]) is None:
                        self.not_separable()
            finally:
                for run in borrowed:
                    self._free[width].put(run)

    def not_separable(self) -> None:
        """Note that requests must be run one by one: a run has shown it. Said once."""
        if self.separable:
            self.separable = False
            note = (
                "an output of the model does not have one row for each row of the inputs: requests are run one by one; "
                "max_batch_size=1 lets plans know"
            )
            self._factory.notes.append(note)
            _log.warning("%s", note)

    def reserve(self, max_lanes: int) -> None:
        """Make sure that *max_lanes* batches can run at the same time, within `max_threads` in all.

        Adds the sessions that are missing; call it before serving. Raises ValueError if *max_lanes* is below 1.
        """
        _at_least_one("max_lanes", max_lanes)
        with self._build_lock:
            if self._closed:
                raise RuntimeError(self._why_closed)
            missing = {
                width: self._lanes(width, max_lanes) - self._built[width]
                for width in self.widths
                if self._lanes(width, max_lanes) > self._built[width]
            }
            if missing:
                self._workers.build(lambda: self._build(missing))
            self.max_lanes = max(self.max_lanes, max_lanes)

    def thread_ids(self) -> tuple[int, ...]:
        """Return the native ids of all worker threads of all sessions built so far; empty where there is no /proc.

        The threads that call `run` do their share of the work and are not among them.
        """
        return self._workers.thread_ids

    def cpu_s(self) -> float:
        """Return the CPU time used by those workers so far [s]; kept after closing."""
        return self._workers.cpu_s()

    def break_off(self) -> None:
        """Make the runs under way raise as soon as the operator that each is at returns, and all later runs at once.

        For a process that must end: a model that hangs in a loop is got out of it, one that hangs in a single operator
        is not.
        """
        self._run_options.terminate = True

    def close(self) -> None:
        """Wait for the runs under way, then end all sessions with their threads. May be called again."""
        with self._build_lock:
            if self._closed:
                return
            self._closed = True
            self._run_single = None
            borrowed = [self._free[width].get() for width in self.widths for _ in range(self._built[width])]
            for free in self._free.values():
                free.put(None)
            self._workers.forget()
            borrowed.clear()
            self._factory.close()

    def leave_to_parent(self) -> None:
        """In a forked child: refuse to run, for the threads of the pools are not here, nor who holds the locks."""
        self._build_lock = threading.Lock()
        self._closed = True
        self._why_closed = f"the ElasticSession belongs to process {self._pid}: make one in each worker, after the fork"
        self._run_single = None
        self._factory.leave_to_parent()
        self._free = {width: queue.SimpleQueue() for width in self.widths}
        for free in self._free.values():
            free.put(None)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ElasticSession cannot be pickled or copied: make one in each process, from the model")

    def __enter__(self) -> ElasticSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lanes(self, width: int, max_lanes: int) -> int:
        # A lane of a fraction of a core less has as many threads: lanes of 1.5 cores run on two.
        return 1 if width == 1 else max(1, min(max_lanes, int(self.max_threads / (width - 0.5))))

    def _build(self, missing: Mapping[int, int]) -> None:
        for width, count in missing.items():
            for _ in range(count):
                run = _bound_run(self._factory.make(width))
                if width == 1:
                    self._run_single = run
                self._free[width].put(run)
                self._built[width] += 1

    def _refuse_missing(self, inputs: Mapping[str, Array]) -> None:
        """Raise ValueError if an input is missing: ONNX Runtime would find out in the middle of the run, or never."""
        names = [spec.name for spec in self.inputs]
        for name in names:
            if name not in inputs:
                raise ValueError(f"input {name!r} is missing; the model's inputs are {names}")

    def _no_width(self, threads: int) -> ValueError:
        return ValueError(f"threads must be one of the widths {self.widths}, got {threads!r}")


def _bound_run(session: Any) -> Any:
    """Return the call that runs a session.

    The Python wrapper checks the names and offers another provider when one fails; ONNX Runtime checks the names
    again below it, and a service must not change providers by itself. Going below saves a third of the call's cost.
    """
    return getattr(session, "_sess", session).run


_sessions: weakref.WeakSet[ElasticSession] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for session in list(_sessions):
        session.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _widths(widths: Iterable[int] | None, max_threads: int) -> tuple[int, ...]:
    if widths is None:
        return tuple(n for n in range(1, max_threads + 1) if n <= ALL_WIDTHS_UP_TO or n % 4 == 0 or n == max_threads)
    chosen = tuple(sorted({_at_least_one("widths", width) for width in widths}))
    if not chosen or chosen[-1] > max_threads:
        raise ValueError(f"widths must be numbers of threads from 1 to max_threads ({max_threads}), got {chosen!r}")
    return chosen


def available_cpus() -> int:
    """Return how many CPUs this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
