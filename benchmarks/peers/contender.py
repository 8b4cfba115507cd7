"""What every contender's server shares: its settings, and the same session for all. Imports no more than all have."""

from __future__ import annotations

import json
import os

import numpy as np
import onnxruntime as ort

ONE = json.loads(os.environ["RACE_CONTENDER"])
"""Settings of this contender: paths, port, workers, threads, batch, window."""
SHAPE = tuple(ONE["shape"])


class Model:
    """ONNX Runtime as everybody uses it here: so many threads, no spinning, else as it comes."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = ONE["threads"]
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self._session = ort.InferenceSession(ONE["model"], options, providers=["CPUExecutionProvider"])

    def run(self, pictures: np.ndarray) -> np.ndarray:
        """Run one batch, shape ``(batch, *SHAPE)``."""
        return self._session.run(None, {"picture": pictures})[0]

    def run_bytes(self, bodies: list[bytes]) -> list[bytes]:
        """Run a batch of requests' bodies."""
        return [answer.tobytes() for answer in self.run(np.stack([picture(body) for body in bodies]))]


def picture(body: bytes) -> np.ndarray:
    """Return the body as one picture; ValueError if its size is wrong."""
    return np.frombuffer(body, dtype=np.uint8).reshape(SHAPE)
