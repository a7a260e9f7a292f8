"""The server as a JSON document: what its page shows, and what programs may read instead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from narrowcast._version import __version__
from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.hosting import ServedVersion
from narrowcast.serving.loader import MemoryUse
from narrowcast.serving.scheduling.statistics import BUCKETS, Statistics
from narrowcast.serving.watching.gauges import Gauges
from narrowcast.serving.watching.gpus import Gpu
from narrowcast.serving.watching.host import Host

__all__ = ["Document", "Place", "status"]

Document = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where models run.

    Attributes:
        placement: ``process``, ``thread``, ``inline``, or ``ray`` for a cluster.
        started: When the server began, in seconds since the epoch.
        memory: What loaded versions take; None where nobody knows.
        host: The machine; None for a cluster.
        gpus: Its GPUs.
    """

    placement: str
    started: float
    memory: MemoryUse | None = None
    host: Host | None = None
    gpus: Sequence[Gpu] = ()


def status(
    catalogue: Catalogue,
    state: str,
    now: float,
    place: Place,
    gauges: Callable[[ServedVersion], Gauges] = Gauges.of,
) -> Document:
    """Return what the server is and does.

    Counts are those since a version was first loaded, times are in seconds.

    Args:
        catalogue: The models.
        state: How the server is, in a word or two.
        now: Seconds since the epoch.
        place: Where models run.
        gauges: Returns how a version stands.
    """
    served = {(item.name, item.version): item for item in catalogue.served()}
    models: defaultdict[str, list[Document]] = defaultdict(list)
    for entry in catalogue.index():
        item = served.get((entry.name, entry.version))
        loaded = None if item is None else _loaded(item, gauges(item), catalogue)
        models[entry.name].append(
            {"version": entry.version, "state": entry.state, "reason": entry.reason, "loaded": loaded}
        )
    return {
        "narrowcast": __version__,
        "state": state,
        "now": now,
        "started": place.started,
        "placement": place.placement,
        "bounds": BUCKETS,
        "models": [{"name": name, "versions": versions} for name, versions in models.items()],
        "memory": None if place.memory is None else asdict(place.memory),
        "host": None if place.host is None else asdict(place.host),
        "gpus": [asdict(gpu) for gpu in place.gpus],
    }


def _loaded(served: ServedVersion, gauges: Gauges, catalogue: Catalogue) -> Document:
    """Return what a loaded version does."""
    scheduler = served.scheduler
    return {
        "share": catalogue.traffic(served.name).get(served.version, 0.0),
        **asdict(gauges),
        "queue": scheduler.settings.queue,
        "largest_batch": scheduler.largest_batch,
        "counted": _counted(scheduler.statistics),
    }


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
