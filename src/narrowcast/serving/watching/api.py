"""What the port of the metrics answers: the metrics, the page about the server, and what the page shows.

The page is here and not beside the protocol, because who may ask models need not see how the server is, and because this
port is the one that operators keep to themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.exposition import CONTENT_TYPE, Family, exposition
from narrowcast.serving.watching.gpus import Gpu, Gpus
from narrowcast.serving.watching.host import HostMeter
from narrowcast.serving.watching.status import Document, Place, status

__all__ = ["MetricsApi", "ServerState", "WatchRoutes", "metrics_response", "status_response"]

ServerState = Literal["ready", "not ready", "ending"]
Answer = Callable[[], Response | asyncio.Future[Response]]

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


class WatchRoutes:
    """Answers ``GET`` of ``/metrics`` (Prometheus), ``/`` (the page) and ``/status`` (what the page shows, as JSON).

    Args:
        metrics: Answers the first.
        status: Answers the last.
    """

    def __init__(self, metrics: Answer, status: Answer) -> None:
        self._answers = {b"/metrics": metrics, b"/status": status}
        self._files = {
            b"/": (b"text/html; charset=utf-8", (_PAGE / "page.html").read_bytes()),
            b"/page.css": (b"text/css; charset=utf-8", b"".join(path.read_bytes() for path in _STYLES)),
            b"/page.js": (b"text/javascript; charset=utf-8", (_PAGE / "page.js").read_bytes()),
        }

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else.
        """
        target = request.target.partition(b"?")[0]
        answer = self._answers.get(target)
        if answer is None and target not in self._files:
            raise Refusal(404, "the metrics are at /metrics, a page is at /, and what it shows at /status")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "only GET is allowed")
        if answer is None:
            content_type, body = self._files[target]
            return Response(200, (body,), content_type, _HEADERS)
        return answer()


def metrics_response(families: Iterable[Family]) -> Response:
    """Return what a Prometheus server is answered."""
    return Response(200, (exposition(families).encode(),), CONTENT_TYPE)


def status_response(document: Document) -> Response:
    """Return what the page is answered."""
    response = json_response(document)
    response.headers = _HEADERS
    return response


class MetricsApi:
    """What a server on one machine says about itself.

    Args:
        catalogue: The models.
        state: How the server is.
    """

    def __init__(self, catalogue: Catalogue, state: Callable[[], ServerState]) -> None:
        self._catalogue = catalogue
        self._state = state
        self._gpus = Gpus.find()
        self._host = HostMeter()
        self._routes = WatchRoutes(lambda: self._answer(self._metrics), lambda: self._answer(self._status))

    def close(self) -> None:
        """Let go of the GPUs' driver."""
        if self._gpus is not None:
            self._gpus.close()
            self._gpus = None

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request.

        Raises:
            Refusal: It asks for anything else than the metrics, the page and what it shows.
        """
        return self._routes.handle(request)

    def _answer(self, read: Callable[[list[Gpu]], Response]) -> Response | asyncio.Future[Response]:
        return read([]) if self._gpus is None else asyncio.ensure_future(_with_gpus(self._gpus, read))

    def _metrics(self, gpus: list[Gpu]) -> Response:
        families = (
            *metrics.model_families(self._catalogue),
            *metrics.memory_families(self._catalogue.memory),
            *metrics.gpu_families(gpus),
            *metrics.host_families(self._host.read()),
            *metrics.server_families(ready=self._state() == "ready"),
        )
        return metrics_response(families)

    def _status(self, gpus: list[Gpu]) -> Response:
        catalogue, host = self._catalogue, self._host.read()
        place = Place(catalogue.hosting.placement.value, host.started, catalogue.memory, host, gpus)
        return status_response(status(catalogue, self._state(), time.time(), place))


async def _with_gpus(gpus: Gpus, answer: Callable[[list[Gpu]], Response]) -> Response:
    """Ask the GPUs in a thread, since the driver takes its time, then answer."""
    return answer(await asyncio.to_thread(gpus.read))
