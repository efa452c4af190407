"""The other side of the transport: what producers and consumers of the queue hold.

A call goes over the socket. When it cannot be opened, or ends in the middle of a call, the same call is made again over
the fallback (Ray), which knows whether the queue is still alive; the queue takes an episode once and delivers a lease
once, however often they are asked for. The socket is tried again a little later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experience.entries import Added, EpisodeEntry
from experience.transport.connecting import ProvedChannel, connect
from experience.transport.frames import ADDED_OF, Endpoint, Kind, LeaseRequest, head
from experience.wire import decode, encode

logger = logging.getLogger(__name__)

AT_ONCE_BYTES = 256 << 10
"""How much of a large batch is encoded before it is sent."""
RETRY_S = 5.0
"""How long calls go over the fallback after the socket failed, before it is tried again."""


class QueueCallError(RuntimeError):
    """The queue could not do what it was asked to; the message is the queue's."""


@dataclass
class _Call:
    """A call that waits for its answer."""

    expected: int
    """Episodes to be answered; 0 for a lease."""
    done: asyncio.Future[None]
    added: list[Added] = field(default_factory=list)
    groups: list[bytes] = field(default_factory=list)
    error: str | None = None


class _Channel(ProvedChannel):
    """One connection to the queue."""

    def __init__(self, token: bytes) -> None:
        super().__init__(token, "queue")
        self._calls: dict[int, _Call] = {}
        self._number = 0

    def abandon(self, error: ConnectionError) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done.done():
                call.done.set_exception(error)

    async def add(self, entries: Sequence[EpisodeEntry]) -> list[Added]:
        number, call = self._new_call(len(entries))
        frames: list[bytes] = []
        unsent = 0
        try:
            for entry in entries:
                body = encode(entry)
                frames += (head(Kind.ADD, number, len(body)), body)
                unsent += len(body)
                if unsent >= AT_ONCE_BYTES:
                    await self.write(frames)
                    frames, unsent = [], 0
                    await asyncio.sleep(0)  # what was written leaves while the rest is encoded
            await self.write(frames)
            await call.done
        finally:
            self._calls.pop(number, None)
        return call.added

    async def lease(self, request: LeaseRequest) -> list[bytes]:
        number, call = self._new_call(0)
        body = encode(request)
        try:
            await self.write([head(Kind.LEASE, number, len(body)), body])
            await call.done
        finally:
            self._calls.pop(number, None)
        return call.groups

    def _new_call(self, expected: int) -> tuple[int, _Call]:
        if self.closed:
            raise ConnectionResetError("the connection to the queue has ended")
        self._number = (self._number + 1) & 0xFFFFFFFF
        call = _Call(expected, self._loop.create_future())
        self._calls[self._number] = call
        return self._number, call

    def take(self, kind: int, number: int, body: bytes) -> None:
        call = self._calls.get(number)
        if call is None or call.done.done():
            return
        if kind == Kind.ADDED:
            call.added += [ADDED_OF[letter] for letter in body]
        elif kind == Kind.GROUP:
            call.groups.append(body)
            return
        elif kind == Kind.ERROR:
            call.error = body.decode(errors="replace")
            call.added.append(Added.FULL)
        if call.expected == 0 or len(call.added) == call.expected:
            if call.error is None:
                call.done.set_result(None)
            else:
                call.done.set_exception(QueueCallError(call.error))


class _Client:
    """Keeps one channel open; says when the fallback has to be used."""

    def __init__(self, endpoint: Endpoint | None) -> None:
        self._endpoint = endpoint
        self._channel: _Channel | None = None
        self._opening = asyncio.Lock()
        self._next_attempt = 0.0

    @property
    def route(self) -> str:
        """How calls travel now: ``unix``, ``tcp`` or ``fallback``."""
        return "fallback" if self._channel is None or self._channel.closed else self._channel.network

    def close(self) -> None:
        """End the connection; calls that wait for an answer are made again over the fallback."""
        if self._channel is not None:
            self._channel.close()

    async def _open(self) -> _Channel | None:
        """The channel, opened where necessary; None when the fallback has to do."""
        if self._channel is not None and not self._channel.closed:
            return self._channel
        loop = asyncio.get_running_loop()
        async with self._opening:
            if self._channel is not None and not self._channel.closed:
                return self._channel
            endpoint = self._endpoint
            if endpoint is None or loop.time() < self._next_attempt:
                return None
            try:
                self._channel = await connect(endpoint, lambda: _Channel(endpoint.token))
            except OSError as error:
                self._failed(error)
                return None
        return self._channel

    def _failed(self, error: OSError) -> None:
        self._next_attempt = asyncio.get_running_loop().time() + RETRY_S
        logger.warning("calls to the queue go through Ray for %g s: %s", RETRY_S, error)


class QueueProducer(_Client):
    """Adds finished episodes. ``fallback`` takes an encoded list of `EpisodeEntry` and returns one of `Added`."""

    def __init__(self, endpoint: Endpoint | None, fallback: Callable[[bytes], Awaitable[bytes]]) -> None:
        super().__init__(endpoint)
        self._fallback = fallback

    async def add(self, entries: Sequence[EpisodeEntry]) -> list[Added]:
        """Returns when the queue has taken all of them, late while its byte budget is spent: there is no time-out.

        Raises `QueueCallError` when the queue cannot take them (a full disk), or what the fallback raises.
        """
        channel = await self._open() if entries else None
        if channel is not None:
            try:
                return await channel.add(entries)
            except OSError as error:
                self._failed(error)
        return decode(await self._fallback(encode(list(entries))), list[Added])


class QueueConsumer(_Client):
    """Leases groups. ``fallback`` takes a `LeaseRequest` and returns encoded groups."""

    def __init__(self, endpoint: Endpoint | None, fallback: Callable[[LeaseRequest], Awaitable[Any]]) -> None:
        super().__init__(endpoint)
        self._fallback = fallback
        self._number = 0

    async def lease(self, consumer: str, limit: int, version: int, timeout_s: float) -> list[bytes]:
        """Up to ``limit`` groups for step ``version``, at least one unless ``timeout_s`` passes first.

        Raises `QueueCallError` with what the queue raised, or what the fallback raises.
        """
        self._number += 1
        request = LeaseRequest(
            consumer=consumer, limit=limit, version=version, timeout_s=timeout_s, number=self._number
        )
        channel = await self._open()
        if channel is not None:
            try:
                return await channel.lease(request)
            except OSError as error:
                self._failed(error)
        groups: list[bytes] = await self._fallback(request)
        return groups


async def producer_for(queue: Any) -> QueueProducer:
    """A producer for a queue actor, given its handle."""
    return QueueProducer(await _endpoint_of(queue), lambda entries: queue.add.remote(entries))


async def consumer_for(queue: Any) -> QueueConsumer:
    """A consumer for a queue actor, given its handle."""

    def lease(request: LeaseRequest) -> Any:
        return queue.lease.remote(request.consumer, request.limit, request.version, request.timeout_s, request.number)

    return QueueConsumer(await _endpoint_of(queue), lease)


async def _endpoint_of(queue: Any) -> Endpoint | None:
    return next(iter(decode(await queue.endpoint.remote(), list[Endpoint])), None)
