"""How a client and an actor exchange many calls in few round trips.

The client sends batches (``call_many``), one at a time. The actor answers what is ready within a moment in the reply;
what takes longer is fetched by a long poll (``collect``), of which the client keeps one open while anything is
outstanding. So quick calls cost one round trip a batch, and a slow one holds up nobody.

Bodies are opaque bytes: the two ends agree on what they hold.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from env_pool.coalesce import Coalescer
from env_pool.pacing import in_slices
from experience.transport.lane import LaneCallError, LaneLostError, LaneServer
from experience.wire import decode, encode

COLLECT_HOLD_S = 20.0
"""How long an idle ``collect`` stays open before it returns empty-handed."""
COLLECT_GRACE_S = 40.0
"""How much longer the client waits for it before it calls the actor lost."""
MAX_BATCH = 128
"""Calls that travel together: the actor starts them all in one turn of its event loop."""


class Request(msgspec.Struct, array_like=True):
    """One call of a batch."""

    call_id: int
    body: bytes


class Batch(msgspec.Struct, array_like=True):
    """Calls of one client."""

    client: str
    requests: list[Request]


class Reply(msgspec.Struct, array_like=True):
    """The answer to one call."""

    call_id: int
    body: bytes


class ActorLost(Exception):
    """The actor died or does not answer; whatever state it held is gone."""


def _transport_errors() -> tuple[type[BaseException], ...]:
    from ray.exceptions import RayError

    return (ActorLost, LaneLostError, LaneCallError, RayError)


class BatchActor(Protocol):
    """An actor whose calls come in batches."""

    async def call_many(self, payload: bytes) -> bytes: ...

    async def collect(self, client: str) -> bytes: ...


LANE_METHODS = ("call_many", "collect")
"""What clients call over a socket (`experience.transport.lane.OverLane`)."""


def batch_lane(actor: BatchActor, what: str) -> LaneServer:
    """The socket over which the calls of an actor can be made."""
    return LaneServer(what, {"call_many": actor.call_many, "collect": lambda client: actor.collect(client.decode())})


class BatchServer:
    """The actor's end. ``handle(client, body)`` starts a call and returns the future of its encoded answer."""

    def __init__(self, handle: Callable[[str, bytes], Awaitable[bytes]], patience_s: float = 0.01) -> None:
        self._handle = handle
        self._patience_s = patience_s
        self._outboxes: defaultdict[str, list[Reply]] = defaultdict(list)
        self._filled: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def call_many(self, payload: bytes) -> bytes:
        """Start the calls of an encoded :class:`Batch`; returns the encoded replies that are ready in a moment."""
        batch = decode(payload, Batch)
        calls = {
            asyncio.ensure_future(self._handle(batch.client, request.body)): request.call_id
            for request in batch.requests
        }
        done, late = await asyncio.wait(calls, timeout=self._patience_s)
        for future in late:
            future.add_done_callback(partial(self._post, batch.client, calls[future]))
        return encode([Reply(calls[future], future.result()) for future in done])

    async def collect(self, client: str) -> bytes:
        """Encoded replies that became ready since; waits for the first one, but not for ever."""
        if not self._outboxes[client]:
            try:
                await asyncio.wait_for(self._filled[client].wait(), COLLECT_HOLD_S)
            except TimeoutError:
                return encode([])
        self._filled[client].clear()
        return encode(self._outboxes.pop(client, []))

    def forget(self, client: str) -> None:
        """Drop what is kept for a client that will not come back."""
        self._outboxes.pop(client, None)
        self._filled.pop(client, None)

    def _post(self, client: str, call_id: int, ended: asyncio.Future[bytes]) -> None:
        if not ended.cancelled():
            self._outboxes[client].append(Reply(call_id, ended.result()))
            self._filled[client].set()


class Channel:
    """The client's end: calls to one actor (a Ray handle, or anything shaped like one)."""

    def __init__(self, actor: Any, client: str, label: str) -> None:
        self.actor = actor
        self._client = client
        self._label = label
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._lost: ActorLost | None = None
        self._line: Coalescer[Request, None] = Coalescer(self._send, MAX_BATCH)
        self._collector: asyncio.Task[None] | None = None

    async def call(self, body: bytes, timeout_s: float) -> bytes:
        """The answer's body. Raises :class:`ActorLost` when the actor dies, or does not answer within ``timeout_s``."""
        if self._lost is not None:
            raise self._lost
        self._next_id += 1
        call_id = self._next_id
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = answer
        sent = self._line.put(Request(call_id, body))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise self._fail(f"{self._label} did not answer within {timeout_s:g} s") from None
        finally:
            sent.cancel()  # no effect once the batch has left
            self._waiting.pop(call_id, None)

    def close(self, reason: str = "the channel was closed") -> None:
        """Stop listening; calls still waiting end with :class:`ActorLost`."""
        self._fail(f"{self._label}: {reason}")
        self._line.close()
        if self._collector is not None:
            self._collector.cancel()

    async def _send(self, requests: list[Request]) -> list[None]:
        try:
            payload = await self.actor.call_many.remote(encode(Batch(self._client, requests)))
        except _transport_errors() as error:
            self._fail(f"{self._label} is lost: {_first_line(error)}")
            return [None] * len(requests)
        await self._settle(payload)
        if self._waiting and self._collector is None:
            self._collector = asyncio.create_task(self._collect())
        return [None] * len(requests)

    async def _collect(self) -> None:
        try:
            while self._waiting:
                async with asyncio.timeout(COLLECT_HOLD_S + COLLECT_GRACE_S):
                    payload = await self.actor.collect.remote(self._client)
                await self._settle(payload)
        except TimeoutError:
            self._fail(f"{self._label} did not answer within {COLLECT_HOLD_S + COLLECT_GRACE_S:g} s")
        except _transport_errors() as error:
            self._fail(f"{self._label} is lost: {_first_line(error)}")
        finally:
            self._collector = None

    async def _settle(self, payload: bytes) -> None:
        async for reply in in_slices(decode(payload, list[Reply])):
            answer = self._waiting.get(reply.call_id)
            if answer is not None and not answer.done():
                answer.set_result(reply.body)

    def _fail(self, reason: str) -> ActorLost:
        """End every waiting call, and refuse further ones, with the first reason there was."""
        self._lost = self._lost or ActorLost(reason)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._lost)
        return self._lost


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
