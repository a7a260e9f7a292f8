"""What operators see of a cluster: the metrics and the page of one server, with the numbers of all replicas together."""

from __future__ import annotations

import asyncio
import time

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.keeper import Keeper
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.api import WatchRoutes, metrics_response, status_response
from narrowcast.serving.watching.status import Place, status

__all__ = ["ClusterMetrics"]


class ClusterMetrics:
    """Answers what a server's port of the metrics answers; machines and GPUs are among Ray's own metrics.

    Args:
        keeper: Knows the replicas.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._place = Place("ray", time.time())
        self._routes = WatchRoutes(
            lambda: asyncio.ensure_future(self._metrics()), lambda: asyncio.ensure_future(self._status())
        )

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else than the metrics, the page and what it shows.
        """
        return self._routes.handle(request)

    async def _metrics(self) -> Response:
        keeper = self._keeper
        await keeper.look()
        families = metrics.model_families(keeper.catalogue, keeper.gauges)
        return metrics_response([*families, *metrics.server_families(ready=keeper.state == "ready")])

    async def _status(self) -> Response:
        keeper = self._keeper
        await keeper.look()
        return status_response(status(keeper.catalogue, keeper.state, time.time(), self._place, keeper.gauges))
