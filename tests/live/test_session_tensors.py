"""Which models can be batched, which requests fit them, and example inputs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sponge import ElasticSession, UnsupportedModel
from sponge.live.tensors import DTYPES, MAX_KNOWN_SHAPES, TensorSpec, find_batch_axis, make_check
from tests.live import models

IMAGE = {"image": (3, 8, 10)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the user's own cache out of the tests."""
    monkeypatch.setenv("SPONGE_CACHE_DIR", str(tmp_path / "cache"))


def elastic(model: bytes) -> ElasticSession:
    return ElasticSession(model, max_threads=1)


NAMES = [
    *("FLOAT", "DOUBLE", "FLOAT16", "BOOL", "STRING"),
    *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_that_numpy_carries_is_served(name):
    """The table of dtypes must agree with what ONNX Runtime really takes and returns."""
    with elastic(models.identity(dtype=getattr(TensorProto, name))) as session:
        inputs = session.example_inputs(3)
        assert inputs["x"].dtype == session.inputs[0].dtype == session.outputs[0].dtype
        assert session.check(inputs) == (3, ((4,),))
        output = session.run(inputs)[0]
        assert output.dtype == inputs["x"].dtype
        np.testing.assert_array_equal(output, inputs["x"])


def test_the_table_of_dtypes_is_covered():
    """The test above must not miss a row of the table."""
    assert len(DTYPES) == len(NAMES)


@pytest.mark.parametrize("name", ["BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_dtypes_that_numpy_lacks_are_refused(name):
    """Such a model loads but cannot be fed from NumPy: that must be told before the first request."""
    kind = getattr(TensorProto, name)
    x, y = (models.tensor(side, kind, ["batch", 2]) for side in "xy")
    graph = helper.make_graph([models.node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    with pytest.raises(UnsupportedModel, match=rf"input 'x' .* tensor\({name.lower()}\); no NumPy array"):
        elastic(model)


def test_sequences_maps_and_optionals_are_refused():
    """They have no rows to join or part; each message names the tensor and says what would help."""
    x, y = (models.tensor(side, models.FLOAT, ["batch", 3]) for side in "xy")
    sequence = helper.make_tensor_sequence_value_info("s", models.FLOAT, None)
    with pytest.raises(
        UnsupportedModel, match=r"output 's' of the model is of type seq\(tensor\(float\)\); only dense"
    ):
        elastic(models.build([models.node("SequenceConstruct", ["x"], ["s"])], [x], [sequence]))
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(models.FLOAT, ["batch", 3]))
    maybe = helper.make_value_info("x", optional)
    with pytest.raises(UnsupportedModel, match=r"input 'x' of the model is of type optional\(tensor\(float\)\)"):
        elastic(models.build([models.node("OptionalGetElement", ["x"], ["y"])], [maybe], [y]))
    ml = helper.make_opsetid("ai.onnx.ml", 3)
    zipmap = models.node("ZipMap", ["x"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    probabilities = helper.make_map_type_proto(models.INT64, helper.make_tensor_type_proto(models.FLOAT, None))
    z = helper.make_value_info("z", helper.make_sequence_type_proto(probabilities))
    with pytest.raises(UnsupportedModel, match=r"output 'z' .* seq\(map\(int64,tensor\(float\)\)\); .*'zipmap': False"):
        elastic(models.build([zipmap], [x], [z], opsets=[ml]))


def test_sparse_tensors_are_refused():
    """ONNX Runtime names their type otherwise than that of dense ones."""

    class Argument:
        name, type, shape = "x", "sparse_tensor(float)", [3, 3]

    with pytest.raises(UnsupportedModel, match=r"input 'x' .* sparse_tensor\(float\); only dense tensors"):
        TensorSpec.of(Argument, role="input")


def test_batch_axis_is_found_in_the_models_own_declaration():
    """The free and the fixed batch axis, with the free axes' names kept for messages."""
    with elastic(models.several()) as session:
        assert session.dynamic_batch
        assert session.fixed_batch_rows is None
        assert [spec.name for spec in session.inputs] == ["image", "scale", "tag"]
        assert session.inputs[0].shape == (None, 3, None, None)
        assert session.inputs[0].axis_names == ("batch", None, "height", "width")
        assert session.inputs[2].dtype == np.int64
        assert [spec.shape for spec in session.outputs] == [(None, 3, None, None), (None,), (None,)]
        assert session.notes == ()
    with elastic(models.fixed_batch(rows=3)) as session:
        assert not session.dynamic_batch
        assert session.fixed_batch_rows == 3
        assert "axis 0 of input 'x' is fixed at 3: requests are run one at a time" in session.notes[0]


def output(shape):
    return models.tensor("y", models.FLOAT, shape)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            models.with_output(output([1, "features"]), models.node("ReduceMean", ["x"], ["y"], axes=[0])),
            "axis 0 of output 'y' is fixed at 1 and does not follow the batch",
        ),
        (
            models.with_output(output(["features", "batch"]), models.node("Transpose", ["x"], ["y"], perm=[1, 0])),
            "axis 0 of output 'y' is 'features', which is not the batch axis",
        ),
        (
            models.build(
                [models.node("Add", ["x", "s"], ["y"])],
                [models.tensor("x", models.FLOAT, ["batch", 2]), models.tensor("s", models.FLOAT, [])],
                [output(["batch", 2])],
            ),
            "input 's' is a scalar or of unknown rank",
        ),
        (
            models.build(
                [models.node("Add", ["x", "s"], ["y"])],
                [models.tensor("x", models.FLOAT, ["batch", 2]), models.tensor("s", models.FLOAT, [1, 2])],
                [output(["batch", 2])],
            ),
            "axis 0 of input 's' is fixed at 1",
        ),
    ],
)
def test_models_whose_rows_cannot_be_parted_are_served_one_by_one(model, reason):
    """Batching them would mix requests: batch size 1, the reason told, and still the bare session's outputs."""
    with elastic(model) as session:
        assert not session.dynamic_batch
        assert session.fixed_batch_rows is None
        assert any(reason in note for note in session.notes)
        shapes = {"x": (4, 2)} if len(session.inputs) == 2 else {"x": (2,)}
        inputs = session.example_inputs(1, shapes={**shapes, "x": (1, 2)})
        assert session.check(inputs)[0] == 1
        np.testing.assert_array_equal(session.run(inputs)[0], ort.InferenceSession(model).run(None, inputs)[0])
        with pytest.raises(ValueError, match="batch_size must be 1, got 2"):
            session.example_inputs(2)


def test_models_without_inputs_are_served_one_by_one():
    """There is nothing to join; it must not crash the search for the batch axis."""
    value = helper.make_tensor("v", models.FLOAT, [2], [1.0, 2.0])
    with elastic(models.build([models.node("Constant", [], ["y"], value=value)], [], [output([2])])) as session:
        assert not session.dynamic_batch
        assert session.check({}) == (1, ())
        np.testing.assert_array_equal(session.run({})[0], [1.0, 2.0])


def test_differing_names_of_the_first_axis_are_noted():
    """Exporters give one axis several names; taken as one batch axis, but the user should know."""
    specs = [TensorSpec(n, np.dtype(np.float32), (None, 2), (f"{n}_rows", None)) for n in "ab"]
    axis = find_batch_axis(specs, [])
    assert axis.dynamic
    assert "the inputs name their first axis differently (a_rows, b_rows)" in axis.notes[0]


ROW = np.zeros((1, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({}, ValueError, r"input 'x' is missing; the model's inputs are \['x'\]"),
        ({"x": ROW, "z": ROW}, ValueError, r"the model has no input 'z'; its inputs are \['x'\]"),
        ({"z": ROW}, ValueError, "input 'x' is missing"),
        ([ROW], TypeError, "inputs must be a mapping from input name to array, got list"),
        (ROW, TypeError, "inputs must be a mapping from input name to array, got ndarray"),
        (None, TypeError, "inputs must be a mapping from input name to array, got NoneType"),
        ({"x": ROW.tolist()}, TypeError, r"input 'x' must be a numpy.ndarray, got list: \[\[0.0"),
        ({"x": np.float32(1)}, TypeError, r"input 'x' must be a numpy.ndarray, got float32"),
        (
            {"x": ROW.astype(np.float64)},
            TypeError,
            r"input 'x' must be of dtype float32, got float64; .*array.astype\('float32'\)",
        ),
        ({"x": ROW.astype(">f4")}, TypeError, "input 'x' must be of dtype float32, got >f4"),
        ({"x": ROW[0]}, ValueError, r"input 'x' must have 2 axes \(batch, 4\), got shape \(4,\); array\[None\] adds"),
        ({"x": ROW[None]}, ValueError, r"input 'x' must have 2 axes \(batch, 4\), got shape \(1, 1, 4\)$"),
        ({"x": ROW[:, :3]}, ValueError, r"axis 1 of input 'x' must be 4 \(batch, 4\), got 3 \(shape \(1, 3\)\)"),
        ({"x": ROW[:0]}, ValueError, r"input 'x' has no rows \(shape \(0, 4\)\)"),
    ],
)
def test_requests_that_do_not_fit_are_refused(request_, error, message):
    """One bad request must be told what is wrong with it, before it can spoil a batch; every time it comes."""
    with elastic(models.identity()) as session:
        for _ in range(2):
            with pytest.raises(error, match=message):
                session.check(request_)
            assert session.check({"x": ROW}) == (1, ((4,),))


def test_requests_of_several_inputs_are_checked_together():
    """All inputs need the same rows; the group key holds the shapes in the model's order."""
    with elastic(models.several()) as session:
        good = session.example_inputs(2, shapes=IMAGE)
        for _ in range(2):
            assert session.check(good) == (2, ((3, 8, 10), (1,), ()))
            assert session.check(dict(reversed(good.items()))) == (2, ((3, 8, 10), (1,), ()))
            with pytest.raises(ValueError, match=r"input 'tag' has 1 rows \(shape \(1,\)\), but input 'image' has 2"):
                session.check({**good, "tag": good["tag"][:1]})
            with pytest.raises(TypeError, match="input 'tag' must be of dtype int64, got int32"):
                session.check({**good, "tag": good["tag"].astype(np.int32)})
            with pytest.raises(ValueError, match="input 'scale' is missing"):
                session.check({name: array for name, array in good.items() if name != "scale"})
            with pytest.raises(ValueError, match="the model has no input 'more'"):
                session.check({**good, "more": good["tag"]})
            with pytest.raises(ValueError, match=r"axis 1 of input 'image' must be 3 \(batch, 3, height, width\)"):
                session.check({**good, "image": good["image"][:, :2]})
        other = session.example_inputs(1, shapes={"image": (3, 8, 11)})
        assert session.check(other)[1] != session.check(good)[1]


def test_strings_must_come_as_objects():
    """NumPy's fixed-width strings would not survive being copied into a batch of another width."""
    with elastic(models.strings()) as session:
        assert session.check({"x": np.array([["a", "bc"]], dtype=object)}) == (1, ((2,),))
        with pytest.raises(TypeError, match="input 'x' must be of dtype object, holding str, got <U2"):
            session.check({"x": np.array([["a", "bc"]])})


def test_a_request_for_a_fixed_batch_axis_is_one_row():
    """The solver counts in requests there: batch size 1 is the whole axis."""
    with elastic(models.fixed_batch(rows=3)) as session:
        inputs = session.example_inputs(1)
        assert inputs["x"].shape == (3, 4)
        assert session.check(inputs) == (1, ((3, 4),))
        with pytest.raises(ValueError, match="axis 0 of input 'x' must be 3"):
            session.check({"x": inputs["x"][:1]})


def test_memory_of_known_shapes_is_bounded():
    """A service whose every request has another shape must not grow, and must still be answered rightly."""
    spec = TensorSpec("x", np.dtype(np.float32), (None, None))
    check = make_check([spec], dynamic_batch=True)
    for width in range(1, MAX_KNOWN_SHAPES + 50):
        assert check({"x": np.zeros((2, width), dtype=np.float32)}) == (2, ((width,),))
    known = next(cell.cell_contents for cell in check.__closure__ if isinstance(cell.cell_contents, dict))
    assert len(known) == MAX_KNOWN_SHAPES


def test_example_inputs_repeat_with_their_seed():
    """A profile must be measured on the same inputs on every machine."""
    with elastic(models.several()) as session:
        first, again, other = (session.example_inputs(2, shapes=IMAGE, seed=seed) for seed in (1, 1, 2))
        assert first["image"].shape == (2, 3, 8, 10)
        assert first["tag"].shape == (2,)
        assert all(np.array_equal(first[name], again[name]) for name in first)
        assert not np.array_equal(first["image"], other["image"])
        with_batch_axis = session.example_inputs(2, shapes={"image": (1, 3, 8, 10)}, seed=1)
        assert np.array_equal(first["image"], with_batch_axis["image"])


@pytest.mark.parametrize(
    ("batch_size", "shapes", "message"),
    [
        (1, None, r"axis 2 of input 'image' has no fixed size .* shapes=\{'image': \(3, 64, 64\)\}.*image=3,64,64"),
        (1, {"image": (3, 8)}, r"shapes\['image'\] must give 4 axes \(batch, 3, height, width\), or 3 without"),
        (1, {"image": (4, 8, 8)}, r"shapes\['image'\] gives 4 for axis 1, which the model fixes at 3"),
        (1, {"picture": (3, 8, 8)}, r"shapes names 'picture'; the model's inputs are \['image', 'scale', 'tag'\]"),
        (0, IMAGE, "batch_size must be an integer of at least 1, got 0"),
        (1.0, IMAGE, r"batch_size must be an integer of at least 1, got 1\.0"),
    ],
)
def test_example_inputs_say_which_size_is_missing_or_wrong(batch_size, shapes, message):
    """The message must let the user write the right call at once."""
    with elastic(models.several()) as session, pytest.raises(ValueError, match=message):
        session.example_inputs(batch_size, shapes=shapes)
