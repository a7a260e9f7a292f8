"""The server as a JSON document: what its page shows, and what programs may read instead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from narrowcast._version import __version__
from narrowcast.serving.catalogue import Catalogue, IndexEntry
from narrowcast.serving.hosting import ServedVersion
from narrowcast.serving.scheduling.statistics import BUCKETS, Statistics
from narrowcast.serving.watching.gpus import Gpu
from narrowcast.serving.watching.host import Host

__all__ = ["status"]

Document = dict[str, Any]


def status(catalogue: Catalogue, state: str, now: float, host: Host, gpus: Sequence[Gpu]) -> Document:
    """Return what the server is and does.

    Counts are those since a version was first loaded, times are in seconds.

    Args:
        catalogue: The models.
        state: How the server is, in a word or two.
        now: Seconds since the epoch.
        host: The machine.
        gpus: Its GPUs.
    """
    served = {(item.name, item.version): item for item in catalogue.served()}
    models: defaultdict[str, list[Document]] = defaultdict(list)
    for entry in catalogue.index():
        models[entry.name].append(_version(entry, served.get((entry.name, entry.version)), catalogue))
    return {
        "narrowcast": __version__,
        "state": state,
        "now": now,
        "placement": catalogue.hosting.placement.value,
        "bounds": BUCKETS,
        "models": [{"name": name, "versions": versions} for name, versions in models.items()],
        "memory": asdict(catalogue.memory),
        "host": asdict(host),
        "gpus": [asdict(gpu) for gpu in gpus],
    }


def _version(entry: IndexEntry, served: ServedVersion | None, catalogue: Catalogue) -> Document:
    """Return one version, loaded or not."""
    document: Document = {"version": entry.version, "state": entry.state, "reason": entry.reason, "loaded": None}
    if served is not None:
        scheduler = served.scheduler
        document["loaded"] = {
            "share": catalogue.traffic(entry.name).get(entry.version, 0.0),
            "workers": scheduler.workers_alive,
            "workers_wanted": served.hosting.workers,
            "memory": served.holding.size,
            "pending": scheduler.pending,
            "queue": scheduler.settings.queue,
            "running": scheduler.running,
            "largest_batch": scheduler.largest_batch,
            "counted": _counted(scheduler.statistics),
        }
    return document


def _counted(statistics: Statistics) -> Document:
    return {
        "succeeded": statistics.success.count,
        "failed": statistics.fail.count - statistics.expired - statistics.cancelled,
        "refused": statistics.rejected | {"expired": statistics.expired},
        "cancelled": statistics.cancelled,
        "rows": statistics.inferences,
        "executions": statistics.executions,
        "padding": statistics.padding,
        "overruns": statistics.overruns,
        "seconds": {
            "total": statistics.success.ns * 1e-9,
            "queue": statistics.queue_ns * 1e-9,
            "input": statistics.input_ns * 1e-9,
            "model": statistics.infer_ns * 1e-9,
            "output": statistics.output_ns * 1e-9,
        },
        "buckets": statistics.buckets,
        "batches": {str(rows): times.count for rows, times in sorted(statistics.batches.items())},
    }
