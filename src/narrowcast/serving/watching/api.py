"""What the port of the metrics answers: the metrics, the page about the server, and what the page shows.

The page is here and not beside the protocol, because who may ask models need not see how the server is, and because this
port is the one that operators keep to themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.exposition import CONTENT_TYPE, exposition
from narrowcast.serving.watching.gpus import Gpu, Gpus
from narrowcast.serving.watching.host import HostMeter
from narrowcast.serving.watching.status import status

__all__ = ["MetricsApi", "ServerState"]

ServerState = Literal["ready", "not ready", "ending"]

_PAGE = Path(__file__).parent / "page"
#: The page looks like the reports; their style comes first.
_STYLES = (Path(__file__).parents[2] / "report" / "style.css", _PAGE / "page.css")
#: Nothing comes from elsewhere, nothing is framed, and no text can become a program.
_HEADERS = (
    (
        b"Content-Security-Policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cache-Control", b"no-cache"),
)


class MetricsApi:
    """Answers ``GET`` of ``/metrics`` (Prometheus), ``/`` (the page) and ``/status`` (what the page shows, as JSON).

    Args:
        catalogue: The models.
        state: How the server is.
    """

    def __init__(self, catalogue: Catalogue, state: Callable[[], ServerState]) -> None:
        self._catalogue = catalogue
        self._state = state
        self._gpus = Gpus.find()
        self._host = HostMeter()
        self._files = {
            b"/": (b"text/html; charset=utf-8", (_PAGE / "page.html").read_bytes()),
            b"/page.css": (b"text/css; charset=utf-8", b"".join(path.read_bytes() for path in _STYLES)),
            b"/page.js": (b"text/javascript; charset=utf-8", (_PAGE / "page.js").read_bytes()),
        }

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
        target = request.target.partition(b"?")[0]
        read = {b"/metrics": self._metrics, b"/status": self._status}.get(target)
        if read is None and target not in self._files:
            raise Refusal(404, "the metrics are at /metrics, a page is at /, and what it shows at /status")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "only GET is allowed")
        if read is None:
            content_type, body = self._files[target]
            return Response(200, (body,), content_type, _HEADERS)
        return read([]) if self._gpus is None else asyncio.ensure_future(_with_gpus(self._gpus, read))

    def _metrics(self, gpus: list[Gpu]) -> Response:
        families = (
            *metrics.model_families(self._catalogue),
            *metrics.memory_families(self._catalogue.memory),
            *metrics.gpu_families(gpus),
            *metrics.host_families(self._host.read()),
            *metrics.server_families(ready=self._state() == "ready"),
        )
        return Response(200, (exposition(families).encode(),), CONTENT_TYPE)

    def _status(self, gpus: list[Gpu]) -> Response:
        response = json_response(status(self._catalogue, self._state(), time.time(), self._host.read(), gpus))
        response.headers = _HEADERS
        return response


async def _with_gpus(gpus: Gpus, answer: Callable[[list[Gpu]], Response]) -> Response:
    """Ask the GPUs in a thread, since the driver takes its time, then answer."""
    return answer(await asyncio.to_thread(gpus.read))
