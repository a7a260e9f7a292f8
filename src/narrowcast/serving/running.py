"""A server as a program: its event loop, and its log."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import uvloop

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer, ServerOptions

__all__ = ["serve"]


def serve(
    repository: Repository, hosting: Hosting, options: ServerOptions, listening: Callable[[InferenceServer], None]
) -> bool:
    """Serve until SIGTERM or SIGINT.

    Args:
        repository: The models.
        hosting: How they are run.
        options: Where and for whom.
        listening: Called when the models are loaded and the ports are known.

    Returns:
        Whether all requests were finished within the grace.

    Raises:
        NarrowcastError: A model cannot be loaded, or an address cannot be had.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def main() -> bool:
        server = InferenceServer(repository, hosting, options)
        await server.start()
        gc.freeze()  # what is loaded stays: the collector need not look at it again and again
        listening(server)
        return await server.run_until_signal()

    return uvloop.run(main())
