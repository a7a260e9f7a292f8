"""Streams of requests, answered in order while several are under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["MOST_UNDER_WAY", "answered_in_order"]

_Message = TypeVar("_Message")
_Answer = TypeVar("_Answer")
#: Requests of one stream that are under way at a time; the client's next ones wait in the connection.
MOST_UNDER_WAY = 64


async def answered_in_order(
    messages: AsyncIterator[_Message], answer: Callable[[_Message], Coroutine[Any, Any, _Answer]]
) -> AsyncGenerator[_Answer, None]:
    """Yield the answer to each message of a stream, in the order in which they came.

    Where the stream is left before its end, what is under way is cancelled, and nothing more is read.

    Args:
        messages: What the client sends.
        answer: Begins to answer one message; it raises nothing, as that would end the stream for all others.
    """
    waiting: asyncio.Queue[asyncio.Task[_Answer] | None] = asyncio.Queue()
    room = asyncio.Semaphore(MOST_UNDER_WAY)

    async def accept() -> None:
        try:
            async for message in messages:
                await room.acquire()
                waiting.put_nowait(asyncio.create_task(answer(message)))
        finally:
            waiting.put_nowait(None)

    accepting = asyncio.create_task(accept())
    try:
        while (task := await waiting.get()) is not None:
            yield await task
            room.release()
        await accepting  # raises what ended the messages, where that was no end
    finally:
        accepting.cancel()
        while not waiting.empty():
            task = waiting.get_nowait()
            if task is not None:
                task.cancel()
