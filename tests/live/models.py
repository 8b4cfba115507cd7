"""Small ONNX models, made when asked for, that tests run on the real ONNX Runtime.

Every function returns a serialised model; `save` writes one to a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL

tensor = helper.make_tensor_value_info
node = helper.make_node


def build(nodes, inputs, outputs, initializers=(), *, opsets=()) -> bytes:
    """Return the model of these parts, serialised."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid("", OPSET), *opsets]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()


def save(model: bytes, path: Path) -> Path:
    """Write *model* to *path* and return it."""
    path.write_bytes(model)
    return path


def identity(columns: int = 4, *, dtype: int = FLOAT, batch: str | int | None = "batch") -> bytes:
    """``y = x`` for x of shape (batch, columns): the cheapest model there is."""
    return build(
        [node("Identity", ["x"], ["y"])], [tensor("x", dtype, [batch, columns])], [tensor("y", dtype, [batch, columns])]
    )


def fixed_batch(rows: int = 3, columns: int = 4) -> bytes:
    """``y = 2 x`` for x of shape (rows, columns), nothing free."""
    return build(
        [node("Add", ["x", "x"], ["y"])],
        [tensor("x", FLOAT, [rows, columns])],
        [tensor("y", FLOAT, [rows, columns])],
    )


def strings(columns: int = 2) -> bytes:
    """``y = x`` for strings."""
    return identity(columns, dtype=STRING)


def several() -> bytes:
    """Inputs ``image`` (batch, 3, height, width) float, ``scale`` (batch, 1) float and ``tag`` (batch) int64.

    Outputs ``scaled`` (batch, 3, height, width), ``mean`` (batch) and ``tag_plus_one`` (batch) int64.
    """
    one = numpy_helper.from_array(np.array([1], dtype=np.int64), "one")
    axes = numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "axes")
    nodes = [
        node("Unsqueeze", ["scale", "axes"], ["scale_4d"]),
        node("Mul", ["image", "scale_4d"], ["scaled"]),
        node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        node("Add", ["tag", "one"], ["tag_plus_one"]),
    ]
    image = ["batch", 3, "height", "width"]
    inputs = [tensor("image", FLOAT, image), tensor("scale", FLOAT, ["batch", 1]), tensor("tag", INT64, ["batch"])]
    outputs = [
        tensor("scaled", FLOAT, image),
        tensor("mean", FLOAT, ["batch"]),
        tensor("tag_plus_one", INT64, ["batch"]),
    ]
    return build(nodes, inputs, outputs, [one, axes])


def matmul_chain(layers: int = 4, width: int = 512, *, seed: int = 0) -> bytes:
    """``layers`` dense layers with ReLU on (batch, width): ``layers * width**2 * 4`` bytes of weights."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for layer in range(layers):
        matrix = rng.standard_normal((width, width), dtype=np.float32) / np.float32(width) ** 0.5
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(node("MatMul", [last, f"w{layer}"], [f"product{layer}"]))
        last = "y" if layer == layers - 1 else f"x{layer}"
        nodes.append(node("Relu", [f"product{layer}"], [last]))
    return build(nodes, [tensor("x", FLOAT, ["batch", width])], [tensor("y", FLOAT, ["batch", width])], weights)


def convolutions(channels: int = 32, layers: int = 4, *, size: int = 32, seed: int = 0) -> bytes:
    """A chain of 3×3 convolutions on ``image`` (batch, 3, size, size), pooled to ``features`` (batch, channels)."""
    rng = np.random.default_rng(seed)
    nodes, weights, last, depth = [], [], "image", 3
    for layer in range(layers):
        kernel = rng.standard_normal((channels, depth, 3, 3), dtype=np.float32) / np.float32(9 * depth) ** 0.5
        weights.append(numpy_helper.from_array(kernel, f"k{layer}"))
        nodes.append(node("Conv", [last, f"k{layer}"], [f"c{layer}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        nodes.append(node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last, depth = f"r{layer}", channels
    nodes.append(node("ReduceMean", [last], ["features"], axes=[2, 3], keepdims=0))
    inputs = [tensor("image", FLOAT, ["batch", 3, size, size])]
    return build(nodes, inputs, [tensor("features", FLOAT, ["batch", channels])], weights)


def recurrent(features: int = 16, hidden: int = 32, *, seed: int = 0) -> bytes:
    """The last state ``y`` (batch, hidden) of an LSTM over ``x`` (batch, 7, features); its kernel prepacks weights."""
    rng = np.random.default_rng(seed)
    weights = [
        numpy_helper.from_array(rng.standard_normal((1, 4 * hidden, features), dtype=np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((1, 4 * hidden, hidden), dtype=np.float32), "r"),
        numpy_helper.from_array(np.array([0], dtype=np.int64), "axis"),
    ]
    nodes = [
        node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        node("LSTM", ["steps", "w", "r"], ["", "last"], hidden_size=hidden),
        node("Squeeze", ["last", "axis"], ["y"]),
    ]
    inputs = [tensor("x", FLOAT, ["batch", 7, features])]
    return build(nodes, inputs, [tensor("y", FLOAT, ["batch", hidden])], weights)


def branches(width: int = 64, *, seed: int = 0) -> bytes:
    """``y`` = x times one of two matrices, by the sign of the sum of x: weights inside subgraphs."""
    rng = np.random.default_rng(seed)
    sides = []
    for name in ("positive", "negative"):
        matrix = numpy_helper.from_array(rng.standard_normal((width, width), dtype=np.float32), f"{name}_w")
        product = [node("MatMul", ["x", f"{name}_w"], [name])]
        sides.append(helper.make_graph(product, name, [], [tensor(name, FLOAT, ["batch", width])], [matrix]))
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["is_positive"]),
        node("If", ["is_positive"], ["y"], then_branch=sides[0], else_branch=sides[1]),
    ]
    zero = numpy_helper.from_array(np.array(0, dtype=np.float32), "zero")
    x, y = (tensor(name, FLOAT, ["batch", width]) for name in "xy")
    return build(nodes, [x], [y], [zero])


def overridable(width: int = 64, *, seed: int = 0) -> bytes:
    """``y`` = x times w, where w (width, width) has a default and may be given as an input."""
    matrix = np.random.default_rng(seed).standard_normal((width, width), dtype=np.float32)
    inputs = [tensor("x", FLOAT, ["batch", width]), tensor("w", FLOAT, [width, width])]
    outputs = [tensor("y", FLOAT, ["batch", width])]
    return build([node("MatMul", ["x", "w"], ["y"])], inputs, outputs, [numpy_helper.from_array(matrix, "w")])


def with_output(output: onnx.ValueInfoProto, *nodes: onnx.NodeProto) -> bytes:
    """A model of ``x`` (batch, features) with *output*, computed by *nodes*."""
    return build(list(nodes), [tensor("x", FLOAT, ["batch", "features"])], [output])


def lookup(rows: int = 100) -> bytes:
    """``y = table[i]`` for i of shape (batch): raises for the whole batch if one index is out of range."""
    table = numpy_helper.from_array(np.arange(rows, dtype=np.float32) * 10, "table")
    return build(
        [node("Gather", ["table", "i"], ["y"])],
        [tensor("i", INT64, ["batch"])],
        [tensor("y", FLOAT, ["batch"])],
        [table],
    )


def positive_rows() -> bytes:
    """``y`` = the rows of x whose first entry is positive: fewer rows than x, which shows only when it is run."""
    zero = numpy_helper.from_array(np.array(0, dtype=np.float32), "zero")
    first = numpy_helper.from_array(np.array(0, dtype=np.int64), "first")
    nodes = [
        node("Gather", ["x", "first"], ["column"], axis=1),
        node("Greater", ["column", "zero"], ["positive"]),
        node("Compress", ["x", "positive"], ["y"], axis=0),
    ]
    return build(nodes, [tensor("x", FLOAT, ["batch", 4])], [tensor("y", FLOAT, ["kept", 4])], [zero, first])


def loop() -> bytes:
    """``y = x`` after ``rounds`` (one number a row) turns of a loop: takes as long as the input says."""
    body = helper.make_graph(
        [node("Identity", ["going"], ["going_on"]), node("Sin", ["state"], ["state_next"])],
        "body",
        [tensor("turn", INT64, []), tensor("going", BOOL, []), tensor("state", FLOAT, [64, 64])],
        [tensor("going_on", BOOL, []), tensor("state_next", FLOAT, [64, 64])],
    )
    start = numpy_helper.from_array(np.ones((64, 64), dtype=np.float32), "start")
    true = numpy_helper.from_array(np.array(True), "true")
    nodes = [
        node("ReduceMax", ["rounds"], ["most"], keepdims=0),
        node("Loop", ["most", "true", "start"], ["end"], body=body),
        node("ReduceMin", ["end"], ["least"], keepdims=0),
        node("Mul", ["least", "zero"], ["nothing"]),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    zero = numpy_helper.from_array(np.array(0, dtype=np.float32), "zero")
    inputs = [tensor("x", FLOAT, ["batch"]), tensor("rounds", INT64, ["batch"])]
    return build(nodes, inputs, [tensor("y", FLOAT, ["batch"])], [start, true, zero])


def parsed() -> bytes:
    """``y`` = the numbers that the strings x (batch) spell: raises for the whole batch if one spells none."""
    return build(
        [node("Cast", ["x"], ["y"], to=FLOAT)], [tensor("x", STRING, ["batch"])], [tensor("y", FLOAT, ["batch"])]
    )


def expanded() -> bytes:
    """``y = x`` (batch), by way of as many zeros as the largest n (batch) says: raises if memory lacks."""
    zero = numpy_helper.from_array(np.array([0], dtype=np.float32), "zero")
    nodes = [
        node("ReduceMax", ["n"], ["most"], keepdims=1),
        node("Expand", ["zero", "most"], ["zeros"]),
        node("ReduceMax", ["zeros"], ["nothing"], keepdims=0),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    inputs = [tensor("x", FLOAT, ["batch"]), tensor("n", INT64, ["batch"])]
    return build(nodes, inputs, [tensor("y", FLOAT, ["batch"])], [zero])


def reshaped() -> bytes:
    """``y = x`` (batch), by way of one zero in the shape of the largest n (batch): raises unless that is 1."""
    zero = numpy_helper.from_array(np.array([0], dtype=np.float32), "zero")
    nodes = [
        node("ReduceMax", ["n"], ["most"], keepdims=1),
        node("Reshape", ["zero", "most"], ["zeros"]),
        node("ReduceMax", ["zeros"], ["nothing"], keepdims=0),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    inputs = [tensor("x", FLOAT, ["batch"]), tensor("n", INT64, ["batch"])]
    return build(nodes, inputs, [tensor("y", FLOAT, ["batch"])], [zero])


def any_width() -> bytes:
    """``y = x`` for x of shape (batch, width), both free."""
    return with_output(tensor("y", FLOAT, ["batch", "features"]), node("Identity", ["x"], ["y"]))


def detector(size: int = 32) -> bytes:
    """``boxes`` (batch, 2, 4) and ``scores`` (batch, 2) of ``images`` (batch, 3, size, size)."""
    weights = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    return build(
        [
            node("Conv", ["images", "kernel"], ["features"]),
            node("GlobalAveragePool", ["features"], ["pooled"]),
            node("Reshape", ["pooled", "shape"], ["boxes"]),
            node("ReduceMax", ["boxes"], ["scores"], axes=[2], keepdims=0),
        ],
        [tensor("images", FLOAT, ["batch", 3, size, size])],
        [tensor("boxes", FLOAT, ["batch", 2, 4]), tensor("scores", FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weights, "kernel"), numpy_helper.from_array(np.array([0, 2, 4]), "shape")],
    )


def gather(rows: int = 100) -> bytes:
    """``y = table[i]`` for i of shape (batch, width): raises for the whole batch if one index is out of range."""
    table = numpy_helper.from_array(np.arange(rows, dtype=np.float32) * 10, "table")
    return build(
        [node("Gather", ["table", "i"], ["y"])],
        [tensor("i", INT64, ["batch", "width"])],
        [tensor("y", FLOAT, ["batch", "width"])],
        [table],
    )
