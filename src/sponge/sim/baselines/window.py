"""The batcher of most serving systems: a largest batch and a time to wait for it."""

from __future__ import annotations

from sponge.core.latency import Latency
from sponge.sim.baselines.static import StaticController


class QueueTimeoutBatcher(StaticController):
    """Static cores, first come first served; a batch leaves when it is full or its first request has waited enough.

    What these call it, and what they do unless told otherwise:

    ==========  ======================================================  =====================
    Triton      ``max_queue_delay_microseconds`` (dynamic batcher)      0
    Ray Serve   ``batch_wait_timeout_s``, ``max_batch_size`` 10         0.01 s
    LitServe    ``batch_timeout``, ``max_batch_size`` 1                 0
    mosec       ``max_wait_time`` in ms, ``max_batch_size`` 1           0
    ==========  ======================================================  =====================

    The window counts from the arrival of the request that has waited longest, and goes on while all lanes are busy, as
    in Triton; Ray Serve starts it when its batcher takes up the first request, which is later if it was busy.

    Parameters
    ----------
    cores
        Total allocation [cores], > 0.
    max_batch_size
        Rows of a batch at most, ≥ 1.
    window_s
        Time to wait for a full batch [s], ≥ 0; 0 takes whatever is there when a lane is free.
    lanes
        Instances, replicas or workers, ≥ 1, each on ``cores / lanes``.
    latency, max_queue
        As of `StaticController`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    NVIDIA Triton Inference Server, user guide, "Batchers"; Ray Serve, ``serve.batch``; LitServe, "Batching"; mosec,
    ``Server.append_worker``.
    """

    def __init__(
        self,
        cores: float,
        *,
        max_batch_size: int,
        window_s: float = 0.01,
        lanes: int = 1,
        latency: Latency | None = None,
        max_queue: int = 1024,
    ) -> None:
        super().__init__(
            cores,
            order="fifo",
            max_batch_size=max_batch_size,
            window_s=window_s,
            lanes=lanes,
            latency=latency,
            max_queue=max_queue,
        )
