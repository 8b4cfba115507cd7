"""mosec: a Rust front, batches formed there, Python workers in processes of their own."""

import sys

import numpy as np
from contender import ONE, Model, picture
from mosec import ClientError, Server, Worker


class Detector(Worker):
    def __init__(self):
        self.model = Model()

    def deserialize(self, data):
        try:
            return picture(data)
        except ValueError as error:
            raise ClientError(str(error)) from error

    def serialize(self, data):
        return data.tobytes()

    def forward(self, data):
        if ONE["batch"] == 1:
            return self.model.run(data[None])[0]
        return list(self.model.run(np.stack(data)))


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(ONE["port"]), "--timeout", "60000", "--capacity", "4096"]
    server = Server()
    window_ms = max(1, round(ONE["window_ms"]))
    server.append_worker(
        Detector, num=ONE["workers"], max_batch_size=ONE["batch"], max_wait_time=window_ms, route="/infer"
    )
    server.run()
