"""sponge behind an asyncio gRPC server, the Open Inference Protocol's ``ModelInfer``; deadlines are gRPC's own."""

from __future__ import annotations

import asyncio

import grpc.aio
from contender import ONE

import sponge
from sponge.integrations.oip.service import add_inference_service


async def serve(scheduler: sponge.Scheduler) -> None:
    server = grpc.aio.server()
    add_inference_service(server, {"detector": scheduler})
    server.add_insecure_port(f"127.0.0.1:{ONE['port']}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with sponge.wrap(
        ONE["model"],
        max_cores=ONE["cores"],
        max_batch_size=ONE["batch"],
        shapes={"picture": ONE["shape"]},
        cache_dir=ONE["cache"],
    ) as scheduler:
        asyncio.run(serve(scheduler))
