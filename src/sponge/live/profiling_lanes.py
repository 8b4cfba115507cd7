"""The threads that a profile is measured on: like a scheduler's lanes, but running the same batch back to back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from sponge.live.session import ElasticSession

Inputs = Mapping[str, "np.ndarray[Any, Any]"]


class _Job:
    """Some runs of one batch on several lanes at once."""

    def __init__(self, inputs: Inputs, threads: int, lanes: int, runs: int) -> None:
        self.inputs = inputs
        self.threads = threads
        self.runs = runs
        self.start = threading.Barrier(lanes)
        self.samples_s: list[float] = []
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._unfinished = lanes
        self.finished = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether some lane has not made its runs yet, so that the others must go on keeping theirs busy."""
        return self._unfinished > 0

    def finish(self, samples_s: list[float], error: BaseException | None) -> None:
        with self._lock:
            self.samples_s += samples_s
            self.error = self.error or error
            self._unfinished -= 1
            if not self._unfinished:
                self.finished.set()


class ProfilingLanes:
    """A few threads that run batches; use as a context manager.

    Parameters
    ----------
    session
        What runs the batches; it must have been reserved for as many lanes.
    count
        How many threads, >= 1.
    """

    def __init__(self, session: ElasticSession, count: int) -> None:
        self._session = session
        self._queues: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"sponge-profile-{k}", daemon=True)
            for k, jobs in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def thread_ids(self) -> tuple[int, ...]:
        """Native ids of the threads."""
        return tuple(thread.native_id for thread in self._threads if thread.native_id is not None)

    def run(self, inputs: Inputs, *, threads: int, lanes: int, runs: int) -> list[float]:
        """Run a batch on several lanes at once, each *runs* times, and return all service times [s].

        A lane that is done first goes on, unrecorded, until the last is done: every recorded run had its neighbours
        busy. What the model raises is raised here.
        """
        job = _Job(inputs, threads, lanes, runs)
        for jobs in self._queues[:lanes]:
            jobs.put(job)
        job.finished.wait()
        if job.error is not None:
            raise job.error
        return job.samples_s

    def _work(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            samples_s: list[float] = []
            error: BaseException | None = None
            job.start.wait()
            try:
                samples_s.extend(self._timed_run(job) for _ in range(job.runs))
            except BaseException as raised:
                error = raised
            job.finish(samples_s, error)
            try:
                while error is None and job.busy:
                    self._timed_run(job)
            except Exception:
                pass  # not recorded; if it matters, a recorded run meets it too
            del job

    def _timed_run(self, job: _Job) -> float:
        started_at = time.perf_counter()
        self._session.run(job.inputs, threads=job.threads)
        return time.perf_counter() - started_at

    def close(self) -> None:
        """End the threads."""
        for jobs in self._queues:
            jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> ProfilingLanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
