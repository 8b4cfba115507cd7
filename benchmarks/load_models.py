"""The models that the load benchmarks serve, with inputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from sponge.commands.detector import INPUT_NAME, detector_path, pages

Inputs = Mapping[str, np.ndarray[Any, Any]]


@attrs.frozen(kw_only=True)
class Model:
    """A model to serve, with inputs for it."""

    name: str
    path: Path
    inputs: Sequence[Inputs]
    """One request each, taken in turn."""
    budget_s: float
    """Mean budget of a request: some ten inferences or more [s]."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the inputs' axes."""
        return {name: value.shape for name, value in self.inputs[0].items()}


def detector() -> Model:
    """The text detector of the demo, some 20 ms on one core."""
    inputs = [{INPUT_NAME: page} for page in pages(8, np.random.default_rng(0))]
    return Model(name="detector", path=detector_path(), inputs=inputs, budget_s=0.4)


def trivial(folder: Path) -> Model:
    """A model that does nothing: what is served is the service's own Python."""
    from overhead import trivial_model

    inputs = [{"x": np.zeros((1, 4), dtype=np.float32)}]
    return Model(name="trivial", path=trivial_model(folder), inputs=inputs, budget_s=0.1)


TURNS = 100
"""Turns of `work` in its usual state."""
_TABLE_ROWS = 1000


def work(folder: Path, turns: int = TURNS) -> Model:
    """A model whose work is said by its input: *turns* turns of a convolution, some 0.13 ms each on one core.

    A service cannot see it, neither from shapes nor from types, so that a model that becomes slower or faster is had
    by other requests. The answer to request k is 10 k, so that answers can be told apart; a k beyond the table makes
    the model raise.
    """
    path = folder / "work.onnx"
    if not path.exists():
        path.write_bytes(_work_model())
    inputs = [work_inputs(k, turns) for k in range(64)]
    return Model(name=f"work of {turns} turns", path=path, inputs=inputs, budget_s=max(0.1, 0.003 * turns))


_IMAGE = np.random.default_rng(0).random((1, 1, 32, 32), dtype=np.float32)


def work_inputs(k: int, turns: int, image: np.ndarray[Any, Any] = _IMAGE) -> Inputs:
    """One request for `work`."""
    return {
        "image": image,
        "turns": np.array([turns], dtype=np.int64),
        "k": np.array([k % _TABLE_ROWS], dtype=np.int64),
    }


def work_answer(k: int) -> float:
    """What `work` answers to request *k*."""
    return 10.0 * (k % _TABLE_ROWS)


def broken_inputs(turns: int) -> Inputs:
    """A request that makes `work` raise, for its whole batch."""
    return {**work_inputs(0, turns), "k": np.array([_TABLE_ROWS], dtype=np.int64)}


def _work_model(channels: int = 32, side: int = 32) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    tensor, node = helper.make_tensor_value_info, helper.make_node
    rng = np.random.default_rng(0)

    def kernel(name: str, inputs: int) -> Any:
        # Scaled so that the state neither vanishes nor explodes over the turns: denormal numbers would cost time.
        scale = np.float32((2 / (9 * inputs)) ** 0.5)
        return numpy_helper.from_array(rng.standard_normal((channels, inputs, 3, 3), dtype=np.float32) * scale, name)

    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    state = ["batch", channels, side, side]
    body = helper.make_graph(
        [
            node("Identity", ["going"], ["going_on"]),
            node("Conv", ["state", "kernel"], ["product"], **conv),
            node("Relu", ["product"], ["state_next"]),
        ],
        "body",
        [
            tensor("turn", TensorProto.INT64, []),
            tensor("going", TensorProto.BOOL, []),
            tensor("state", TensorProto.FLOAT, state),
        ],
        [tensor("going_on", TensorProto.BOOL, []), tensor("state_next", TensorProto.FLOAT, state)],
        [kernel("kernel", channels)],
    )
    nodes = [
        node("Gather", ["table", "k"], ["answer"]),
        node("ReduceMax", ["turns"], ["most"], keepdims=0),
        node("Conv", ["image", "first"], ["start"], **conv),
        node("Loop", ["most", "true", "start"], ["end"], body=body),
        node("ReduceMean", ["end"], ["features"], axes=[2, 3], keepdims=0),
    ]
    table = numpy_helper.from_array(10 * np.arange(_TABLE_ROWS, dtype=np.float32), "table")
    true = numpy_helper.from_array(np.array(True), "true")
    inputs = [
        tensor("image", TensorProto.FLOAT, ["batch", 1, side, side]),
        tensor("turns", TensorProto.INT64, ["batch"]),
        tensor("k", TensorProto.INT64, ["batch"]),
    ]
    outputs = [
        tensor("features", TensorProto.FLOAT, ["batch", channels]),
        tensor("answer", TensorProto.FLOAT, ["batch"]),
    ]
    graph = helper.make_graph(nodes, "work", inputs, outputs, [table, true, kernel("first", 1)])
    opsets = [helper.make_opsetid("", 17)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model
