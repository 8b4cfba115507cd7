"""What the load benchmarks share: models, an open loop of clients, and a neighbour that takes a part of a core.

Rules, and why they hold:

* Open loop: requests come when they are due, whatever the service does, and deadlines and response times count from the
  scheduled arrival. So a stall of the senders, or of the interpreter that they share with the service, shows as misses
  and does not hide.
* The senders are threads in the service's process, as the handlers of a web service are: what submitting costs is the
  service's cost, and it competes with serving for the interpreter.
* A sender that has fallen behind by more than `MOST_LAG_S` drops the request, as a listener whose backlog is full
  refuses the connection: it counts as missed and is told apart as *unsent*. Queueing it here would measure the sender.
* What is noted of a request goes into arrays that were made, and touched, before the first is sent; nothing that grows
  with the requests is kept besides, so that memory that grows is the service's.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from sponge.commands.detector import INPUT_NAME, SIDE_PX, detector_path, pages
from sponge.errors import DeadlineExceeded, QueueFull
from sponge.workload import poisson

MOST_LAG_S = 0.02
LEAD_S = 0.1
"""From the making of a loop to its time zero [s]."""
PENDING, MET, LATE, DEADLINE, QUEUE_FULL, FAILED, CANCELLED, UNSENT = range(8)
"""What came of a request: still open; answered in time, or late; turned away (`DeadlineExceeded`, `QueueFull`); ended
by an error of the model; cancelled; never sent."""

Inputs = Mapping[str, np.ndarray[Any, Any]]
Submit = Callable[[Inputs, float], "Future[Any]"]
"""Hands in a request with its deadline [s on the monotonic clock]."""
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


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
    assert inputs[0][INPUT_NAME].shape[-1] == SIDE_PX
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


@attrs.frozen(kw_only=True)
class Schedule:
    """When requests are due to be sent, and answered [s from time zero]; arrays of shape ``(n_requests,)``."""

    arrives_s: FloatArray
    deadline_s: FloatArray

    @classmethod
    def of(cls, phases: Sequence[tuple[float, float]], budget_s: float, seed: int) -> Schedule:
        """Poisson arrivals at a rate [1/s] for a time [s], phase after phase; budgets uniform, mean ± half."""
        arrivals, budgets = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
        start_s = 0.0
        parts = []
        for rate_rps, length_s in phases:
            parts.append(start_s + poisson(rate_rps, length_s, arrivals))
            start_s += length_s
        arrives_s = np.concatenate(parts)
        return cls(
            arrives_s=arrives_s,
            deadline_s=arrives_s + budget_s * budgets.uniform(0.5, 1.5, len(arrives_s)),
        )


@attrs.frozen(kw_only=True)
class Sent:
    """What came of a schedule; arrays of shape ``(n_requests,)``, instants in [s from time zero], ``nan`` for never."""

    schedule: Schedule
    submitted_s: FloatArray
    """When the client called."""
    returned_s: FloatArray
    """When that call came back."""
    told_s: FloatArray
    """When the outcome was there."""
    fate: np.ndarray[Any, np.dtype[np.uint8]]

    def count(self, fate: int) -> int:
        """Requests that ended so."""
        return int(np.count_nonzero(self.fate == fate))

    @property
    def met(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which were answered in time, from the scheduled arrival."""
        return np.asarray(self.fate == MET)

    @property
    def response_s(self) -> FloatArray:
        """From the scheduled arrival to the answer [s]; ``nan`` where there was none."""
        answered = (self.fate == MET) | (self.fate == LATE)
        return np.where(answered, self.told_s - self.schedule.arrives_s, np.nan)


class OpenLoop:
    """Sends a schedule and notes what comes of it.

    Parameters
    ----------
    schedule
        At least one request.
    inputs
        Taken in turn; or a function of the request's number.
    submit
        Hands in one request.
    senders
        Threads that send, each its share of the requests.
    reads
        Whether the clients look at what comes; if not, they drop their futures at once.
    """

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Inputs] | Callable[[int], Inputs],
        submit: Submit,
        *,
        senders: int = 2,
        reads: bool = True,
    ) -> None:
        self._schedule = schedule
        self._inputs = inputs if callable(inputs) else lambda k: inputs[k % len(inputs)]
        self._submit = submit
        self._reads = reads
        n = len(schedule.arrives_s)
        self._submitted, self._returned, self._told = (array("d", [np.nan]) * n for _ in range(3))
        self._fate = bytearray([PENDING]) * n
        self._arrives = array("d", schedule.arrives_s.tobytes())
        self._deadlines = array("d", schedule.deadline_s.tobytes())
        gc.collect()
        self.zero = time.monotonic() + LEAD_S
        """Time zero on the monotonic clock."""
        self._senders = [
            threading.Thread(target=self._send, args=(first, senders), name=f"sender-{first}", daemon=True)
            for first in range(senders)
        ]
        for sender in self._senders:
            sender.start()

    def wait(self, patience_s: float) -> Sent:
        """Wait until all have been sent, and for the last outcomes, at most so long after the last deadline [s]."""
        for sender in self._senders:
            sender.join()
        last = self.zero + max(self._deadlines) + patience_s
        while self._reads and time.monotonic() < last and self._fate.count(PENDING):
            time.sleep(0.01)
        return Sent(
            schedule=self._schedule,
            submitted_s=np.array(self._submitted),
            returned_s=np.array(self._returned),
            told_s=np.array(self._told),
            fate=np.frombuffer(bytes(self._fate), np.uint8),
        )

    def _send(self, first: int, step: int) -> None:
        zero, clock, submit, reads = self.zero, time.monotonic, self._submit, self._reads
        for k in range(first, len(self._arrives), step):
            due = zero + self._arrives[k]
            now = clock()
            if now < due:
                time.sleep(due - now)
                now = clock()
            elif now > due + MOST_LAG_S:
                self._fate[k] = UNSENT
                continue
            future = submit(self._inputs(k), zero + self._deadlines[k])
            self._submitted[k] = now - zero
            self._returned[k] = clock() - zero
            if reads:
                future.add_done_callback(partial(self._note, k))

    def _note(self, k: int, future: Future[Any]) -> None:
        now = self._told[k] = time.monotonic() - self.zero
        if future.cancelled():
            self._fate[k] = CANCELLED
            return
        error = future.exception()
        if error is None:
            self._fate[k] = MET if now <= self._deadlines[k] else LATE
        else:
            self._fate[k] = _FATES.get(type(error), FAILED)


_FATES: dict[type[BaseException], int] = {
    DeadlineExceeded: DEADLINE,
    QueueFull: QUEUE_FULL,
    CancelledError: CANCELLED,
}


class Memory:
    """Resident memory of this process over time, from a thread of its own; a context manager."""

    def __init__(self, every_s: float = 0.25) -> None:
        self._every_s = every_s
        self._end = threading.Event()
        self._samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def samples(self, zero: float) -> list[tuple[float, float]]:
        """Instants from *zero* on [s], and megabytes."""
        return [(at - zero, megabytes) for at, megabytes in self._samples]

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self._samples.append((time.monotonic(), resident_mb()))


def resident_mb() -> float:
    """Resident memory of this process [MB]."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


_SPIN = """
import sys, time
busy_s, start, end = float(sys.argv[1]) * 0.01, float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start - time.monotonic()))
while (now := time.monotonic()) < end:
    while time.monotonic() < now + busy_s:
        pass
    time.sleep(max(0.0, now + 0.01 - time.monotonic()))
"""


class Neighbour:
    """Another process that computes for a share of each 10 ms, between two instants or until it is ended.

    Parameters
    ----------
    cores
        Share of one core that it takes if it gets it, in (0, 1].
    first, last
        From when, and until when [s on the monotonic clock, which all processes of a machine share].
    """

    def __init__(self, cores: float, first: float, last: float) -> None:
        self._process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN, str(cores), str(first), str(last)])

    @property
    def ended(self) -> bool:
        """Whether its time is up."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End it, if it has not ended, and wait for that."""
        self._process.terminate()
        self._process.wait()


def say(text: str) -> None:
    """Tell how far it has come, on standard error."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
