"""The one exception that becomes an answer: a request that is refused, with its status.

It is no :class:`~narrowcast.errors.NarrowcastError`: those tell the person who started the server what to do, this tells
a client why its request got no result.
"""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal(Exception):  # noqa: N818  it is an answer, and no mistake of ours
    """A request that gets no result.

    Args:
        status: HTTP status; transports with statuses of their own translate it.
        message: What is wrong, for the client.
        retry_after: Seconds after which the same request may succeed.
        close: Whether the connection cannot be read any further.
    """

    def __init__(self, status: int, message: str, *, retry_after: float | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.close = close
