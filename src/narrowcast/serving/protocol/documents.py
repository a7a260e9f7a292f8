"""The protocol's documents about the server and its models: metadata, configuration, statistics, index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from narrowcast._version import __version__
from narrowcast.serving.catalogue import IndexEntry, ServedVersion
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.scheduling.statistics import BatchTimes, Duration
from narrowcast.serving.signature import TensorSpec

__all__ = ["EXTENSIONS", "index", "model_config", "model_metadata", "model_statistics", "server_metadata"]

Document = dict[str, Any]

#: What the server does beyond the protocol's core, and nothing that it does not.
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
)
_PLATFORM = "narrowcast_artifact"


def server_metadata() -> Document:
    """Return name, version and extensions of the server."""
    return {"name": "narrowcast", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(served: ServedVersion, versions: list[str]) -> Document:
    """Return inputs and outputs of a model; shapes include the batch axis where there is one."""
    signature = served.scheduler.signature
    return {
        "name": served.name,
        "versions": versions,
        "platform": _PLATFORM,
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
    }


def _tensor(spec: TensorSpec) -> Document:
    return {"name": spec.name, "datatype": spec.datatype.name, "shape": list(spec.shape)}


def model_config(served: ServedVersion) -> Document:
    """Return how a model is served, in the terms of Triton's configuration; dims leave the batch axis out."""
    scheduler = served.scheduler
    settings = scheduler.settings
    batching = settings.batching
    skip = 1 if scheduler.largest_batch else 0
    document: Document = {
        "name": served.name,
        "platform": _PLATFORM,
        "backend": "narrowcast",
        "version_policy": _policy(served.hosting.policy),
        "max_batch_size": scheduler.largest_batch,
        "input": [_config_tensor(spec, skip) for spec in scheduler.signature.inputs],
        "output": [_config_tensor(spec, skip) for spec in scheduler.signature.outputs],
        "instance_group": [{"name": f"{served.name}_0", "kind": "KIND_CPU", "count": served.hosting.workers}],
    }
    if scheduler.largest_batch > 1:
        document["dynamic_batching"] = {
            "preferred_batch_size": list(batching.preferred),
            "max_queue_delay_microseconds": batching.delay_ns // 1000,
            "priority_levels": settings.priority_levels,
            "default_priority_level": settings.default_priority,
        }
    return document


def _policy(policy: VersionPolicy) -> Document:
    if policy.named:
        return {"specific": {"versions": list(policy.named)}}
    return {"latest": {"num_versions": policy.latest}} if policy.latest else {"all": {}}


def _config_tensor(spec: TensorSpec, skip: int) -> Document:
    return {"name": spec.name, "data_type": spec.datatype.config, "dims": list(spec.shape[skip:])}


def model_statistics(served: Iterable[ServedVersion]) -> Document:
    """Return what happened to the requests of model versions."""
    return {"model_stats": [_statistics(item) for item in served]}


def _statistics(served: ServedVersion) -> Document:
    counted = served.scheduler.statistics
    # The cache counts are required by clients that were written against Triton; this server answers nothing from a cache.
    none = _duration(Duration())
    return {
        "name": served.name,
        "version": served.version,
        "last_inference": counted.last,
        "inference_count": counted.inferences,
        "execution_count": counted.executions,
        "inference_stats": {
            "success": _duration(counted.success),
            "fail": _duration(counted.fail),
            "queue": {"count": counted.success.count, "ns": counted.queue_ns},
            "compute_input": {"count": counted.compute_count, "ns": counted.input_ns},
            "compute_infer": {"count": counted.compute_count, "ns": counted.infer_ns},
            "compute_output": {"count": counted.compute_count, "ns": counted.output_ns},
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [_batch(size, times) for size, times in sorted(counted.batches.items())],
    }


def _duration(duration: Duration) -> Document:
    return {"count": duration.count, "ns": duration.ns}


def _batch(size: int, times: BatchTimes) -> Document:
    return {
        "batch_size": size,
        "compute_input": {"count": times.count, "ns": times.input_ns},
        "compute_infer": {"count": times.count, "ns": times.infer_ns},
        "compute_output": {"count": times.count, "ns": times.output_ns},
    }


def index(entries: Iterable[IndexEntry], *, ready: bool) -> list[Document]:
    """Return the repository's index, or the part of it that can answer requests."""
    return [asdict(entry) for entry in entries if entry.state == "READY" or not ready]
