"""Triton through nvidia-pytriton: Triton's own front and dynamic batcher, the model in Python processes.

Three set-ups: no queue policy; the time-out that each request brings, rejecting; and three priority classes by it.
"""

import os
import sysconfig

import numpy as np
from contender import ONE, SHAPE, Model
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.common import QueuePolicy, TimeoutAction
from pytriton.triton import Triton, TritonConfig

# Triton embeds Python: it must be this one, whose standard library it will find, not another of the system's.
os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(
    filter(None, [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")])
)
WAIT_US = round(ONE["window_ms"] * 1000)


def batcher():
    if ONE["policy"] == "timeouts":
        policy = QueuePolicy(timeout_action=TimeoutAction.REJECT, allow_timeout_override=True)
        return DynamicBatcher(max_queue_delay_microseconds=WAIT_US, default_queue_policy=policy)
    if ONE["policy"] == "priorities":
        return DynamicBatcher(max_queue_delay_microseconds=WAIT_US, priority_levels=3, default_priority_level=2)
    return DynamicBatcher(max_queue_delay_microseconds=WAIT_US)


def worker():
    held = []

    @batch
    def infer(picture):
        if not held:
            held.append(Model())
        return {"answer": held[0].run(np.ascontiguousarray(picture))}

    return infer


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=ONE["port"],
        allow_grpc=False,
        allow_metrics=False,
        exit_timeout_secs=2,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="detector",
            infer_func=[worker() for _ in range(ONE["workers"])],
            inputs=[Tensor(name="picture", dtype=np.uint8, shape=SHAPE)],
            outputs=[Tensor(name="answer", dtype=np.uint8, shape=tuple(ONE["answer_shape"]))],
            config=ModelConfig(max_batch_size=ONE["batch"], batcher=batcher()),
        )
        triton.serve()
