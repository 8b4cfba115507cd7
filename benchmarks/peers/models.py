"""The race's two models, made once: bytes in, bytes out, and one input value that makes the model fail.

Rules, and why they hold:

* Requests and answers are ``uint8``: what a camera's picture is before a model scales it. Scaling is part of the model,
  so that no contender does it in a language of its own.
* A picture whose very first byte is 255 makes the model fail while it runs (an index out of range), as poisonous inputs
  do: what comes in is well formed, and only the model finds out.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, compose, helper, numpy_helper

from sponge.commands.detector import SIDE_PX, detector_path, pages

PICTURES = 8
POISON = 255
SIDE = 64
WIDTH = 1536
FLOAT, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
node, tensor = helper.make_node, helper.make_tensor_value_info


def _constant(name: str, values: Any, dtype: Any) -> Any:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def _guarded(shape: list[int], opset: int, ir_version: int) -> Any:
    """``uint8`` in, ``scaled`` float in [-1, 1] out; fails where the first byte of a row is `POISON`."""
    corner = [0] * len(shape)
    constants = [
        _constant("starts", corner, np.int64),
        _constant("ends", [1] * len(shape), np.int64),
        _constant("axes", range(1, len(shape) + 1), np.int64),
        _constant("guard_table", np.zeros(POISON), np.float32),
        _constant("half_range", 127.5, np.float32),
        _constant("one", 1.0, np.float32),
    ]
    nodes = [
        node("Slice", ["picture", "starts", "ends", "axes"], ["first"]),
        node("Cast", ["first"], ["index"], to=INT64),
        node("Gather", ["guard_table", "index"], ["guard"], axis=0),
        node("Cast", ["picture"], ["as_float"], to=FLOAT),
        node("Div", ["as_float", "half_range"], ["halves"]),
        node("Sub", ["halves", "one"], ["centred"]),
        node("Add", ["centred", "guard"], ["scaled"]),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "guard",
            [tensor("picture", UINT8, ["batch", *shape])],
            [tensor("scaled", FLOAT, ["batch", *shape])],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )


def _to_bytes(rank: int, opset: int, ir_version: int) -> Any:
    """Probabilities to ``uint8``."""
    axes = ["batch", *(f"axis{index}" for index in range(1, rank))]
    graph = helper.make_graph(
        [node("Mul", ["probability", "full"], ["wide"]), node("Cast", ["wide"], ["answer"], to=UINT8)],
        "answer",
        [tensor("probability", FLOAT, axes)],
        [tensor("answer", UINT8, axes)],
        [_constant("full", 255.0, np.float32)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _dense(opset: int, ir_version: int) -> Any:
    """Four dense layers: a small model of which a batch of eight costs little more than one."""
    rng = np.random.default_rng(0)
    sizes = [SIDE * SIDE, WIDTH, WIDTH, SIDE]
    constants = [_constant("flat_shape", [0, -1], np.int64)]
    nodes = [node("Reshape", ["x", "flat_shape"], ["layer0"])]
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        weights = rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)
        constants.append(_constant(f"weights{index}", weights, np.float32))
        nodes.append(node("MatMul", [f"layer{index}", f"weights{index}"], [f"sum{index}"]))
        nodes.append(node("Sigmoid", [f"sum{index}"], [f"layer{index + 1}"]))
    graph = helper.make_graph(
        nodes,
        "dense",
        [tensor("x", FLOAT, ["batch", SIDE, SIDE])],
        [tensor(f"layer{len(sizes) - 1}", FLOAT, ["batch", SIDE])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _whole(core: Any, shape: list[int]) -> Any:
    opset = next(imported.version for imported in core.opset_import if imported.domain == "")
    made = (opset, core.ir_version)
    core = compose.add_prefix(core, "core/")
    guarded = compose.merge_models(_guarded(shape, *made), core, io_map=[("scaled", core.graph.input[0].name)])
    output = core.graph.output[0]
    rank = len(output.type.tensor_type.shape.dim)
    return compose.merge_models(guarded, _to_bytes(rank, *made), io_map=[(output.name, "probability")])


def _pictures(name: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(1)
    if name == "small":
        return rng.integers(0, POISON, (PICTURES, SIDE, SIDE), dtype=np.uint8)
    scaled = np.concatenate(pages(PICTURES, rng))
    return np.clip((scaled + 1) * 127.5, 0, POISON - 1).astype(np.uint8)


def make(folder: Path) -> None:
    """Write ``NAME.onnx``, ``NAME-pictures.npy``, ``NAME-answers.npy`` and ``NAME.json`` for both models.

    Raises
    ------
    ImportError
        If the text detector's package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detector = onnx.load(str(detector_path()))
    for name, core, shape in (
        ("detector", detector, [3, SIDE_PX, SIDE_PX]),
        ("small", _dense(17, 8), [SIDE, SIDE]),
    ):
        path = folder / f"{name}.onnx"
        onnx.save(_whole(core, shape), str(path))
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        pictures = _pictures(name)
        answers = np.concatenate([session.run(None, {"picture": picture[None]})[0] for picture in pictures])
        np.save(folder / f"{name}-pictures.npy", pictures)
        np.save(folder / f"{name}-answers.npy", answers)
        shapes = {"shape": shape, "answer_shape": list(answers.shape[1:])}
        (folder / f"{name}.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
