"""The queue-timeout batcher of common serving systems."""

from __future__ import annotations

from sponge.core.actions import SetCpu
from sponge.core.events import BatchFinished, Tick
from sponge.sim.baselines import QueueTimeoutBatcher
from tests.sim.scripts import arrived, start, started


def test_batch_leaves_when_it_is_full_or_has_waited() -> None:
    """The window counts from the first arrival, on whichever worker is free; deadlines are not looked at."""
    s = QueueTimeoutBatcher(4.0, max_batch_size=3, window_s=0.25, lanes=2)
    assert s.handle(arrived(0, 1.0, 1.1), now=1.0) == [SetCpu(4.0)]
    assert s.handle(arrived(1, 1.125, 1.0), now=1.125) == []
    assert s.next_wakeup() == 1.25
    assert s.handle(Tick(), now=1.25) == [start(0, 0, 1, cores=2.0)]
    s.handle(arrived(2, 1.3, 9.0), now=1.3)
    s.handle(arrived(3, 1.3, 9.0), now=1.3)
    assert s.handle(arrived(4, 1.3, 9.0), now=1.3) == [start(1, 2, 3, 4, lane=1, cores=2.0)]


def test_window_goes_on_while_all_workers_are_busy() -> None:
    """Whoever has waited long enough meanwhile waits no longer."""
    s = QueueTimeoutBatcher(1.0, max_batch_size=2, window_s=0.5)
    s.handle(arrived(0, 0.0, 9.0), now=0.0)
    s.handle(Tick(), now=0.5)
    s.handle(arrived(1, 0.6, 9.0), now=0.6)
    assert s.next_wakeup() is None
    assert started(s.handle(BatchFinished(0), now=2.0)) == [(1,)]


def test_without_a_window_a_free_worker_takes_what_is_there() -> None:
    """What most of these systems do unless told otherwise."""
    s = QueueTimeoutBatcher(1.0, max_batch_size=8, window_s=0.0)
    assert started(s.handle(arrived(0, 0.0, 9.0), now=0.0)) == [(0,)]
    s.handle(arrived(1, 0.1, 9.0), now=0.1)
    s.handle(arrived(2, 0.2, 9.0), now=0.2)
    assert started(s.handle(BatchFinished(0), now=1.0)) == [(1, 2)]
