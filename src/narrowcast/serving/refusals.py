"""The one exception that becomes an answer: a request that is refused, with its status.

It is no :class:`~narrowcast.errors.NarrowcastError`: those tell the person who started the server what to do, this tells
a client why its request got no result.
"""

from __future__ import annotations

import logging
import reprlib

from narrowcast.errors import DataError, NarrowcastError

__all__ = [
    "LoadTimeoutError",
    "MemoryBudgetError",
    "ModelBusyError",
    "Refusal",
    "WorkerLostError",
    "change_refusal",
    "model_refusal",
    "shown",
]

_log = logging.getLogger(__name__)
#: Characters of a message at most: clients are not sent back all that they sent.
_LONGEST = 2000
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def shown(value: object) -> str:
    """Return a value that a client sent as a message can show it: however long it is, and however deeply nested."""
    return _REPR.repr(value)


class Refusal(Exception):  # noqa: N818  it is an answer, and no mistake of ours
    """A request that gets no result.

    Args:
        status: HTTP status; transports with statuses of their own translate it.
        message: What is wrong, for the client.
        retry_after: Seconds after which the same request may succeed.
        close: Whether the connection cannot be read any further.
    """

    def __init__(self, status: int, message: str, *, retry_after: float | None = None, close: bool = False) -> None:
        message = message[:_LONGEST].encode(errors="replace").decode()
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.close = close


class WorkerLostError(NarrowcastError):
    """The process that ran a batch has ended; its requests can be sent again."""


class LoadTimeoutError(NarrowcastError):
    """A version took longer to load than it may; its load was broken off."""


class ModelBusyError(NarrowcastError):
    """A change of a model was not made, because another one of it does not come to its end."""


class MemoryBudgetError(NarrowcastError):
    """A model does not fit into the memory that models may take.

    Args:
        what: What does not fit.
        lasting: Whether it could not fit if nothing else were loaded.
        next_step: What the reader can do about it.
    """

    def __init__(self, what: str, *, lasting: bool, next_step: str) -> None:
        super().__init__(what, next_step=next_step)
        self.lasting = lasting


def change_refusal(error: NarrowcastError) -> Refusal:
    """Return what a client is told when a change of what is served failed."""
    if isinstance(error, MemoryBudgetError):
        return Refusal(507, str(error)) if error.lasting else Refusal(503, str(error), retry_after=1)
    if isinstance(error, ModelBusyError):
        return Refusal(503, str(error), retry_after=1)
    return Refusal(504 if isinstance(error, LoadTimeoutError) else 400, str(error))


def model_refusal(error: Exception) -> Refusal:
    """Return what a client is told when its request failed in the model."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, WorkerLostError):
        return Refusal(503, error.what, retry_after=1)
    if isinstance(error, MemoryBudgetError):
        return change_refusal(error)
    if isinstance(error, DataError):
        return Refusal(400, error.what)
    _log.error("a model failed", exc_info=error)
    return Refusal(500, error.what if isinstance(error, NarrowcastError) else f"the model failed: {error}")
