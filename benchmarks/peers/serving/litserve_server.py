"""LitServe with one worker: ``python litserve_server.py PORT``."""

import sys

import litserve
import numpy as np


class NoOp(litserve.LitAPI):
    def setup(self, device: str) -> None: ...

    def decode_request(self, request: dict) -> np.ndarray:
        return np.array(request["data"], np.float32)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x

    def encode_response(self, output: np.ndarray) -> dict:
        return {"data": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(NoOp(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="error", generate_client_file=False
    )
