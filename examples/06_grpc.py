"""Serve a model by gRPC to clients of Triton or KServe, whose deadlines are honoured.

Covers: `add_inference_service` of `sponge.integrations.oip.service`; gRPC deadlines; the parameter ``timeout``.
Scenario: clients that speak the Open Inference Protocol are there already, and stay as they are. What they pass as
``client_timeout`` is gRPC's deadline, and with that the scheduler's. One asks for its answer within a millisecond: no
model could do that, and it is told so at once.

Needs: pip install "sponge-serving[demo,grpc]" "tritonclient[grpc]"
"""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import sponge
from sponge.commands.detector import detector_path, pages
from sponge.integrations.oip.service import SERVER_OPTIONS, add_inference_service

SEED = 7
TIMEOUTS_S = (10.0, 20.0, 30.0)


def main() -> None:
    with sponge.wrap(detector_path(), shapes={"x": (3, 320, 320)}, max_cores=1, profile_budget_s=5.0) as scheduler:
        # Waiting requests hold no thread: two are enough for any number of them.
        server = grpc.server(ThreadPoolExecutor(2), options=SERVER_OPTIONS)
        add_inference_service(server, {"detector": scheduler})
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ask(port)
        server.stop(grace=5.0).wait()


def ask(port: int) -> None:
    """Be the clients, with the package that they use."""
    images = pages(len(TIMEOUTS_S) + 1, np.random.default_rng(SEED))
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        (declared,) = client.get_model_metadata("detector").inputs
        print(f"input {declared.name!r}: {declared.datatype} {list(declared.shape)}")
        for image, timeout_s in zip(images[:-1], TIMEOUTS_S, strict=True):
            (probability,) = infer(client, image, client_timeout=timeout_s)
            print(f"{timeout_s:g} s: text on {float((probability > 0.3).mean()):.0%} of the page")
        try:
            infer(client, images[-1], timeout=1_000)  # microseconds: the protocol's own word for it
        except InferenceServerException as error:
            print(f"0.001 s: {error.status()}")


def infer(client: triton.InferenceServerClient, image: np.ndarray, **arguments: float) -> list[np.ndarray]:
    """Send one page."""
    x = triton.InferInput("x", list(image.shape), "FP32")
    x.set_data_from_numpy(image)
    result = client.infer("detector", [x], **arguments)
    return [result.as_numpy(output.name) for output in result.get_response().outputs]


if __name__ == "__main__":
    main()
