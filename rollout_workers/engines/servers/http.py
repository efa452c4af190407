"""HTTP to one server: `Call`s sent, answers told apart by what is to be done about them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from rollout_workers.engines.servers.adapter import Call, Reply, ServerAdapter
from rollout_workers.engines.servers.errors import (
    ServerFailed,
    ServerNotThere,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
)

CONNECT_S = 10.0
KEEP_ALIVE_S = 2.0
"""Idle connections are closed before the server does it (after 5 s), which could meet a call on its way."""
BODY_BYTES = 64 << 20
"""The largest answer to a call that is not a stream."""


class ServerConnection:
    """One server at ``url``; any number of calls at once. A call without a time-out of its own gets ``timeout_s``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        self._client = httpx2.AsyncClient(
            base_url=self.url, limits=limits, timeout=timeout, trust_env=False, follow_redirects=False
        )

    async def send(self, call: Call) -> Reply:
        """The answer, whatever its status. Raises ServerUnreachable (ServerNotThere) or ServerSilent."""
        limit = self._timeout_s if call.timeout_s is None else call.timeout_s
        try:
            async with asyncio.timeout(limit), self._open(call) as response:
                return Reply(response.status_code, await _bounded(response, call))
        except TimeoutError:
            raise ServerSilent(f"{self._named(call)} was not answered within {limit:g} s") from None
        except httpx2.HTTPError as error:
            kind = ServerNotThere if isinstance(error, httpx2.ConnectError) else ServerUnreachable
            raise kind(f"{self._named(call)}: {_told(error)}") from error

    async def ask(self, call: Call) -> bytes:
        """The body of a 200 answer. Raises also ServerRefused (4xx) and ServerFailed (any other status)."""
        reply = await self.send(call)
        if reply.status == 200:
            return reply.body
        raise refused(self._named(call), reply)

    async def control(self, adapter: ServerAdapter, calls: list[Call]) -> None:
        """Calls one after another, each of which must succeed in the adapter's own terms (polled where it says so)."""
        for call in calls:
            body = await self.ask(call)
            adapter.check(call, body)
            while call.poll_s is not None and adapter.pending(call, body):
                await asyncio.sleep(call.poll_s)  # the server has no other way to say when; the caller has a time-out
                body = await self.ask(call)
                adapter.check(call, body)

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Status and body of an answer, as it arrives. Raises ServerUnreachable; silence is the caller's to bound."""
        try:
            async with self._open(call) as response:
                yield response.status_code, self._bytes_of(response, call)
        except httpx2.HTTPError as error:
            raise ServerUnreachable(f"{self._named(call)}: {_told(error)}") from error

    async def close(self) -> None:
        await self._client.aclose()

    def _open(self, call: Call) -> Any:
        return self._client.stream(call.method, call.path, params=call.query, json=call.body)

    async def _bytes_of(self, response: httpx2.Response, call: Call) -> AsyncIterator[bytes]:
        try:
            async for data in response.aiter_bytes():
                yield data
        except httpx2.HTTPError as error:
            raise ServerUnreachable(f"{self._named(call)}: {_told(error)}") from error

    def _named(self, call: Call) -> str:
        return f"{call.method} {self.url}{call.path}"


async def _bounded(response: httpx2.Response, call: Call) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > BODY_BYTES:
            raise ServerFailed(f"{call.path} answered with more than {BODY_BYTES >> 20} MiB")
    return b"".join(parts)


async def beginning(body: AsyncIterator[bytes], limit: int = 64 << 10) -> bytes:
    """The first ``limit`` bytes of an answer, or all of it."""
    parts, size = [], 0
    async for part in body:
        parts.append(part)
        size += len(part)
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def refused(what: str, reply: Reply) -> ServerRefused | ServerFailed:
    """The error for an answer that is not 200, with a little of what it says."""
    text = " ".join(reply.body[:600].decode(errors="replace").split()) or "no text"
    kind = ServerRefused if 400 <= reply.status < 500 else ServerFailed
    return kind(f"{what} answered {reply.status}: {text}")


def _told(error: httpx2.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
