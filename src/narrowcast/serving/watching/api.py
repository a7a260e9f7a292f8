"""What the port of the metrics answers: the metrics, the page about the server, and what the page shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.exposition import CONTENT_TYPE, Family, exposition
from narrowcast.serving.watching.gpus import Gpu, Gpus
from narrowcast.serving.watching.host import HostMeter

__all__ = ["MetricsApi", "ServerState"]

ServerState = Literal["ready", "not ready", "ending"]


class MetricsApi:
    """Answers ``GET /metrics``.

    Args:
        catalogue: The models.
        state: How the server is.
    """

    def __init__(self, catalogue: Catalogue, state: Callable[[], ServerState]) -> None:
        self._catalogue = catalogue
        self._state = state
        self._gpus = Gpus.find()
        self._host = HostMeter()

    def close(self) -> None:
        """Let go of the GPUs' driver."""
        if self._gpus is not None:
            self._gpus.close()
            self._gpus = None

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else.
        """
        if request.target.partition(b"?")[0] != b"/metrics":
            raise Refusal(404, "the metrics are at /metrics")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "only GET is allowed")
        if self._gpus is None:
            return self._metrics([])
        return asyncio.ensure_future(self._with_gpus(self._gpus, self._metrics))

    async def _with_gpus(self, gpus: Gpus, answer: Callable[[list[Gpu]], Response]) -> Response:
        """Ask the GPUs in a thread, since the driver takes its time, then answer."""
        return answer(await asyncio.to_thread(gpus.read))

    def _metrics(self, gpus: list[Gpu]) -> Response:
        families: list[Family] = [
            *metrics.model_families(self._catalogue),
            *metrics.gpu_families(gpus),
            *metrics.host_families(self._host.read()),
            *metrics.server_families(ready=self._state() == "ready"),
        ]
        return Response(200, (exposition(families).encode(),), CONTENT_TYPE)
