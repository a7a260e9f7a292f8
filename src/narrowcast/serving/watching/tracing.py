"""Requests as spans of OpenTelemetry: one for each request, and in it one for its wait and one for its batch.

It needs ``narrowcast[trace]``, and nothing imports it unless traces are asked for. Attributes are those of OpenTelemetry's
semantic conventions (HTTP server spans 1.23; RPC spans 1.40) where they have one, else begin with ``narrowcast.``.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache

import grpc
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from narrowcast._version import __version__
from narrowcast.serving.rpc.service import CODES
from narrowcast.serving.watching.records import RequestRecord

__all__ = ["Tracing", "to_collector"]

_PROPAGATOR = TraceContextTextMapPropagator()
#: Names in targets, which a route has placeholders for.
_PLACES = re.compile(r"/(models|versions|region)/(?!stats$)[^/]+")
_PLACEHOLDERS = {"models": "{model_name}", "versions": "{model_version}", "region": "{region_name}"}


class Tracing:
    """An observer that makes spans of requests that have ended.

    It gives a request the identifier of its trace, so observers that are told later know it.

    Args:
        provider: Where spans go; it decides which are kept.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("narrowcast.serving", __version__)

    def ended(self, record: RequestRecord) -> None:
        """Make the spans of a request; probes that succeed, and what could not be read, have none."""
        if record.routine or not record.method:
            return
        epoch = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            _name(record),
            _PROPAGATOR.extract(record.context),
            SpanKind.SERVER,
            _attributes(record),
            start_time=record.begun + epoch,
        )
        context = span.get_span_context()
        if context.is_valid:
            record.trace_id = f"{context.trace_id:032x}"
        if span.is_recording():
            self._parts(span, record, epoch)
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.reason))
        span.end(record.ended + epoch)

    def _parts(self, parent: Span, record: RequestRecord, epoch: int) -> None:
        """Make the spans of a request's wait and of the batch that it was part of."""
        job = record.job
        if job is None:
            return
        inside = set_span_in_context(parent)
        begun = job.arrived + epoch
        ended = begun + record.queue_ns
        self._tracer.start_span("queue", inside, start_time=begun).end(ended)
        if job.begun:
            self._tracer.start_span("compute", inside, start_time=ended).end(ended + record.compute_ns)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def to_collector() -> Tracing:
    """Return tracing that sends spans over OTLP/HTTP from a thread of its own.

    OpenTelemetry's environment variables say where to (``OTEL_EXPORTER_OTLP_ENDPOINT``, by default
    ``http://localhost:4318``), which spans are kept (``OTEL_TRACES_SAMPLER``), and what the service is called
    (``OTEL_SERVICE_NAME``, by default ``narrowcast``).
    """
    ours = Resource.create({"service.name": "narrowcast", "service.version": __version__})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


@lru_cache(1024)
def _route(target: str) -> str:
    """Return a target with placeholders in the places of names, so that spans of all models have the same name."""
    path = target.partition("?")[0]
    return _PLACES.sub(lambda found: f"/{found[1]}/{_PLACEHOLDERS[found[1]]}", path)


def _name(record: RequestRecord) -> str:
    """Return a span's name: one of few, as the conventions ask."""
    if record.protocol == "grpc":
        return record.target
    # A target that means nothing could be anything.
    return record.method if record.status == 404 and not record.model else f"{record.method} {_route(record.target)}"


def _attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {"narrowcast.request.id": record.request_id}
    if record.protocol == "grpc":
        code = grpc.StatusCode.OK if record.status == 200 else CODES.get(record.status, grpc.StatusCode.INTERNAL)
        found |= {"rpc.system.name": "grpc", "rpc.method": record.target, "rpc.response.status_code": code.name}
    else:
        path, _, query = record.target.partition("?")
        found |= {"http.request.method": record.method, "url.scheme": "http", "url.path": path}
        found |= {"http.response.status_code": record.status}
        if query:
            found["url.query"] = query
        if record.model:
            found["http.route"] = _route(record.target)
    if record.status >= 500:
        found["error.type"] = str(record.status)
    known: dict[str, AttributeValue] = {
        "narrowcast.model.name": record.model,
        "narrowcast.model.version": record.version,
        "narrowcast.rows": record.rows,
        "narrowcast.reason": record.reason,
    }
    return found | {name: value for name, value in known.items() if value}
