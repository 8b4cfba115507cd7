"""LitServe: FastAPI in front, batches formed in worker processes."""

from typing import Annotated

import litserve
import numpy as np
from contender import ONE, Model, picture
from fastapi import Depends, Request, Response


async def body_of(request: Request) -> bytes:
    return await request.body()


class Detector(litserve.LitAPI):
    def setup(self, device):
        self.model = Model()

    def decode_request(self, request: Annotated[bytes, Depends(body_of)]):
        return picture(request)

    def predict(self, x):
        return self.model.run(x if ONE["batch"] > 1 else x[None])

    def batch(self, inputs):
        return np.stack(inputs)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output) -> Response:
        return Response(content=output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Detector(max_batch_size=ONE["batch"], batch_timeout=ONE["window_ms"] / 1000, api_path="/infer")
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=ONE["workers"], timeout=60, fast_queue=ONE.get("fast_queue", False)
    )
    server.run(host="127.0.0.1", port=ONE["port"], generate_client_file=False, log_level="warning", access_log=False)
