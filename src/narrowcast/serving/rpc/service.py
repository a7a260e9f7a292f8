"""``inference.GRPCInferenceService`` on the models of a catalogue."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from narrowcast.errors import NarrowcastError
from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.administration import check_administrator, check_load_parameters
from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.hosting import ColdError
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol import documents
from narrowcast.serving.refusals import Refusal, change_refusal, model_refusal
from narrowcast.serving.rpc.streams import answered_in_order
from narrowcast.serving.rpc.tensors import read_message, response_message
from narrowcast.serving.scheduling.queue import Job
from narrowcast.serving.shared_memory import SharedMemory
from narrowcast.serving.watching.calls import WatchedCalls
from narrowcast.serving.watching.records import Observer, RequestRecord

__all__ = ["CODES", "SERVICE", "InferenceService", "retry_metadata"]

#: The service's full name.
SERVICE = "inference.GRPCInferenceService"

_log = logging.getLogger(__name__)
Context = Any  # grpc.aio.ServicerContext, whose type takes parameters that nobody can give
Method = Callable[[Any, Context], Awaitable[Any]]

#: What an HTTP status is called in gRPC.
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class InferenceService:
    """Answers the calls of the service.

    Args:
        catalogue: The models.
        limits: Bounds on tensors.
        shared: Regions of shared memory.
        token: What an administrator must send as the metadata ``authorization: Bearer TOKEN``; None for nobody.
        observers: Are told how requests ended.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        shared: SharedMemory,
        token: str | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.draining = False
        self._catalogue = catalogue
        self._limits = limits
        self._shared = shared
        self._token = token
        self._watched = WatchedCalls(observers) if observers else None

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service as a server takes it."""
        methods = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._shared_status,
            "SystemSharedMemoryRegister": self._shared_register,
            "SystemSharedMemoryUnregister": self._shared_unregister,
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(method),
                request_deserializer=INFERENCE[f"{name}Request"].FromString,
                response_serializer=INFERENCE[f"{name}Response"].SerializeToString,
            )
            for name, method in methods.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=INFERENCE["ModelInferRequest"].FromString,
            response_serializer=INFERENCE["ModelStreamInferResponse"].SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    # inference --------------------------------------------------------------------------------------------------------

    async def _infer(self, request: Any, context: Context) -> Any:
        remaining = context.time_remaining()
        if self._watched is None:
            return await self._run(request, remaining)
        target = f"{SERVICE}/ModelInfer"
        return await self._watched.run(target, request, context, partial(self._run, request, remaining))

    async def _run(self, request: Any, remaining: float | None, record: RequestRecord | None = None) -> Any:
        """Return the response to a ``ModelInferRequest``.

        Args:
            request: The message.
            remaining: Seconds until the call's deadline, or None.
            record: What is remembered of it, where somebody watches.

        Raises:
            Refusal: It gets no result.
        """
        if self.draining:
            raise Refusal(503, "the server is ending; send the request to another", retry_after=1)
        arrived: int | None = None
        try:
            served = self._catalogue.find(request.model_name, request.model_version)
        except ColdError as cold:
            arrived = time.monotonic_ns()  # the wait counts as time in the queue
            served = await self._catalogue.get(request.model_name, str(cold.version))
        scheduler = served.scheduler
        if record is not None:
            record.found(served)
        infer = read_message(request, scheduler.signature, self._limits, self._shared)
        if record is not None:
            record.rows = infer.rows
        timeouts = [seconds for seconds in (infer.timeout, remaining) if seconds is not None]
        timeout = min(timeouts, default=None)
        job = scheduler.submit(infer.inputs, infer.rows, priority=infer.priority, timeout=timeout, arrived=arrived)
        if record is not None:
            record.job = job
        if not job.finished:
            ended: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
            job.done = lambda job: None if ended.done() else ended.set_result(job)
            try:
                await ended
            except asyncio.CancelledError:
                scheduler.cancel(job)
                raise
        if job.outputs is None:
            raise model_refusal(job.error or RuntimeError("the job ended without an answer"))
        return response_message(served.name, served.version, infer, job.outputs, self._shared)

    async def _stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Yield a response to each request of a stream, in order; a request that fails does not end the stream."""
        answers = answered_in_order(requests, lambda request: self._stream_one(request, context))
        async with aclosing(answers):
            async for response in answers:
                yield response

    async def _stream_one(self, request: Any, context: Context) -> Any:
        response = INFERENCE["ModelStreamInferResponse"]
        try:
            if self._watched is None:
                return response(infer_response=await self._run(request, None))
            target = f"{SERVICE}/ModelStreamInfer"
            run = partial(self._run, request, None)
            return response(infer_response=await self._watched.run(target, request, context, run))
        except Refusal as refusal:
            return response(
                error_message=refusal.message, infer_response=INFERENCE["ModelInferResponse"](id=request.id)
            )

    # reading ----------------------------------------------------------------------------------------------------------

    async def _live(self, request: Any, context: Context) -> Any:
        return INFERENCE["ServerLiveResponse"](live=True)

    async def _ready(self, request: Any, context: Context) -> Any:
        return INFERENCE["ServerReadyResponse"](ready=self._catalogue.ready and not self.draining)

    async def _server_metadata(self, request: Any, context: Context) -> Any:
        return ParseDict(documents.server_metadata(), INFERENCE["ServerMetadataResponse"]())

    async def _model_ready(self, request: Any, context: Context) -> Any:
        try:
            ready = self._catalogue.can_answer(request.name, request.version) and not self.draining
        except Refusal:  # as Triton answers of models that it does not know: who waits for one asks again and again
            ready = False
        return INFERENCE["ModelReadyResponse"](ready=ready)

    async def _model_metadata(self, request: Any, context: Context) -> Any:
        served = await self._catalogue.get(request.name, request.version)
        document = documents.model_metadata(served, self._catalogue.versions(served.name))
        return ParseDict(document, INFERENCE["ModelMetadataResponse"]())

    async def _config(self, request: Any, context: Context) -> Any:
        served = await self._catalogue.get(request.name, request.version)
        document = {"config": documents.model_config(served)}
        return ParseDict(document, INFERENCE["ModelConfigResponse"]())

    async def _statistics(self, request: Any, context: Context) -> Any:
        document = documents.model_statistics(self._catalogue.served(request.name, request.version))
        return ParseDict(document, INFERENCE["ModelStatisticsResponse"]())

    async def _index(self, request: Any, context: Context) -> Any:
        document = {"models": documents.index(self._catalogue.index(), ready=request.ready)}
        return ParseDict(document, INFERENCE["RepositoryIndexResponse"]())

    # administration ---------------------------------------------------------------------------------------------------

    def _authorise(self, context: Context) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        check_administrator(self._token, str(given).encode())

    async def _load(self, request: Any, context: Context) -> Any:
        self._authorise(context)
        check_load_parameters(request.parameters)
        await self._catalogue.load(request.model_name)
        return INFERENCE["RepositoryModelLoadResponse"]()

    async def _unload(self, request: Any, context: Context) -> Any:
        self._authorise(context)
        await self._catalogue.unload(request.model_name)
        return INFERENCE["RepositoryModelUnloadResponse"]()

    # shared memory ----------------------------------------------------------------------------------------------------

    async def _shared_status(self, request: Any, context: Context) -> Any:
        regions = {region["name"]: region for region in self._shared.status(request.name)}
        return ParseDict({"regions": regions}, INFERENCE["SystemSharedMemoryStatusResponse"]())

    async def _shared_register(self, request: Any, context: Context) -> Any:
        self._shared.register(request.name, request.key, request.offset, request.byte_size)
        return INFERENCE["SystemSharedMemoryRegisterResponse"]()

    async def _shared_unregister(self, request: Any, context: Context) -> Any:
        self._shared.unregister(request.name)
        return INFERENCE["SystemSharedMemoryUnregisterResponse"]()


def _answering(method: Method) -> Method:
    """Return a method whose refusals become the status of its call."""

    async def answer(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except Refusal as refusal:
            await _abort(context, refusal)
        except NarrowcastError as error:
            await _abort(context, change_refusal(error))
        except Exception as error:
            _log.error("a call failed", exc_info=error)
            await _abort(context, Refusal(500, "the server made a mistake; its log says more"))

    return answer


def retry_metadata(refusal: Refusal) -> tuple[tuple[str, str], ...]:
    """Return the metadata behind a refused call: when the same may succeed, if that is known."""
    if refusal.retry_after is None:
        return ()
    return (("retry-after", str(max(1, math.ceil(refusal.retry_after)))),)


async def _abort(context: Context, refusal: Refusal) -> None:
    trailing = (*context.trailing_metadata(), *retry_metadata(refusal))
    await context.abort(CODES.get(refusal.status, grpc.StatusCode.INTERNAL), refusal.message, trailing)
