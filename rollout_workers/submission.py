"""What travels between a worker and an engine, and the calls it travels by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from experience.transport.lane import OverLane
from rollout_workers.engines.lane import ENGINE_LANE
from rollout_workers.engines.protocol import GenerateRequest, TokenChunk


class SubmitBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One submission: requests to start, sessions whose KV is no longer needed, requests to abort."""

    client: str
    requests: list[GenerateRequest]
    releases: list[str]
    aborts: list[str]


class EngineHandle(Protocol):
    """The two calls of an engine actor that a worker makes; both are awaited."""

    async def submit(self, batch: bytes) -> bytes | None:
        """Take a `SubmitBatch`. Returns an encoded `EngineLoad`, or None from an engine that does not tell."""
        ...

    async def collect(self, client: str) -> bytes: ...


@dataclass
class Pending:
    """A request in flight and what has arrived of it."""

    request: GenerateRequest
    future: asyncio.Future[TokenChunk]
    chunks: list[TokenChunk] = field(default_factory=list)
    engine: str = ""
    asked_at: float = field(default_factory=time.monotonic)
    leaving: bool = False
    """Taken off an engine that drains."""
    fruitless: int = 0
    """Times in a row that an engine aborted it without a token."""
    given_up: bool = False
    """Nobody waits for it any more, and its engine was told or never had it."""


@dataclass
class EngineLine:
    """What waits to be sent to one engine."""

    handle: EngineHandle
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    draining: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once an engine that drains has none of this client's requests."""
    since: int = 0
    """The version that it joined with: it holds no older one, pinned or not."""


def holders(engines: Mapping[str, EngineLine], members: Sequence[str], request: GenerateRequest) -> list[str] | None:
    """Those of ``members`` that hold the version that a request is pinned to; None when all of them can take it."""
    version = request.pinned_version
    if version is None:
        return None
    found = [name for name in members if engines[name].since <= version]
    return None if len(found) == len(members) else found


class RayEngineHandle:
    """An engine actor's handle with plain awaitable calls, over the actor's socket where it has one."""

    def __init__(self, actor: Any, name: str = "") -> None:
        self._actor = OverLane(actor, f"engine {name}", ENGINE_LANE)

    async def submit(self, batch: bytes) -> bytes | None:
        load: bytes | None = await self._actor.submit.remote(batch)
        return load or None

    async def collect(self, client: str) -> bytes:
        result: bytes = await self._actor.collect.remote(client)
        return result
