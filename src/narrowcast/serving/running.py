"""A server as a program: its event loop, and its log."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import uvloop

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer, ServerOptions
from narrowcast.serving.watching.logs import LOG_STYLES, LogStyle, RequestLog, logging_to
from narrowcast.serving.watching.overload import report_overload
from narrowcast.serving.watching.records import Observer

__all__ = ["serve"]


def serve(
    repository: Repository,
    hosting: Hosting,
    options: ServerOptions,
    listening: Callable[[InferenceServer], None],
    log: LogStyle = LOG_STYLES["events"],
) -> bool:
    """Serve until SIGTERM or SIGINT.

    Args:
        repository: The models.
        hosting: How they are run.
        options: Where and for whom.
        listening: Called when the models are loaded and the ports are known.
        log: What is written to standard error.

    Returns:
        Whether all requests were finished within the grace.

    Raises:
        NarrowcastError: A model cannot be loaded, or an address cannot be had.
    """
    observers: list[Observer] = [RequestLog()] if log.requests else []

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

    with logging_to(log):
        return uvloop.run(main())
