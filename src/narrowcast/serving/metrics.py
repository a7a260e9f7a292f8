"""What a Prometheus server reads: statistics under the names that Triton's dashboards expect, and a few of our own.

Nothing is counted here: the numbers are read from the statistics when somebody asks, so that requests pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from narrowcast.serving.catalogue import Catalogue, ServedVersion
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.scheduling.statistics import BUCKETS, Statistics

__all__ = ["CONTENT_TYPE", "MetricsApi", "exposition"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class _Metric:
    """One metric of each model version."""

    name: str
    kind: str
    help: str
    value: Callable[[Statistics], float]


_METRICS = (
    _Metric("nv_inference_request_success", "counter", "Requests that succeeded", lambda s: s.success.count),
    _Metric("nv_inference_count", "counter", "Rows of successful requests", lambda s: s.inferences),
    _Metric("nv_inference_exec_count", "counter", "Batches that ran", lambda s: s.executions),
    _Metric(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds from arrival to answer",
        lambda s: (s.success.ns + s.fail.ns) // 1000,
    ),
    _Metric("nv_inference_queue_duration_us", "counter", "Microseconds in the queue", lambda s: s.queue_ns // 1000),
    _Metric(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds of gathering inputs",
        lambda s: s.input_ns // 1000,
    ),
    _Metric(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds of the model",
        lambda s: s.infer_ns // 1000,
    ),
    _Metric(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Microseconds of moving outputs",
        lambda s: s.output_ns // 1000,
    ),
)


def exposition(catalogue: Catalogue) -> str:
    """Return all metrics in Prometheus' text format, version 0.0.4."""
    served = catalogue.served()
    lines: list[str] = []
    for metric in _METRICS:
        lines += _head(metric.name, metric.kind, metric.help)
        lines += [f"{metric.name}{_labels(item)} {metric.value(item.scheduler.statistics):d}" for item in served]
    lines += _head("nv_inference_request_failure", "counter", "Requests that got no result, by reason")
    for item in served:
        for reason, count in _failures(item.scheduler.statistics):
            lines.append(f"nv_inference_request_failure{_labels(item, reason=reason)} {count}")
    lines += _head("nv_inference_pending_request_count", "gauge", "Requests that wait")
    lines += [f"nv_inference_pending_request_count{_labels(item)} {item.scheduler.pending}" for item in served]
    lines += _head("narrowcast_running_batches", "gauge", "Batches that workers run now")
    lines += [f"narrowcast_running_batches{_labels(item)} {item.scheduler.running}" for item in served]
    lines += _head("narrowcast_workers", "gauge", "Workers that are alive")
    lines += [f"narrowcast_workers{_labels(item)} {item.scheduler.workers_alive}" for item in served]
    lines += _histogram(served)
    return "\n".join(lines) + "\n"


def _failures(statistics: Statistics) -> Iterable[tuple[str, int]]:
    """Return requests without a result by reason; Triton's reasons are REJECTED, CANCELED, BACKEND and OTHER."""
    rejected = sum(statistics.rejected.values()) + statistics.expired
    yield "REJECTED", rejected
    yield "CANCELED", statistics.cancelled
    yield "BACKEND", max(0, statistics.fail.count - statistics.expired - statistics.cancelled)


def _histogram(served: list[ServedVersion]) -> list[str]:
    name = "narrowcast_request_duration_seconds"
    lines = _head(name, "histogram", "Time from arrival to answer of successful requests")
    for item in served:
        statistics = item.scheduler.statistics
        bounds = [*map(str, BUCKETS), "+Inf"]
        for bound, count in zip(bounds, accumulate(statistics.buckets), strict=True):
            lines.append(f"{name}_bucket{_labels(item, le=bound)} {count}")
        lines.append(f"{name}_sum{_labels(item)} {statistics.success.ns * 1e-9:.9f}")
        lines.append(f"{name}_count{_labels(item)} {statistics.success.count}")
    return lines


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(served: ServedVersion, **more: str) -> str:
    """Return labels; names of models and versions hold nothing that would need an escape."""
    labels = {"model": served.name, "version": served.version, **more}
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


class MetricsApi:
    """Answers ``GET /metrics``."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def handle(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else.
        """
        if request.target.partition(b"?")[0] != b"/metrics":
            raise Refusal(404, "the metrics are at /metrics")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "only GET is allowed")
        return Response(200, (exposition(self._catalogue).encode(),), CONTENT_TYPE)
