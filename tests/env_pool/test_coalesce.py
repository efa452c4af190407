from __future__ import annotations

import asyncio

import pytest

from env_pool.coalesce import Coalescer


class Line:
    """A remote end that answers when it is told to, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.busy = asyncio.Event()

    async def send(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.busy.set()
        await self.gate.wait()
        if 13 in items:
            raise ConnectionError("unlucky")
        return [2 * item for item in items]


async def test_calls_of_one_tick_and_those_behind_a_flight_make_one_batch_each() -> None:
    line = Line()
    coalescer = Coalescer(line.send, max_batch=4)
    first = [asyncio.create_task(coalescer.call(i)) for i in range(3)]
    await line.busy.wait()
    behind = [asyncio.create_task(coalescer.call(i)) for i in range(3, 8)]
    await asyncio.sleep(0)
    line.gate.set()
    assert await asyncio.gather(*first, *behind) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert line.batches == [[0, 1, 2], [3, 4, 5, 6], [7]]


async def test_a_failed_batch_fails_its_callers_and_nobody_else() -> None:
    line = Line()
    line.gate.set()
    coalescer = Coalescer(line.send, max_batch=2)
    results = await asyncio.gather(*(coalescer.call(i) for i in (12, 13, 14)), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError, ConnectionError, int]


async def test_a_call_cancelled_in_the_queue_is_not_sent() -> None:
    line = Line()
    coalescer = Coalescer(line.send)
    first = asyncio.create_task(coalescer.call(1))
    await line.busy.wait()
    second, third = asyncio.create_task(coalescer.call(2)), asyncio.create_task(coalescer.call(3))
    await asyncio.sleep(0)
    second.cancel()
    line.gate.set()
    assert await asyncio.gather(first, third) == [2, 6]
    assert line.batches == [[1], [3]]


async def test_closing_cancels_those_who_wait() -> None:
    line = Line()
    coalescer = Coalescer(line.send)
    first = asyncio.create_task(coalescer.call(1))
    await line.busy.wait()
    second = asyncio.create_task(coalescer.call(2))
    await asyncio.sleep(0)
    coalescer.close()
    for task in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_answer_of_the_wrong_length_is_an_error() -> None:
    async def send(items: list[int]) -> list[int]:
        return items[1:]

    with pytest.raises(RuntimeError, match="a batch of 1 calls was answered with 0 results"):
        await Coalescer(send).call(1)
