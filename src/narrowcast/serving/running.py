"""A server as a program: its event loop, and its log."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import uvloop

from narrowcast.errors import RuntimeMissingError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer, ServerOptions
from narrowcast.serving.watching.logs import LOG_STYLES, LogStyle, RequestLog, logging_to
from narrowcast.serving.watching.overload import report_overload
from narrowcast.serving.watching.records import Observer

if TYPE_CHECKING:
    from narrowcast.serving.watching.tracing import Tracing

__all__ = ["serve"]


def serve(
    repository: Repository,
    hosting: Hosting,
    options: ServerOptions,
    listening: Callable[[InferenceServer], None],
    log: LogStyle = LOG_STYLES["events"],
    trace: bool = False,
) -> bool:
    """Serve until SIGTERM or SIGINT.

    Args:
        repository: The models.
        hosting: How they are run.
        options: Where and for whom.
        listening: Called when the models are loaded and the ports are known.
        log: What is written to standard error.
        trace: Whether requests are told to a collector of OpenTelemetry.

    Returns:
        Whether all requests were finished within the grace.

    Raises:
        NarrowcastError: A model cannot be loaded, an address cannot be had, or an extra is not installed.
    """
    observers: list[Observer] = []

    async def main() -> bool:
        server = InferenceServer(repository, hosting, options, observers)
        await server.start()
        gc.freeze()  # what is loaded stays: the collector need not look at it again and again
        listening(server)
        reporting = asyncio.create_task(report_overload(server.catalogue))
        try:
            return await server.run_until_signal()
        finally:
            reporting.cancel()

    with logging_to(log), ExitStack() as ends:
        if trace:
            tracing = _tracing()
            ends.callback(tracing.close)
            observers.append(tracing)  # before the log, which says the trace's name
        if log.requests:
            observers.append(RequestLog())
        return uvloop.run(main())


def _tracing() -> Tracing:
    try:
        from narrowcast.serving.watching.tracing import to_collector
    except ImportError as error:
        raise RuntimeMissingError(
            f"traces need {error.name}, which is not installed", next_step="pip install 'narrowcast[trace]'"
        ) from error
    return to_collector()
