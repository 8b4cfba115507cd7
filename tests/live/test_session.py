"""ElasticSession on real ONNX Runtime sessions: same outputs, changing threads, lanes, errors, closing."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sponge import ElasticSession, UnsupportedModel
from sponge.live.session import available_cpus
from sponge.live.workers import thread_cpu_s
from tests.live import models


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the user's own cache out of the tests."""
    monkeypatch.setenv("SPONGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def until(fact):
    """Wait for what the kernel does in its own time, like taking an ended thread off its list."""
    for _ in range(1000):
        if fact():
            return True
        time.sleep(0.01)
    return False


IMAGE = {"image": (3, 8, 10)}

MODELS = {
    "identity": (models.identity(), None),
    "strings": (models.strings(), None),
    "fixed batch": (models.fixed_batch(), None),
    "several inputs and outputs": (models.several(), IMAGE),
    "matmul chain": (models.matmul_chain(), None),
    "convolutions": (models.convolutions(), None),
    "recurrent": (models.recurrent(), None),
    "weights in subgraphs": (models.branches(), None),
    "overridable weights": (models.overridable(), None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapping", ["session", "path", "bytes"])
def test_outputs_equal_those_of_the_bare_session(name, wrapping, tmp_path):
    """Saving the optimised model and changing threads must not change an answer by a single bit."""
    model, shapes = MODELS[name]
    bare = ort.InferenceSession(model)
    given = {"session": bare, "path": models.save(model, tmp_path / "model.onnx"), "bytes": model}[wrapping]
    with ElasticSession(given, max_threads=4, max_lanes=2) as elastic:
        for batch_size in [1, 2, 5] if elastic.dynamic_batch else [1]:
            inputs = elastic.example_inputs(batch_size, shapes=shapes, seed=batch_size)
            expected = bare.run(None, inputs)
            for threads in elastic.widths:
                outputs = elastic.run(inputs, threads=threads)
                assert len(outputs) == len(expected)
                for output, wanted in zip(outputs, expected, strict=True):
                    assert output.dtype == wanted.dtype
                    np.testing.assert_array_equal(output, wanted)
        # ONNX Runtime below 1.24 cannot read weights of subgraphs that it has itself moved to a file.
        if name != "weights in subgraphs" or ort.__version__ >= "1.24":
            assert not [note for note in elastic.notes if "copy of the weights" in note]


def test_threads_of_a_run_are_those_set_or_named():
    """The number of workers of the borrowed session is what makes a width: it must be threads - 1."""
    with ElasticSession(models.matmul_chain(2, 64), max_threads=3) as elastic:
        assert elastic.widths == (1, 2, 3)
        assert elastic.threads == 3
        elastic.set_threads(2)
        assert elastic.threads == 2
        assert len(elastic.thread_ids()) == (2 - 1) + (3 - 1)


def test_non_contiguous_inputs_and_other_mappings_are_run_as_they_are():
    """A caller's transposed view or ordered mapping must not need a copy made by hand."""
    with ElasticSession(models.identity(3), max_threads=1) as elastic:
        array = np.arange(6, dtype=np.float32).reshape(3, 2).T
        assert not array.flags.c_contiguous
        assert elastic.check({"x": array}) == (2, ((3,),))
        np.testing.assert_array_equal(elastic.run(OrderedDict(x=array))[0], array)


def test_widths_change_while_other_threads_run():
    """Changing threads between runs must be safe whatever is under way on other sessions."""
    with ElasticSession(models.matmul_chain(3, 128), max_threads=4, max_lanes=4) as elastic:
        cases = [elastic.example_inputs(rows, seed=rows) for rows in (1, 3, 8)]
        expected = [elastic.run(case, threads=1)[0] for case in cases]
        stop = threading.Event()

        def change() -> None:
            for width in itertools.cycle(elastic.widths):
                elastic.set_threads(width)
                if stop.is_set():
                    return

        changer = threading.Thread(target=change)
        changer.start()
        try:

            def hammer(number: int) -> None:
                for step in range(60):
                    which = (number + step) % len(cases)
                    np.testing.assert_allclose(elastic.run(cases[which])[0], expected[which], rtol=1e-5, atol=1e-6)

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(hammer, range(4)))
        finally:
            stop.set()
            changer.join()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_lanes_hammered_by_four_threads_give_right_answers(threads):
    """More callers than sessions of a width must wait for one, not share it or mix up their outputs."""
    with ElasticSession(models.convolutions(8, 2, size=16), max_threads=4, max_lanes=2) as elastic:
        cases = [elastic.example_inputs(1 + i, seed=i) for i in range(4)]
        expected = [elastic.run(case, threads=1)[0] for case in cases]

        def hammer(number: int) -> None:
            for _ in range(50):
                output = elastic.run(cases[number], threads=threads)[0]
                np.testing.assert_allclose(output, expected[number], rtol=1e-5, atol=1e-6)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(hammer, range(4)))


def test_sessions_of_a_width_are_as_many_as_lanes_fit():
    """Each width needs min(max_lanes, max_threads // width) sessions, of width - 1 workers each."""
    with ElasticSession(models.identity(), max_threads=6, max_lanes=3) as elastic:
        wanted = sum((width - 1) * min(3, 6 // width) for width in range(2, 7))
        assert len(elastic.thread_ids()) == wanted


def test_reserve_adds_only_what_is_missing():
    """Reserving again, or fewer lanes, must not build sessions; more lanes must let more runs go on at once."""
    with ElasticSession(models.identity(), max_threads=4) as elastic:
        before = elastic.thread_ids()
        elastic.reserve(1)
        assert elastic.thread_ids() == before
        elastic.reserve(2)
        assert elastic.max_lanes == 2
        assert len(elastic.thread_ids()) == len(before) + 1  # a second session of two threads
        elastic.reserve(1)
        assert elastic.max_lanes == 2
        with pytest.raises(ValueError, match="max_lanes must be an integer of at least 1, got 0"):
            elastic.reserve(0)


def test_as_many_runs_as_lanes_go_on_at_once():
    """A lane must never wait for another's session: two borrowed at once, and the third waits."""
    with ElasticSession(models.identity(), max_threads=4, max_lanes=2) as elastic:
        inputs = elastic.example_inputs(1)
        free = elastic._free[2]
        held = free.get()  # one lane is busy
        assert elastic.run(inputs, threads=2)
        also_held = free.get()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(elastic.run, inputs, threads=2)
            assert elastic.run(inputs, threads=1)  # other widths are not held up
            assert not waiting.done()
            free.put(held)
            np.testing.assert_array_equal(waiting.result()[0], inputs["x"])
        free.put(also_held)


def test_a_failed_run_gives_its_session_back():
    """An input that the model refuses must not cost the service a lane."""
    with ElasticSession(models.matmul_chain(2, 64), max_threads=2) as elastic:
        for _ in range(3):
            with pytest.raises(Exception, match="Got: 63 Expected: 64"):
                elastic.run({"x": np.zeros((1, 63), dtype=np.float32)}, threads=2)
        assert elastic.run(elastic.example_inputs(1), threads=2)[0].shape == (1, 64)


def test_a_missing_input_is_refused_before_the_run():
    """Below its Python wrapper ONNX Runtime notices a missing input only in the kernel that reads it."""
    with ElasticSession(models.several(), max_threads=1) as elastic:
        inputs = elastic.example_inputs(1, shapes=IMAGE)
        del inputs["scale"]
        with pytest.raises(ValueError, match="input 'scale' is missing"):
            elastic.run(inputs)


def test_overridable_weights_may_be_given_with_a_run():
    """They are inputs that need not be there: more arrays than the model needs are not an error of the caller."""
    model = models.overridable(8)
    with ElasticSession(model, max_threads=1) as elastic:
        inputs = {**elastic.example_inputs(2), "w": np.eye(8, dtype=np.float32)}
        np.testing.assert_array_equal(elastic.run(inputs)[0], inputs["x"])
        with pytest.raises(ValueError, match="input 'x' is missing"):
            elastic.run({"w": inputs["w"], "v": inputs["w"]})


def test_a_width_that_was_not_built_is_refused():
    """Serving must never build a session; the caller is told which widths there are."""
    with ElasticSession(models.identity(), max_threads=8, widths=[4, 1, 4]) as elastic:
        assert elastic.widths == (1, 4)
        assert [elastic.width_for(threads) for threads in (1, 3, 4, 8)] == [1, 1, 4, 4]
        for call in (lambda: elastic.set_threads(2), lambda: elastic.run(elastic.example_inputs(1), threads=2)):
            with pytest.raises(ValueError, match=r"threads must be one of the widths \(1, 4\), got 2"):
                call()


def test_widths_thin_out_on_large_machines():
    """A session for each of 64 widths would mean two thousand threads."""
    with ElasticSession(models.identity(), max_threads=22) as elastic:
        assert elastic.widths == (*range(1, 17), 20, 22)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_threads": 0}, "max_threads must be an integer of at least 1, got 0"),
        ({"max_threads": 1.5}, "max_threads must be an integer of at least 1, got 1.5"),
        ({"max_lanes": -1}, "max_lanes must be an integer of at least 1, got -1"),
        ({"max_threads": 2, "widths": [1, 3]}, r"widths must be .* from 1 to max_threads \(2\), got \(1, 3\)"),
        ({"widths": []}, r"widths must be .* got \(\)"),
        ({"widths": [0]}, "widths must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """A wrong size must be told where it was given."""
    with pytest.raises(ValueError, match=message):
        ElasticSession(models.identity(), **arguments)


def test_default_max_threads_is_what_this_process_may_use():
    """ONNX Runtime counts the host's CPUs; a pinned process must not get more threads than it can run."""
    with ElasticSession(models.identity()) as elastic:
        assert elastic.max_threads == available_cpus() == len(os.sched_getaffinity(0))


def test_what_is_no_model_is_refused(tmp_path):
    """Each way to get the model wrong has its own message."""
    with pytest.raises(FileNotFoundError, match=r"there is no model file '.*absent\.onnx'"):
        ElasticSession(tmp_path / "absent.onnx")
    with pytest.raises(TypeError, match=r"onnxruntime\.InferenceSession, a path or the bytes of a model, got int"):
        ElasticSession(3)
    with pytest.raises(UnsupportedModel, match=r"cannot load the model in the given bytes: .*protobuf"):
        ElasticSession(b"no model at all")
    with pytest.raises(FileNotFoundError, match=r"custom_op_libraries: there is no file '.*ops\.so'"):
        ElasticSession(models.identity(), custom_op_libraries=[tmp_path / "ops.so"])


def test_a_wrapped_session_whose_file_is_gone_is_refused(tmp_path):
    """The model must be read again for every width; that the file has gone is better said at once."""
    path = models.save(models.identity(), tmp_path / "model.onnx")
    session = ort.InferenceSession(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no model file"):
        ElasticSession(session)


def test_custom_operators_without_their_library_say_what_to_pass():
    """A session does not tell which custom-op libraries it had, so the message must."""
    nodes = [models.node("Mine", ["x"], ["y"], domain="my.domain")]
    x, y = (models.tensor(name, models.FLOAT, ["batch", 2]) for name in "xy")
    model = models.build(nodes, [x], [y], opsets=[onnx.helper.make_opsetid("my.domain", 1)])
    with pytest.raises(UnsupportedModel, match="pass their library as custom_op_libraries"):
        ElasticSession(model)


def test_options_of_a_wrapped_session_are_kept():
    """What ONNX Runtime lets us read must hold in every session, and the user's own options stay as they were."""
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.inter_op_num_threads = 2
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(models.matmul_chain(2, 32), options)
    with ElasticSession(
        session, max_threads=2, spinning=True, config_entries={"session.force_spinning_stop": "1"}
    ) as elastic:
        made = elastic._factory.make(2).get_session_options()
        assert made.intra_op_num_threads == 2
        assert made.execution_mode == ort.ExecutionMode.ORT_PARALLEL
        assert made.inter_op_num_threads == 2
        assert made.log_severity_level == 4
        assert made.get_session_config_entry("session.set_denormal_as_zero") == "1"
        assert made.get_session_config_entry("session.force_spinning_stop") == "1"
        assert made.get_session_config_entry("session.intra_op.allow_spinning") == "1"
        assert any("inter-op threads of each session come on top" in note for note in elastic.notes)
    mine = session.get_session_options()
    assert mine.intra_op_num_threads == 1
    assert mine.optimized_model_filepath == ""
    with pytest.raises(RuntimeError, match="does not have"):
        mine.get_session_config_entry("session.use_env_allocators")


def test_warnings_about_the_model_do_not_come_with_every_session(capfd):
    """A model that ONNX Runtime warns about would fill the log once per width and lane."""
    with ElasticSession(models.overridable(), max_threads=4, max_lanes=2) as elastic:
        elastic.run(elastic.example_inputs(1))
    assert "appears in graph inputs" not in capfd.readouterr().err


def test_options_given_with_a_path_count_like_those_of_a_session():
    """Both ways to say the same must lead to the same sessions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_free_dimension_override_by_name("batch", 5)
    model = models.matmul_chain(2, 32)
    with ElasticSession(model, max_threads=2, sess_options=options, providers=["CPUExecutionProvider"]) as elastic:
        assert elastic.inputs[0].shape == (5, 32)
        assert not elastic.dynamic_batch
        assert elastic.fixed_batch_rows == 5
        assert elastic.run(elastic.example_inputs(1))[0].shape == (5, 32)
    with pytest.raises(ValueError, match="providers must not be given with an InferenceSession"):
        ElasticSession(ort.InferenceSession(model), providers=["CPUExecutionProvider"])


def test_what_cannot_be_kept_is_noted(tmp_path):
    """Profiling, pinning and an own optimised file fit one session only: dropping them silently would be wrong."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.optimized_model_filepath = str(tmp_path / "mine.onnx")
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.add_session_config_entry("session.intra_op_thread_affinities", "1")
    session = ort.InferenceSession(models.identity(), options)
    with ElasticSession(session, max_threads=2) as elastic:
        notes = "\n".join(elastic.notes)
    for what in (
        "enable_profiling",
        "optimized_model_filepath",
        "intra_op_thread_affinities",
        "initializers were added",
    ):
        assert what in notes


def test_workers_are_found_and_end_on_closing():
    """CPU quotas are set for exactly these threads; ids of ended threads would be someone else's one day."""
    before = set(os.listdir("/proc/self/task"))
    elastic = ElasticSession(models.matmul_chain(2, 64), max_threads=3, max_lanes=3)
    ours = {str(number) for number in elastic.thread_ids()}
    assert until(lambda: set(os.listdir("/proc/self/task")) - before == ours)
    assert len(ours) == 2 * 1 + 2, "two sessions of two threads, for lanes of 1.5 cores, and one of three"
    names = {Path(f"/proc/self/task/{number}/comm").read_text() for number in ours}
    assert len(names) == 1
    with ElasticSession(models.identity(), max_threads=2) as other:
        assert not set(other.thread_ids()) & set(elastic.thread_ids())
    elastic.close()
    elastic.close()
    assert elastic.thread_ids() == ()
    assert until(lambda: not ours & set(os.listdir("/proc/self/task")))


def test_closed_session_refuses_to_run_and_lets_waiting_runs_go():
    """Nobody may wait for ever for a session that has gone."""
    elastic = ElasticSession(models.identity(), max_threads=4, max_lanes=2)
    inputs = elastic.example_inputs(1)
    held = elastic._free[2].get()
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(elastic.close)
        elastic._free[2].put(held)
        closing.result()
    for threads in (1, 2, 1, 2):
        with pytest.raises(RuntimeError, match="the ElasticSession is closed"):
            elastic.run(inputs, threads=threads)
    for call in (lambda: elastic.reserve(2), lambda: elastic.warm_up([1])):
        with pytest.raises(RuntimeError, match="the ElasticSession is closed"):
            call()


def test_cpu_time_of_the_workers_is_counted_and_kept():
    """Benchmarks report CPU-seconds used; they must grow with work and survive closing."""
    with ElasticSession(models.matmul_chain(4, 512), max_threads=2) as elastic:
        inputs = elastic.example_inputs(32)
        before = elastic.cpu_s()
        for _ in range(30):
            elastic.run(inputs, threads=2)
        used = elastic.cpu_s()
        assert used > before
    assert elastic.cpu_s() >= used


def test_thread_clock_agrees_with_the_kernels_statistics():
    """The clock's number is put together by hand; the kernel's own figure must be the same for a thread at rest."""
    ready, done = threading.Event(), threading.Event()

    def work() -> None:
        sum(range(100_000))
        ready.set()
        done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    path = f"/proc/self/task/{thread.native_id}/schedstat"

    def statistics_ns() -> int:
        with open(path) as file:
            return int(file.read().split()[0])

    try:
        for _ in range(1000):
            first, clock_s, second = statistics_ns(), thread_cpu_s(thread.native_id), statistics_ns()
            if first == second:
                break
        assert clock_s == pytest.approx(first / 1e9, abs=1e-9)
        assert clock_s > 0
    finally:
        done.set()
        thread.join()


def test_warm_up_runs_every_session_at_every_batch_size():
    """A session that was never run at a size is slow for the first request of that size."""
    with ElasticSession(models.identity(), max_threads=4, max_lanes=2) as elastic:
        seen = []

        def watch(width, number, run):
            def watched(names, inputs, options):
                seen.append((width, number, len(inputs["x"])))
                return run(names, inputs, options)

            return watched

        sessions = {1: 1, 2: 2, 3: 1, 4: 1}
        for width, count in sessions.items():
            runs = [elastic._free[width].get_nowait() for _ in range(count)]
            assert elastic._free[width].empty()
            for number, run in enumerate(runs):
                elastic._free[width].put(watch(width, number, run))
        elastic.warm_up([1, 6, 1])
        wanted = [(width, n, size) for width, count in sessions.items() for n in range(count) for size in (1, 6)]
        assert sorted(seen) == sorted(wanted)
        assert elastic.run(elastic.example_inputs(2), threads=2)  # what was borrowed has been given back
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
            elastic.warm_up([0])
