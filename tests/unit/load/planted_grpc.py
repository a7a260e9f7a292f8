"""A service over gRPC whose answers a test plants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from narrowcast.oip.messages import INFERENCE

__all__ = ["Planted", "serving"]


class Planted:
    """A service whose answers follow each other in turn; the first request only asks whether all is well."""

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode | None] = [None]
        self.seconds = 0.0
        self.requests: list[Any] = []
        self.heads: list[dict[str, Any]] = []

    def infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.heads.append({one.key: one.value for one in context.invocation_metadata()})
        time.sleep(self.seconds)
        code = self.codes[len(self.requests) % len(self.codes)]
        if code is not None:
            context.abort(code, "planted")
        return INFERENCE["ModelInferResponse"](model_name="fake")

    def metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name != "fake":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        found = INFERENCE["ModelMetadataResponse"](name="fake", platform="none")
        found.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
        return found

    def server(self, request: Any, context: grpc.ServicerContext) -> Any:
        return INFERENCE["ServerMetadataResponse"](name="fake server", version="1")

    def index(self, request: Any, context: grpc.ServicerContext) -> Any:
        found = INFERENCE["RepositoryIndexResponse"]()
        found.models.add(name="fake", state="READY")
        return found


@contextmanager
def serving(planted: Planted, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Serve the model ``fake`` on a free port of this machine, and yield its URL."""
    methods = {
        "ModelInfer": planted.infer,
        "ModelMetadata": planted.metadata,
        "ServerMetadata": planted.server,
        "RepositoryIndex": planted.index,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            method,
            request_deserializer=INFERENCE[f"{name}Request"].FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, method in methods.items()
    }
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
        )
        if credentials is None:
            url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        else:
            url = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        yield url
        server.stop(None).wait()
