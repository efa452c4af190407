"""Many small calls, few round trips: the one batching rule that every client in a worker shares."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Coalescer(Generic[T, R]):
    """Gathers calls into batches; one batch is in flight at a time, in order.

    All calls of one tick of the event loop go together, and all that arrive while a batch is in flight go in the next.
    So an idle line adds no delay, and a busy one grows its batches by itself. ``send`` gets the items of a batch and
    returns as many results, in order; when it raises, every caller of that batch gets the exception. A call cancelled
    before its batch left is not sent.
    """

    def __init__(self, send: Callable[[list[T]], Awaitable[list[R]]], max_batch: int = 1024) -> None:
        self._send = send
        self._max_batch = max_batch
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._drain_task: asyncio.Task[None] | None = None

    async def call(self, item: T) -> R:
        """Send ``item`` with the next batch and wait for its result."""
        return await self.put(item)

    def put(self, item: T) -> asyncio.Future[R]:
        """Queue ``item`` for the next batch; the future gets its result."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if self._drain_task is None:
            self._drain_task = asyncio.create_task(self._drain())
        return future

    async def _drain(self) -> None:
        try:
            while batch := self._next_batch():
                await self._send_batch(batch)
        finally:
            self._drain_task = None
            while self._queue:  # only when cancelled: nobody would wake these callers
                self._queue.popleft()[1].cancel()

    def _next_batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._queue and len(batch) < self._max_batch:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _send_batch(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._send([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"a batch of {len(batch)} calls was answered with {len(results)} results")
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, every caller of the batch must hear of it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def close(self) -> None:
        """Stop; callers still waiting are cancelled."""
        if self._drain_task is not None:
            self._drain_task.cancel()
