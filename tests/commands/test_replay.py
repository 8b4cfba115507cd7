"""The load generator, against the live scheduler and a real session."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sponge.commands.replay import AllocationRecorder, OtherProcesses, replay
from sponge.core.protocol import ControllerProtocol
from sponge.live.scheduler import Scheduler
from sponge.live.session import ElasticSession
from sponge.measure import OutcomeKind, summarise
from sponge.sim.baselines import StaticController
from sponge.workload import Workload
from tests.live import models


@pytest.fixture(scope="module")
def session() -> Iterator[ElasticSession]:
    """Make a session of the cheapest model."""
    with ElasticSession(models.identity(), max_threads=1) as made:
        yield made


def workload(arrived_at_s: list[float], budgets_s: list[float]) -> Workload:
    """Make a workload whose requests were sent as they arrived."""
    return Workload(
        sent_at_s=arrived_at_s,
        arrived_at_s=arrived_at_s,
        deadline_s=np.add(arrived_at_s, budgets_s),
    )


def run(session: ElasticSession, load: Workload, controller: ControllerProtocol, **kwargs: Any) -> Any:
    """Replay under a controller, on one input."""
    recorder = AllocationRecorder()
    with Scheduler(session, controller=controller, recorder=recorder) as scheduler:
        return replay(load, scheduler, recorder, [{"x": np.ones((1, 4), np.float32)}], **kwargs)


def test_every_request_has_an_outcome_on_the_clock_of_the_workload(session: ElasticSession) -> None:
    """Scheduled arrivals and deadlines are kept; answers come after the request was due, never before."""
    load = workload([0.0, 0.01, 0.01, 0.05], [30.0, 30.0, -1.0, 30.0])
    controller = StaticController(1.0, order="edf", max_batch_size=2, drop_late=True)
    run_of_it = run(session, load, controller)
    assert [outcome.arrived_at for outcome in run_of_it.outcomes] == load.arrived_at_s.tolist()
    assert [outcome.deadline for outcome in run_of_it.outcomes] == load.deadline_s.tolist()
    kinds = [outcome.kind for outcome in run_of_it.outcomes]
    assert kinds == [OutcomeKind.FINISHED, OutcomeKind.FINISHED, OutcomeKind.REJECTED, OutcomeKind.FINISHED]
    for outcome in run_of_it.outcomes:
        assert outcome.submitted_at >= outcome.arrived_at
        assert outcome.finished_at is None or outcome.finished_at >= outcome.submitted_at
    assert summarise("static", run_of_it.outcomes, run_of_it.allocation).deadlines_met == 3


def test_late_generator_is_seen(session: ElasticSession) -> None:
    """A client that is held up sends late; the response still counts from the schedule."""
    held = iter([0.2])

    def hold_up(sent: int, answered: int) -> None:
        time.sleep(next(held, 0.0))

    load = workload([0.1, 0.15], [30.0, 30.0])
    run_of_it = run(session, load, StaticController(1.0, order="fifo", max_batch_size=1), progress=hold_up)
    summary = summarise("static", run_of_it.outcomes, run_of_it.allocation)
    assert summary.generator_lateness_s_max >= 0.04
    assert max(outcome.response_s for outcome in run_of_it.outcomes) >= summary.generator_lateness_s_max


def test_failing_model_gives_failed_outcomes(tmp_path: object) -> None:
    """An error is an outcome, not the end of the replay."""
    with ElasticSession(models.identity(), max_threads=1) as broken:
        recorder = AllocationRecorder()
        controller = StaticController(1.0, order="fifo", max_batch_size=1)
        with Scheduler(broken, controller=controller, recorder=recorder) as scheduler:
            broken.close()
            got = replay(workload([0.0], [9.0]), scheduler, recorder, [{"x": np.ones((1, 4), np.float32)}])
    assert [outcome.kind for outcome in got.outcomes] == [OutcomeKind.FAILED]
    assert not got.outcomes[0].met


def test_allocation_is_what_was_in_force_from_the_start_to_the_last_answer(session: ElasticSession) -> None:
    """A static allocation pays for the whole span, whether it is used or not."""
    got = run(session, workload([0.0, 0.3], [9.0, 9.0]), StaticController(3.0, order="fifo", max_batch_size=1))
    assert got.allocation.end_s >= 0.3
    assert got.allocation.core_seconds == pytest.approx(3.0 * got.allocation.end_s)
    assert got.allocation.changes == 0
    assert got.cpu_seconds_used >= 0.0


def test_nothing_to_replay_is_refused(session: ElasticSession) -> None:
    """Waiting for the last of no answers would take for ever."""
    with pytest.raises(ValueError, match="workload"):
        run(session, workload([], []), StaticController(1.0, order="fifo", max_batch_size=1))


def test_other_processes_are_noticed() -> None:
    """A figure measured beside a busy neighbour must not pass for one measured alone."""
    started_at = time.monotonic()
    others = OtherProcesses()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert others.cores() * (time.monotonic() - started_at) >= 0.4
