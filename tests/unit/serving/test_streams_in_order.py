from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from narrowcast.serving.rpc.streams import MOST_UNDER_WAY, answered_in_order


class Answers:
    """Answers that end when they are told to; knows which began and which were cancelled."""

    def __init__(self) -> None:
        self.may_end: dict[int, asyncio.Event] = {}
        self.cancelled: set[int] = set()

    async def __call__(self, number: int) -> int:
        event = self.may_end[number] = asyncio.Event()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.add(number)
            raise
        return number

    async def end_all(self) -> None:
        while True:
            for event in self.may_end.values():
                event.set()
            await asyncio.sleep(0)


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def settle() -> None:
    for _ in range(4 * MOST_UNDER_WAY):
        await asyncio.sleep(0)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def test_answers_come_in_order_and_no_more_are_under_way_than_may_be() -> None:
    async def main() -> None:
        answers = Answers()
        stream = answered_in_order(numbers(MOST_UNDER_WAY + 3), answers)
        first = asyncio.ensure_future(anext(stream))
        await settle()
        assert sorted(answers.may_end) == list(range(MOST_UNDER_WAY))
        answers.may_end[1].set()
        await settle()
        assert not first.done()
        answers.may_end[0].set()
        assert await first == 0
        assert await anext(stream) == 1
        following = asyncio.ensure_future(anext(stream))
        await settle()
        assert sorted(answers.may_end) == list(range(MOST_UNDER_WAY + 2))
        ending = asyncio.create_task(answers.end_all())
        assert [await following, *[one async for one in stream]] == list(range(2, MOST_UNDER_WAY + 3))
        ending.cancel()

    run(main())


@pytest.mark.parametrize("answered", [0, 1])
def test_nothing_goes_on_for_a_client_that_left(answered: int) -> None:
    async def main() -> None:
        answers = Answers()
        stream = answered_in_order(numbers(3 * MOST_UNDER_WAY), answers)
        following = asyncio.ensure_future(anext(stream))
        await settle()
        if answered:
            answers.may_end[0].set()
            await following
            await stream.aclose()
        else:
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
        await settle()
        assert answers.cancelled == answers.may_end.keys() - range(answered)

    run(main())


def test_what_ends_the_messages_ends_the_stream_after_the_answers() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 0
        raise ConnectionResetError("the client went away")

    async def main() -> None:
        answers = Answers()
        stream = answered_in_order(broken(), answers)
        first = asyncio.ensure_future(anext(stream))
        await settle()
        answers.may_end[0].set()
        assert await first == 0
        with pytest.raises(ConnectionResetError, match="went away"):
            await anext(stream)

    run(main())
