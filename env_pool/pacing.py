"""Much work at once, done a slice at a time, so that an event loop with thousands of tasks stays prompt."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

T = TypeVar("T")

SLICE = 32
"""How many tasks may be woken in one turn of the event loop: some milliseconds of their work."""


async def in_slices(items: Iterable[T], size: int = SLICE) -> AsyncIterator[T]:
    """The items; after every ``size`` of them everything else that is ready runs first."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % size == 0:
            await asyncio.sleep(0)


class Pacer:
    """Lets ``size`` callers through in each turn of the event loop; the others wait in order."""

    def __init__(self, size: int = SLICE) -> None:
        self._size = size
        self._left = size
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._refilling = False

    async def turn(self) -> None:
        """Returns when it is this caller's turn."""
        if not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)
        if self._left and not self._waiting:
            self._left -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _refill(self) -> None:
        self._left = self._size
        while self._waiting and self._left:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else its caller was cancelled
                waiter.set_result(None)
                self._left -= 1
        self._refilling = bool(self._waiting)
        if self._refilling:
            asyncio.get_running_loop().call_soon(self._refill)
