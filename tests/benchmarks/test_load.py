"""The load benchmarks measure what they say: what they make of a run is checked on runs that are known."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sponge import Controller, LatencyModel, Service, Solver, simulate
from sponge.errors import DeadlineExceeded, QueueFull
from sponge.workload import Workload, poisson

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODEL = LatencyModel(gamma_s=0.018, epsilon_s=0.0, delta_s=0.001, eta_s=0.001, interference=0.05)


@pytest.fixture(scope="module", autouse=True)
def _beside_the_benchmarks() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def done(outcome: object) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


def schedule(arrives_s: list[float], budget_s: float = 60.0) -> Any:
    from openloop import Schedule

    return Schedule(arrives_s=np.array(arrives_s), deadline_s=np.array(arrives_s) + budget_s)


class ManualTime:
    """Stands for the module `time` in a loop with one sender: nothing passes but what is slept."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, length_s: float) -> None:
        self.now += length_s


@pytest.fixture
def manual(monkeypatch: pytest.MonkeyPatch) -> ManualTime:
    import openloop

    made = ManualTime()
    monkeypatch.setattr(openloop, "time", made)
    return made


@pytest.mark.usefixtures("manual")
def test_open_loop_tells_what_came_of_each_request() -> None:
    """Answers and refusals by their kind; who does not read is neither waited for nor counted as open."""
    from openloop import DEADLINE, FAILED, LATE, MET, QUEUE_FULL, UNREAD, OpenLoop

    outcomes = [
        done([1]),
        done(DeadlineExceeded(1, 0.0, 0.0)),
        done(QueueFull(2, 1)),
        done(RuntimeError("model")),
        None,
    ]
    waiting = iter(outcomes)
    loop = OpenLoop(schedule([0.0] * 5), [{}], lambda _, __: next(waiting), senders=1)
    sent = loop.wait(patience_s=60.0)
    assert sent.fate.tolist() == [MET, DEADLINE, QUEUE_FULL, FAILED, UNREAD]
    assert sent.times_told.tolist() == [1, 1, 1, 1, 0]
    late = OpenLoop(schedule([0.0], budget_s=-1.0), [{}], lambda _, __: done([1]), senders=1)
    assert late.wait(patience_s=60.0).fate.tolist() == [LATE]


def test_open_loop_does_not_queue_for_a_service_that_blocks_its_senders(manual: ManualTime) -> None:
    """What cannot be sent when it is due is missed and said to be unsent, or the service's stall would hide."""
    from openloop import MET, MOST_LAG_S, UNSENT, OpenLoop

    stalls = iter([3 * MOST_LAG_S, 0.0])

    def submit(_: Any, __: float) -> Future[Any]:
        manual.sleep(next(stalls))
        return done([1])

    loop = OpenLoop(schedule([0.0, 0.0, 0.5]), [{}], submit, senders=1)
    sent = loop.wait(patience_s=60.0)
    assert sent.fate.tolist() == [MET, UNSENT, MET]
    assert sent.response_s[[0, 2]] == pytest.approx([3 * MOST_LAG_S, 0.0])


def test_refusals_count_from_when_the_request_was_hopeless() -> None:
    """At the door from the call, else from the instant at which nothing could save it; told before that, 0."""
    from openloop import DEADLINE, MET, QUEUE_FULL, Sent
    from overload import refusals

    deadline_s = np.array([1.0, 1.0, 0.05, 1.0, 1.0])
    sent = Sent(
        schedule=SimpleNamespace(arrives_s=np.zeros(5), deadline_s=deadline_s),  # type: ignore[arg-type]
        submitted_s=np.array([0.0, 0.5, 0.1, 0.2, 0.0]),
        returned_s=np.zeros(5),
        told_s=np.array([0.904, 0.505, 0.102, 0.3, 0.9]),
        fate=np.array([DEADLINE, QUEUE_FULL, DEADLINE, DEADLINE, MET], dtype=np.uint8),
        times_told=np.ones(5, dtype=np.uint8),
    )
    found = refusals(SimpleNamespace(fastest_s=0.1), sent)  # type: ignore[arg-type]
    assert found["at_the_door"] == 2
    assert found["at_the_door_ms_p50_p99_max"][2] == pytest.approx(5.0)
    assert found["refusal_ms_p50_p99_max"][2] == pytest.approx(5.0)
    assert found["refusal_ms_p50_p99_max"][0] == pytest.approx(3.0)  # of 0, 2, 4 and 5


@pytest.mark.parametrize(("bad_windows", "expected_s"), [(0, 0.0), (3, 0.75), (40, float("inf"))])
def test_recovery_is_the_first_lasting_good_second(bad_windows: int, expected_s: float) -> None:
    """Measured from the end of the surge; a good window in between does not count."""
    from overload import WINDOW_S, recovered_after_s

    edges_s = np.arange(0.0, 20.0 + WINDOW_S / 2, WINDOW_S)
    missed, response_ms = np.zeros(len(edges_s) - 1), np.full(len(edges_s) - 1, 30.0)
    missed[20:40] = 0.9  # the surge, from 5 to 10 s
    missed[40 : 40 + bad_windows] = 0.5
    if bad_windows > 1:
        missed[41] = 0.0
    assert recovered_after_s(edges_s, missed, response_ms, 5.0, 10.0) == expected_s


def test_recovery_waits_for_response_times_too() -> None:
    """A queue that is still worked off misses no deadline where budgets are wide."""
    from overload import WINDOW_S, recovered_after_s

    edges_s = np.arange(0.0, 20.0 + WINDOW_S / 2, WINDOW_S)
    response_ms = np.full(len(edges_s) - 1, 30.0)
    response_ms[20:44] = 300.0
    response_ms[60] = np.nan  # nobody was answered: no evidence
    assert recovered_after_s(edges_s, np.zeros(len(edges_s) - 1), response_ms, 5.0, 10.0) == 1.0


def test_forecast_from_the_measured_batches_is_the_run_itself() -> None:
    """Given what every batch took, the simulator gives back the run it was measured on, to the last miss: so what is
    left unexplained of a live run is not lost in the explanation."""
    from live import Measured, Series

    arrives_s = poisson(60.0, 20.0, np.random.default_rng(0))
    workload = Workload(sent_at_s=arrives_s, arrived_at_s=arrives_s, deadline_s=arrives_s + 0.15)
    solver = Solver(MODEL, max_cores=2, max_batch_size=8, max_lanes=2)
    disturbed = Service(MODEL, noise_cv=0.2, slowdown=lambda now: 1.8 if 5.0 <= now < 9.0 else 1.0)
    run = simulate(workload, Controller(solver), disturbed, seed=1, record=True)
    assert run.log is not None
    outcomes = [SimpleNamespace(submitted_at=at) for at in arrives_s.tolist()]
    measured = Measured.of(list(run.log), SimpleNamespace(outcomes=outcomes), 0.0, MODEL)  # type: ignore[arg-type]
    series = Series(at_s=measured.started_s, factors=measured.service)
    again = simulate(measured.handed_in(workload), Controller(solver), Service(MODEL, slowdown=series), seed=2)
    assert again.finished_at_s == pytest.approx(run.finished_at_s, abs=1e-9, nan_ok=True)
    assert 0 < again.misses == run.misses
    ideal = simulate(workload, Controller(solver), MODEL)
    assert ideal.misses < run.misses / 2
    slow, calm = measured.speed()(7.0), measured.speed()(15.0)
    assert slow > 1.4 * calm


def test_series_holds_the_factor_of_the_nearest_instant() -> None:
    """Before the first and after the last too; of two equally near, the later."""
    from live import Series

    series = Series(at_s=[1.0, 2.0, 4.0], factors=[10.0, 20.0, 40.0])
    assert [series(now) for now in (0.0, 1.4, 1.6, 3.1, 9.0)] == [10.0, 10.0, 20.0, 40.0, 40.0]


def growing(slope_mb_per_min: float, threads: list[int]) -> dict[str, tuple[bool, str]]:
    from soak import flat

    times_s = np.arange(0.0, 600.0, 0.5)
    memory = list(zip(times_s.tolist(), (100 + slope_mb_per_min * times_s / 60).tolist(), strict=True))
    minutes = [{"descriptors": 14, "threads": count} for count in threads]
    return flat(memory, minutes, argparse.Namespace(duration_s=600.0, most_mb_per_min=1.0, most_mb=4.0))


def test_soak_sees_what_grows() -> None:
    """Slowly over the whole time, fast, or by a thread that is left behind."""
    assert all(good for good, _ in growing(0.0, [10, 10]).values())
    assert [name for name, (good, _) in growing(2.0, [10, 10]).items() if not good] == ["memory"]
    assert [name for name, (good, _) in growing(0.9, [10, 10]).items() if not good] == ["memory"]
    assert [name for name, (good, _) in growing(0.0, [10, 11]).items() if not good] == ["threads"]


def test_soak_sees_a_request_that_was_lost_or_told_twice() -> None:
    """What the clients saw is held against what was sent, and the statistics against both."""
    from collections import Counter

    from openloop import MET, PENDING, Sent
    from soak import accounted

    def check(fate: list[int], told: list[int], submitted: int = 3) -> list[str]:
        sent = Sent(
            schedule=schedule([0.0] * 3),
            submitted_s=np.zeros(3),
            returned_s=np.zeros(3),
            told_s=np.zeros(3),
            fate=np.array(fate, dtype=np.uint8),
            times_told=np.array(told, dtype=np.uint8),
        )
        statistics = SimpleNamespace(
            submitted=submitted, met=3, late=0, failed=0, cancelled=0, rejected={}, waiting=0, running=0
        )
        clients = SimpleNamespace(unread=0, extras=0, extra_told=Counter[str](), broken_failed=0)
        scheduler = SimpleNamespace(statistics=lambda: statistics)
        found = accounted(sent, clients, scheduler)  # type: ignore[arg-type]
        return [name for name, (good, _) in found.items() if not good]

    assert check([MET] * 3, [1, 1, 1]) == []
    assert check([MET, MET, PENDING], [1, 1, 0]) == ["each request told once"]
    assert check([MET] * 3, [1, 2, 1]) == ["each request told once"]
    assert check([MET] * 3, [1, 1, 1], submitted=4) == ["statistics account for all"]


def test_work_model_answers_each_request_and_raises_on_the_broken(tmp_path: Path) -> None:
    """On the real runtime: the soak holds answers to their requests by them."""
    import onnxruntime as ort
    from load_models import broken_inputs, work, work_answer, work_inputs

    session = ort.InferenceSession(work(tmp_path, 2).path, providers=["CPUExecutionProvider"])
    requests = [work_inputs(k, turns) for k, turns in ((3, 2), (1001, 1))]
    batch = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
    features, answers = session.run(None, batch)
    assert answers.tolist() == [work_answer(3), work_answer(1001)] == [30.0, 10.0]
    assert np.isfinite(features).all()
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, dict(broken_inputs(2)))
