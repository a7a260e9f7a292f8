"""What a Prometheus server reads: statistics under the names that Triton's dashboards expect, and a few of our own.

Nothing is counted here: the numbers are read from the statistics when somebody asks, so that requests pay nothing for it.
Names, types, labels and units of the families ``nv_*`` are those of Triton Inference Server's metrics; what Triton has and
this server does not know (a response cache, pinned memory) is left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from narrowcast._version import __version__
from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.hosting import ServedVersion
from narrowcast.serving.loader import MemoryUse
from narrowcast.serving.scheduling.statistics import BUCKETS, Statistics
from narrowcast.serving.watching.exposition import Family, Labels, Sample, histogram
from narrowcast.serving.watching.gauges import Gauges
from narrowcast.serving.watching.gpus import Gpu
from narrowcast.serving.watching.host import Host

__all__ = ["gpu_families", "host_families", "memory_families", "model_families", "server_families"]

Source = TypeVar("Source")

#: Why a request is refused before it is queued; each has a line from the start, so that its rate is known at the first.
_CAUSES = ("queue_full", "deadline", "unavailable")
#: Upper ends of the histogram of batch sizes, in rows.
_BATCH_ROWS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class _Metric(Generic[Source]):
    """One number of each source; None where a source has none."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    value: Callable[[Source], float | None]

    def family(self, sources: Sequence[tuple[Labels, Source]]) -> Family:
        """Return the family of all sources."""
        found = [(labels, self.value(source)) for labels, source in sources]
        return Family(
            self.name, self.kind, self.help, [Sample(labels, value) for labels, value in found if value is not None]
        )


# models ---------------------------------------------------------------------------------------------------------------

_OF_STATISTICS: tuple[_Metric[Statistics], ...] = (
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
    _Metric("narrowcast_padding_rows_total", "counter", "Rows that batches were filled up with", lambda s: s.padding),
    _Metric(
        "narrowcast_batch_overruns_total",
        "counter",
        "Batches that were ended for taking too long",
        lambda s: s.overruns,
    ),
)

_OF_VERSIONS: tuple[_Metric[Gauges], ...] = (
    _Metric("nv_inference_pending_request_count", "gauge", "Requests that wait", lambda g: g.pending),
    _Metric("narrowcast_running_batches", "gauge", "Batches that workers run now", lambda g: g.running),
    _Metric("narrowcast_workers", "gauge", "Workers that are alive", lambda g: g.workers),
    _Metric("narrowcast_workers_wanted", "gauge", "Workers that there should be", lambda g: g.workers_wanted),
    _Metric("narrowcast_model_memory_bytes", "gauge", "Memory that the version takes", lambda g: g.memory),
)


def model_families(catalogue: Catalogue, gauges: Callable[[ServedVersion], Gauges] = Gauges.of) -> Iterator[Family]:
    """Yield the families of all model versions that are loaded.

    Args:
        catalogue: The models.
        gauges: Returns how a version stands.
    """
    served = [({"model": item.name, "version": item.version}, item) for item in catalogue.served()]
    counted = [(labels, item.scheduler.statistics) for labels, item in served]
    for metric in _OF_STATISTICS:
        yield metric.family(counted)
    yield Family(
        "nv_inference_request_failure",
        "counter",
        "Requests that got no result, by reason",
        [Sample(labels | {"reason": reason}, count) for labels, s in counted for reason, count in _failures(s)],
    )
    for metric in _OF_VERSIONS:
        yield metric.family([(labels, gauges(item)) for labels, item in served])
    yield Family(
        "narrowcast_traffic_share",
        "gauge",
        "Share of the requests that name no version which this version answers",
        [Sample(labels, catalogue.traffic(item.name).get(item.version, 0.0)) for labels, item in served],
    )
    yield Family(
        "narrowcast_requests_refused_total",
        "counter",
        "Requests that never ran because the server could not take them, by cause",
        [Sample(labels | {"reason": reason}, count) for labels, s in counted for reason, count in _refused(s)],
    )
    yield Family(
        "narrowcast_request_duration_seconds",
        "histogram",
        "Time from arrival to answer of successful requests",
        [sample for labels, s in counted for sample in histogram(labels, BUCKETS, s.buckets, s.success.ns * 1e-9)],
    )
    yield Family(
        "narrowcast_batch_rows",
        "histogram",
        "Rows of the batches that ran",
        [sample for labels, s in counted for sample in _batch_rows(labels, s)],
    )


def _failures(statistics: Statistics) -> Iterator[tuple[str, int]]:
    """Yield requests without a result by Triton's reasons."""
    yield "REJECTED", sum(statistics.rejected.values()) + statistics.expired
    yield "CANCELED", statistics.cancelled
    yield "BACKEND", max(0, statistics.fail.count - statistics.expired - statistics.cancelled)
    yield "OTHER", 0


def _refused(statistics: Statistics) -> Iterator[tuple[str, int]]:
    """Yield requests that never ran by our own reasons."""
    yield from (dict.fromkeys(_CAUSES, 0) | statistics.rejected).items()
    yield "expired", statistics.expired


def _batch_rows(labels: Labels, statistics: Statistics) -> list[Sample]:
    counts = [0] * (len(_BATCH_ROWS) + 1)
    for rows, times in statistics.batches.items():
        counts[bisect_left(_BATCH_ROWS, rows)] += times.count
    return histogram(labels, _BATCH_ROWS, counts, sum(rows * times.count for rows, times in statistics.batches.items()))


# machine --------------------------------------------------------------------------------------------------------------

_OF_HOST: tuple[_Metric[Host], ...] = (
    _Metric("nv_cpu_utilization", "gauge", "Share of the processors that is used, 0 to 1", lambda h: h.utilization),
    _Metric("nv_cpu_memory_total_bytes", "gauge", "Memory of the machine", lambda h: h.memory_total),
    _Metric("nv_cpu_memory_used_bytes", "gauge", "Memory of the machine that is used", lambda h: h.memory_used),
    _Metric(
        "process_cpu_seconds_total",
        "counter",
        "Processor time of the server, its worker processes left out",
        lambda h: h.process_seconds,
    ),
    _Metric(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory of the server, its worker processes left out",
        lambda h: h.process_memory,
    ),
    _Metric("process_start_time_seconds", "gauge", "When the server began, since the epoch", lambda h: h.started),
    _Metric("process_open_fds", "gauge", "Open files and sockets of the server", lambda h: h.descriptors),
)

_OF_GPUS: tuple[_Metric[Gpu], ...] = (
    _Metric(
        "nv_gpu_utilization", "gauge", "Share of the time in which the GPU computes, 0 to 1", lambda g: g.utilization
    ),
    _Metric("nv_gpu_memory_total_bytes", "gauge", "Memory of the GPU", lambda g: g.memory_total),
    _Metric("nv_gpu_memory_used_bytes", "gauge", "Memory of the GPU that is used", lambda g: g.memory_used),
    _Metric("nv_gpu_power_usage", "gauge", "Watts that the GPU takes", lambda g: g.power),
    _Metric("nv_gpu_power_limit", "gauge", "Watts that the GPU may take", lambda g: g.power_limit),
    _Metric(
        "nv_energy_consumption", "counter", "Joules that the GPU has used since the server began", lambda g: g.energy
    ),
)


def host_families(host: Host) -> Iterator[Family]:
    """Yield the families of the machine and the server's process."""
    for metric in _OF_HOST:
        yield metric.family([({}, host)])


def gpu_families(gpus: Sequence[Gpu]) -> Iterator[Family]:
    """Yield the families of GPUs; empty ones where there is no GPU, or none that says a number."""
    for metric in _OF_GPUS:
        yield metric.family([({"gpu_uuid": gpu.uuid}, gpu) for gpu in gpus])


_OF_MEMORY: tuple[_Metric[MemoryUse], ...] = (
    _Metric("narrowcast_memory_used_bytes", "gauge", "Memory that loaded versions take", lambda m: m.used),
    _Metric("narrowcast_memory_budget_bytes", "gauge", "Memory that they may take", lambda m: m.budget),
    _Metric("narrowcast_model_loads_total", "counter", "Versions that were loaded", lambda m: m.loads),
    _Metric(
        "narrowcast_model_evictions_total",
        "counter",
        "Versions that were unloaded so that others fitted",
        lambda m: m.evictions,
    ),
)


def memory_families(memory: MemoryUse) -> Iterator[Family]:
    """Yield the families of the memory that models take; no budget where there is none."""
    for metric in _OF_MEMORY:
        yield metric.family([({}, memory)])


def server_families(*, ready: bool) -> Iterator[Family]:
    """Yield the families of the server as a whole."""
    yield Family("narrowcast_ready", "gauge", "Whether every loaded model can answer", [Sample({}, ready)])
    yield Family("narrowcast_build_info", "gauge", "The version that runs", [Sample({"version": __version__}, 1)])
