"""The client over gRPC, the Open Inference Protocol with raw tensors; what is left is the call's deadline."""

from __future__ import annotations

import asyncio
import json
import os

import grpc
import grpc.aio
from replay import FAILED, NONE, OK, REJECTED, obey, stem_of

from sponge.integrations.oip.messages import message_class

ONE = json.loads(os.environ["RACE_CONTENDER"])
METHOD = "/inference.GRPCInferenceService/ModelInfer"
TURNED_AWAY = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
Asked, Answered = message_class("ModelInferRequest"), message_class("ModelInferResponse")


async def main() -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ONE['port']}") as channel:
        infer = channel.unary_unary(
            METHOD, request_serializer=Asked.SerializeToString, response_deserializer=Answered.FromString
        )

        async def send(body: bytes, left_s: float) -> tuple[str, bytes]:
            asked = Asked(model_name="detector", raw_input_contents=[body])
            asked.inputs.add(name="picture", datatype="UINT8", shape=[1, *ONE["shape"]])
            try:
                answered = await infer(asked, timeout=max(left_s, 0.001))
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return NONE, b""
                return (REJECTED if error.code() in TURNED_AWAY else FAILED), b""
            return OK, answered.raw_output_contents[0]

        await obey(send, stem_of(ONE["model"]))


if __name__ == "__main__":
    asyncio.run(main())
