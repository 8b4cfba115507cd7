"""Which operating-system threads belong to a set of sessions, and the CPU time they have used.

A new thread starts with the name, the CPU affinity and the control group of the thread that made it. So sessions are
built on a thread of a name that nothing else in the process bears, and ONNX Runtime's workers are those that have it
too. The kernel gives every thread a CPU clock of its own, which is read without touching a file.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TASKS = "/proc/self/task"

_numbers = itertools.count(1)


class Workers:
    """Builds sessions so that their worker threads can be told from all others of the process."""

    def __init__(self) -> None:
        # The kernel keeps 15 bytes of a name. The number is unique in this process, the only one that is searched.
        self.name = f"sponge-ort-{next(_numbers) % 10_000}"
        self._thread_ids: tuple[int, ...] = ()
        self._ended_s = 0.0

    @property
    def thread_ids(self) -> tuple[int, ...]:
        """Native ids of the workers made so far; empty where the kernel does not list threads."""
        return self._thread_ids

    def build(self, make: Callable[[], T]) -> T:
        """Return ``make()``, run on a fresh thread of the name, and note the threads that it left behind."""
        answers: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            builder = threading.get_native_id()
            try:
                _set_name(builder, self.name)
                answers.append(make())
            except BaseException as error:
                errors.append(error)
            finally:
                self._thread_ids = tuple(t for t in _threads_named(self.name) if t != builder)
                # It may still be listed when the next one looks: joining does not wait for the kernel.
                _set_name(builder, "sponge-built")

        thread = threading.Thread(target=run, name="sponge-session-builder", daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return answers[0]

    def cpu_s(self) -> float:
        """Return the CPU time used by the workers so far [s]; the time of threads that call ``run`` is not in it."""
        return self._ended_s + sum(map(thread_cpu_s, self._thread_ids))

    def forget(self) -> None:
        """Keep the CPU time but not the ids: the threads are about to end, and ids are used again."""
        self._ended_s, self._thread_ids = self.cpu_s(), ()


def thread_cpu_s(thread_id: int) -> float:
    """Return the CPU time of one thread of this process [s], 0 if it has ended.

    The clock's number is made as the kernel makes it for ``pthread_getcpuclockid``: the complement of the thread id,
    then 3 bits that say "one thread, scheduler time" (include/linux/posix-timers.h).
    """
    try:
        return time.clock_gettime((~thread_id << 3) | 6)
    except OSError:
        return 0.0


def _set_name(thread_id: int, name: str) -> None:
    try:
        with open(f"{TASKS}/{thread_id}/comm", "w") as file:
            file.write(name)
    except OSError:  # no /proc here: then no worker can be found either
        pass


def _threads_named(name: str) -> list[int]:
    found = []
    try:
        tasks = os.listdir(TASKS)
    except OSError:
        return []
    for task in tasks:
        try:
            with open(f"{TASKS}/{task}/comm") as file:
                if file.read().rstrip("\n") == name:
                    found.append(int(task))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)
