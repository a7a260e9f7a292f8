"""What a Prometheus server reads of a cluster: the families of one server, with the numbers of all replicas together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.deployments import Deployment
from narrowcast.serving.ray.keeper import Keeper
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.exposition import CONTENT_TYPE, Family, Sample, exposition

__all__ = ["ClusterMetrics"]

#: Gauges that the catalogue knows of its own machine alone, as the deployments have them.
_OF_DEPLOYMENTS: dict[str, Callable[[Deployment], int]] = {
    "nv_inference_pending_request_count": lambda deployment: deployment.pending,
    "narrowcast_running_batches": lambda deployment: deployment.running,
    "narrowcast_workers": lambda deployment: deployment.alive,
}
#: The memory of replicas is Ray's to give.
_UNKNOWN = frozenset({"narrowcast_model_memory_bytes"})


class ClusterMetrics:
    """Answers ``GET`` of ``/metrics``; machines and GPUs are among Ray's own metrics.

    Args:
        keeper: Knows the replicas.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def handle(self, request: Request) -> asyncio.Future[Response]:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else.
        """
        if request.target.partition(b"?")[0] != b"/metrics":
            raise Refusal(404, "the metrics are at /metrics")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "only GET is allowed")
        return asyncio.ensure_future(self._read())

    async def _read(self) -> Response:
        await self._keeper.look()
        families = [self._of_cluster(family) for family in metrics.model_families(self._keeper.catalogue)]
        families += metrics.server_families(ready=self._keeper.catalogue.ready)
        return Response(200, (exposition(families).encode(),), CONTENT_TYPE)

    def _of_cluster(self, family: Family) -> Family:
        """Return a family with the numbers of the cluster in place of those of one machine."""
        if family.name in _UNKNOWN:
            return Family(family.name, family.kind, family.help, ())
        value = _OF_DEPLOYMENTS.get(family.name)
        if value is None:
            return family
        samples = [
            Sample({"model": served.name, "version": served.version}, value(deployment))
            for served, deployment in self._keeper.standing()
        ]
        return Family(family.name, family.kind, family.help, samples)
