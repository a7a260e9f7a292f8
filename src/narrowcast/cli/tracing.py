"""What commands have in common that trace models: quick imports, no log of what fails on the way, and a sign of life."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from narrowcast.cli.console import errors_console
from narrowcast.cli.garbage import uncollected
from narrowcast.cli.imports import import_transformers

__all__ = ["tracing"]


@contextmanager
def tracing(models: Sequence[str], *, debug: bool) -> Generator[None]:
    """Trace models inside.

    Args:
        models: Their references.
        debug: Whether PyTorch may log what fails on the way.
    """
    with uncollected(), _quiet(debug), errors_console().status("tracing", spinner="dots"):
        import_transformers(models)
        yield


@contextmanager
def _quiet(debug: bool) -> Generator[None]:
    """Keep PyTorch from logging what fails on the way: another way is found, or the error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    refuse: Callable[[logging.LogRecord], bool] = lambda record: debug  # noqa: E731
    log.addFilter(refuse)
    try:
        yield
    finally:
        log.removeFilter(refuse)
