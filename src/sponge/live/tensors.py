"""What a model's inputs and outputs look like, which axis is the batch, and whether a request fits.

The batch axis is axis 0 of every tensor, the only place where rows of different requests can be joined and parted
again without knowing the model. A model is served in batches when axis 0 is free in every input and no output
contradicts that; what the declared shapes leave open (an output of unknown shape) shows only when the model runs.

Dtypes are compared, never converted: a silent cast costs a copy per request and hides mistakes of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from sponge.errors import UnsupportedModel

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(string)": np.dtype(object),
}
"""NumPy dtype by ONNX Runtime's name of the type: all that its Python interface takes and returns as arrays.
bfloat16, the 8-bit floats and the types below 8 bits exist inside models only."""

MAX_KNOWN_SHAPES = 1024
"""Shapes remembered by a checker; a service that meets more distinct ones pays the full check for the rest."""

GroupKey = tuple[tuple[int, ...], ...]
"""Shapes of a request's inputs, in the model's order, without the batch axis: equal keys may share a batch."""

Check = Callable[[Mapping[str, "np.ndarray[Any, Any]"]], tuple[int, GroupKey]]


@attrs.frozen
class TensorSpec:
    """One input or output of a model."""

    name: str
    dtype: np.dtype[Any]
    """``object`` for strings."""
    shape: tuple[int | None, ...]
    """Size per axis; None where it may change from run to run. Empty for a scalar and for a tensor of unknown rank,
    which ONNX Runtime does not tell apart."""
    axis_names: tuple[str | None, ...] = ()
    """The model's own names of the free axes, None where it gives none."""

    @classmethod
    def of(cls, arg: Any, *, role: str) -> TensorSpec:
        """Describe ONNX Runtime's ``NodeArg`` *arg*; *role* is "input" or "output", for the message.

        Raises
        ------
        UnsupportedModel
            If it is no dense tensor, or of a type that NumPy arrays cannot carry.
        """
        dtype = DTYPES.get(arg.type)
        if dtype is None:
            if arg.type.startswith("tensor("):
                advice = "no NumPy array carries this type: add a Cast to float32 at the model's border"
            elif arg.type.startswith("seq(map("):
                advice = "export the classifier with plain tensors (for scikit-learn: options={'zipmap': False})"
            else:
                advice = "only dense tensors can be cut into rows and batched: export the model with tensors instead"
            raise UnsupportedModel(f"{role} {arg.name!r} of the model is of type {arg.type}; {advice}")
        sizes = [dim if isinstance(dim, int) and dim >= 0 else None for dim in arg.shape]
        names = [dim if isinstance(dim, str) else None for dim in arg.shape]
        return cls(name=arg.name, dtype=dtype, shape=tuple(sizes), axis_names=tuple(names))


@attrs.frozen(kw_only=True)
class BatchAxis:
    """Whether requests can share a run of this model."""

    dynamic: bool
    fixed_rows: int | None = None
    """Size of axis 0 where all inputs fix it at the same number."""
    notes: tuple[str, ...] = ()


def find_batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> BatchAxis:
    """Decide from the declared shapes whether axis 0 is a batch axis of any size."""
    reason = _fixed_input(inputs) or _fixed_output(inputs, outputs)
    if reason:
        first = {spec.shape[0] if spec.shape else None for spec in inputs}
        rows = first.pop() if len(first) == 1 else None
        note = f"{reason}: requests are run one at a time (batch size 1), each with the whole of that axis"
        return BatchAxis(dynamic=False, fixed_rows=rows, notes=(note,))
    names = sorted({spec.axis_names[0] for spec in inputs if spec.axis_names and spec.axis_names[0]})
    if len(names) > 1:
        note = (
            f"the inputs name their first axis differently ({', '.join(names)}); it is taken as the batch axis of all"
        )
        return BatchAxis(dynamic=True, notes=(note,))
    return BatchAxis(dynamic=True)


def _fixed_input(inputs: Sequence[TensorSpec]) -> str | None:
    """Return why the inputs cannot be joined along axis 0, or None."""
    if not inputs:
        return "the model has no input"
    for spec in inputs:
        if not spec.shape:
            return f"input {spec.name!r} is a scalar or of unknown rank and has no batch axis"
    for spec in inputs:
        if spec.shape[0] is not None:
            return f"axis 0 of input {spec.name!r} is fixed at {spec.shape[0]}"
    return None


def _fixed_output(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """Return why the outputs cannot be parted along axis 0, or None."""
    batch_names = {spec.axis_names[0] for spec in inputs if spec.axis_names}
    other_names = {name for spec in inputs for name in spec.axis_names[1:]} - batch_names - {None}
    for spec in outputs:
        if spec.shape and spec.shape[0] is not None:
            return f"axis 0 of output {spec.name!r} is fixed at {spec.shape[0]} and does not follow the batch"
        if spec.axis_names and spec.axis_names[0] in other_names:
            return f"axis 0 of output {spec.name!r} is {spec.axis_names[0]!r}, which is not the batch axis"
    return None


def make_check(inputs: Sequence[TensorSpec], *, dynamic_batch: bool) -> Check:
    """Return the function that validates one request and gives its rows and group key.

    The shapes that passed are remembered, so that a request of a known shape costs a look-up per input.
    """
    known: dict[Any, tuple[int, GroupKey]] = {}
    items = tuple((spec.name, spec.dtype) for spec in inputs)
    n_inputs = len(items)
    text = [spec for spec in inputs if spec.dtype.kind == "O"]
    ndarray = np.ndarray

    def explain(request: Any) -> tuple[int, GroupKey]:
        return _check_fully(inputs, request, dynamic_batch=dynamic_batch)

    def check_one(request: Mapping[str, np.ndarray[Any, Any]]) -> tuple[int, GroupKey]:
        try:
            array = request[name]
            if array.dtype == dtype and len(request) == 1 and isinstance(array, ndarray):
                return known[array.shape]
        except (KeyError, TypeError, AttributeError, IndexError):
            pass
        answer = explain(request)
        if len(known) < MAX_KNOWN_SHAPES:
            known[request[name].shape] = answer
        return answer

    def check_many(request: Mapping[str, np.ndarray[Any, Any]]) -> tuple[int, GroupKey]:
        try:
            if len(request) == n_inputs:
                shapes = []
                for input_name, input_dtype in items:
                    array = request[input_name]
                    if array.dtype != input_dtype or not isinstance(array, ndarray):
                        break
                    shapes.append(array.shape)
                else:
                    return known[tuple(shapes)]
        except (KeyError, TypeError, AttributeError, IndexError):
            pass
        answer = explain(request)
        if len(known) < MAX_KNOWN_SHAPES:
            known[tuple([request[input_name].shape for input_name, _ in items])] = answer
        return answer

    def check_text(request: Mapping[str, np.ndarray[Any, Any]]) -> tuple[int, GroupKey]:
        answer = (check_many if n_inputs != 1 else check_one)(request)
        for spec in text:
            check_strings(spec.name, request[spec.name])
        return answer

    name, dtype = items[0] if items else ("", np.dtype(object))
    if text:
        return check_text
    return check_many if n_inputs != 1 else check_one


def hold_inputs(inputs: Mapping[str, Any], *, copy: bool) -> dict[str, Any]:
    """Return a request's arrays such that nothing its client does later can make them unfit for the batch.

    The mapping is read once, and each array is seen through a plain view of its own: what replaces it in the mapping,
    or changes the shape or dtype of the client's array object, is not seen. Numbers that are written into the array
    still are, unless *copy*. Arrays of strings are copied in any case: ONNX Runtime crashes on objects that cannot be
    converted, and one could be put in after the check. What is no array is left as it is, to be refused.
    """
    held: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            if copy or value.dtype.kind == "O":
                value = np.array(value, copy=True, order="C", subok=False)
            else:
                value = _view(value, np.ndarray)
        held[name] = value
    return held


_view = np.ndarray.view  # a subclass may have another one


def check_strings(name: str, array: np.ndarray[Any, Any]) -> None:
    """Raise TypeError unless an object array holds strings only: ONNX Runtime would convert anything, or crash."""
    for value in array.flat:
        if type(value) is not str and type(value) is not np.str_:
            raise TypeError(f"input {name!r} must hold str only, got {type(value).__name__}")


def _check_fully(inputs: Sequence[TensorSpec], request: Any, *, dynamic_batch: bool) -> tuple[int, GroupKey]:
    if not isinstance(request, Mapping):
        raise TypeError(f"inputs must be a mapping from input name to array, got {type(request).__name__}")
    expected = [spec.name for spec in inputs]
    if missing := [name for name in expected if name not in request]:
        raise ValueError(f"input {missing[0]!r} is missing; the model's inputs are {expected}")
    if unknown := [name for name in request if name not in expected]:
        raise ValueError(f"the model has no input {unknown[0]!r}; its inputs are {expected}")
    for spec in inputs:
        _check_array(spec, request[spec.name])
    shapes = tuple(request[name].shape for name in expected)
    if not dynamic_batch:
        return 1, shapes
    rows = shapes[0][0]
    for name, shape in zip(expected, shapes, strict=True):
        if shape[0] != rows:
            raise ValueError(
                f"input {name!r} has {shape[0]} rows (shape {shape}), but input {expected[0]!r} has {rows}: "
                "all inputs of a request need the same number of rows along axis 0"
            )
    if rows < 1:
        raise ValueError(f"input {expected[0]!r} has no rows (shape {shapes[0]}): a request needs at least one")
    return rows, tuple(shape[1:] for shape in shapes)


def _check_array(spec: TensorSpec, array: Any) -> None:
    """Check one array against its declared type, rank and fixed axes."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"input {spec.name!r} must be a numpy.ndarray, got {type(array).__name__}: {array!r:.60}")
    if array.dtype != spec.dtype:
        wanted = "object, holding str" if spec.dtype.kind == "O" else str(spec.dtype)
        raise TypeError(
            f"input {spec.name!r} must be of dtype {wanted}, got {array.dtype}; nothing is cast silently: "
            f"convert it, as by array.astype({str(spec.dtype)!r})"
        )
    if not spec.shape:
        return
    if array.ndim != len(spec.shape):
        advice = "; array[None] adds a batch axis of one" if array.ndim == len(spec.shape) - 1 else ""
        raise ValueError(
            f"input {spec.name!r} must have {len(spec.shape)} axes {format_shape(spec)}, "
            f"got shape {array.shape}{advice}"
        )
    for axis, (size, wanted_size) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if wanted_size is not None and size != wanted_size:
            raise ValueError(
                f"axis {axis} of input {spec.name!r} must be {wanted_size} {format_shape(spec)}, "
                f"got {size} (shape {array.shape})"
            )


def format_shape(spec: TensorSpec) -> str:
    """Return a shape as the model declares it, like ``(batch, 3, ?, ?)``."""
    names = spec.axis_names or (None,) * len(spec.shape)
    axes = [str(size) if size is not None else name or "?" for size, name in zip(spec.shape, names, strict=True)]
    return f"({', '.join(axes)})"


def make_examples(
    inputs: Sequence[TensorSpec],
    batch_size: int,
    *,
    dynamic_batch: bool,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return random inputs of the right dtypes and shapes: floats in [0, 1), integers 0 or 1, short strings.

    See `sponge.ElasticSession.example_inputs` for the parameters and errors.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if not dynamic_batch and batch_size != 1:
        raise ValueError(f"batch_size must be 1, got {batch_size}: the model's batch axis is not free")
    shapes = shapes or {}
    if unknown := [name for name in shapes if name not in {spec.name for spec in inputs}]:
        raise ValueError(f"shapes names {unknown[0]!r}; the model's inputs are {[spec.name for spec in inputs]}")
    rng = np.random.default_rng(seed)
    return {
        spec.name: _example(spec.dtype, _example_shape(spec, batch_size, shapes.get(spec.name)), rng) for spec in inputs
    }


def _example_shape(spec: TensorSpec, batch_size: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if not spec.shape:
        return tuple(given or ())
    rank = len(spec.shape)
    sizes: list[int | None] = [None] * rank if given is None else list(given)
    if len(sizes) == rank - 1:
        sizes.insert(0, None)
    if len(sizes) != rank:
        raise ValueError(
            f"shapes[{spec.name!r}] must give {rank} axes {format_shape(spec)}, or {rank - 1} without the batch axis, "
            f"got {given!r}"
        )
    if spec.shape[0] is None:
        sizes[0] = batch_size
    shape = []
    for axis, (size, declared) in enumerate(zip(sizes, spec.shape, strict=True)):
        if declared is not None and size not in (None, declared):
            raise ValueError(f"shapes[{spec.name!r}] gives {size} for axis {axis}, which the model fixes at {declared}")
        chosen = size if declared is None else declared
        if chosen is None:
            raise ValueError(
                f"axis {axis} of input {spec.name!r} has no fixed size {format_shape(spec)}: pass the sizes to use, "
                f"{_how_to_pass(spec)}"
            )
        shape.append(chosen)
    return tuple(shape)


def _how_to_pass(spec: TensorSpec) -> str:
    """Return how a shape is given, with a number that may fit in each place that the model leaves open."""
    sizes = ["64" if size is None else str(size) for size in spec.shape]
    if spec.shape[0] is None:
        del sizes[0]
    comma = "," if len(sizes) == 1 else ""
    return (
        f"such as shapes={{{spec.name!r}: ({', '.join(sizes)}{comma})}}; "
        f"on the command line, --shape {spec.name}={','.join(sizes)}"
    )


def _example(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if dtype.kind == "O":
        filled = np.empty(shape, dtype=object)
        filled.fill("text")
        return filled
    if dtype.kind == "f":
        return np.asarray(rng.random(shape)).astype(dtype)
    # Integers are often indices into a table of unknown length: 0 and 1 are the safest guess.
    size = math.prod(shape)
    return rng.integers(0, 2, size=size).reshape(shape).astype(dtype)
