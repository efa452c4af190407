"""A worker's view of the engines: batched submission, streamed chunks, and continuation when an engine is lost.

Requests submitted while an earlier submission is on its way travel together in the next one; results come back through
one pending `collect` call per engine. A request whose engine died is sent to another one with the tokens it already has
as context and its remaining budget: no token is sampled twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from env_pool.pacing import in_slices
from experience.vitals import SUBMIT, process_vitals
from experience.wire import decode, encode
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.errors import EngineFault
from rollout_workers.router import Router

logger = logging.getLogger(__name__)

MAX_BATCH = 128
"""Requests that travel together, unless the run is in lock-step: the engine takes them in one turn of its event loop."""


class SubmitBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One submission: requests to start, sessions whose KV is no longer needed, requests to abort."""

    client: str
    requests: list[GenerateRequest]
    releases: list[str]
    aborts: list[str]


class EngineHandle(Protocol):
    """The two calls of an engine actor that a worker makes; both are awaited."""

    async def submit(self, batch: bytes) -> None: ...

    async def collect(self, client: str) -> bytes: ...


@dataclass
class _Pending:
    """A request in flight and what has arrived of it."""

    request: GenerateRequest
    future: asyncio.Future[TokenChunk]
    chunks: list[TokenChunk] = field(default_factory=list)
    engine: str = ""
    asked_at: float = field(default_factory=time.monotonic)


@dataclass
class _Engine:
    handle: EngineHandle
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class EngineClient:
    """Implements `rollout_workers.episode_context.Generator` over any number of engine actors.

    With ``barrier`` (lock-step, deterministic runs) a submission waits until ``barrier()`` says that every live episode
    is waiting for a generation, and is sorted by session: the batches that the engine sees do not depend on timing.
    """

    def __init__(
        self,
        client: str,
        engine_timeout_s: float = 120.0,
        barrier: Callable[[int], bool] | None = None,
        on_engine_lost: Callable[[str, BaseException], None] | None = None,
    ) -> None:
        self.client = client
        self._timeout_s = engine_timeout_s
        self._barrier = barrier
        self._on_engine_lost = on_engine_lost
        self._router = Router()
        self._engines: dict[str, _Engine] = {}
        self._pending: dict[str, _Pending] = {}
        self._held: list[_Pending] = []
        self._held_releases: list[str] = []
        self._joined = asyncio.Event()
        self.continued = 0
        """Requests that went on elsewhere after their engine was lost."""

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def engine_of(self, episode_id: str) -> str:
        """The engine that a request of this episode waits for; empty when there is none."""
        for pending in self._pending.values():
            if pending.request.session_id.startswith(f"{episode_id}/"):
                return pending.engine
        return ""

    def add_engine(self, name: str, handle: EngineHandle) -> None:
        """An engine that serves the current weights joins."""
        if name in self._engines:
            return
        engine = _Engine(handle)
        self._engines[name] = engine
        self._router.add(name)
        engine.tasks = [asyncio.create_task(self._send(name, engine)), asyncio.create_task(self._receive(name, engine))]
        self._joined.set()

    def remove_engine(self, name: str, cause: BaseException | None = None) -> None:
        """An engine left or died; its requests continue on the others, or wait for one to join."""
        engine = self._engines.pop(name, None)
        if engine is None:
            return
        self._router.remove(name)
        current = asyncio.current_task()
        for task in engine.tasks:
            if task is not current:
                task.cancel()
        if not self._engines:
            self._joined.clear()
        orphans = [pending for pending in self._pending.values() if pending.engine == name]
        if cause is not None:
            logger.warning("engine %s lost (%s); %d requests continue elsewhere", name, cause, len(orphans))
            if self._on_engine_lost is not None:
                self._on_engine_lost(name, cause)
        for pending in orphans:
            self.continued += 1
            self._route(pending)

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        """All tokens of a request, in one chunk. Raises EngineFault when no engine served it in time."""
        future: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
        pending = _Pending(request, future)
        self._pending[request.request_id] = pending
        try:
            if not self._engines:
                await self._wait_for_engine()
            if self._barrier is None:
                self._route(pending)
            else:
                self._held.append(pending)
                self.check_barrier()
            return await future
        except asyncio.CancelledError:
            self._abort(pending)
            raise
        finally:
            del self._pending[request.request_id]
            self._router.finished(pending.engine)

    def release(self, session_id: str) -> None:
        """The session is over: its engine may drop the KV."""
        if self._barrier is not None:
            self._held_releases.append(session_id)
            return
        self._release_now(session_id)

    def check_barrier(self) -> None:
        """Lock-step only: send what is held if every live episode waits for a generation."""
        if self._barrier is None or not self._held or not self._barrier(len(self._held)):
            return
        for session in sorted(self._held_releases):
            self._release_now(session)
        held = sorted(self._held, key=lambda pending: pending.request.session_id)
        self._held, self._held_releases = [], []
        for pending in held:
            self._route(pending)

    async def close(self) -> None:
        for engine in self._engines.values():
            for task in engine.tasks:
                task.cancel()
        self._engines.clear()

    def _release_now(self, session_id: str) -> None:
        home = self._router.release(session_id)
        if home is not None and home in self._engines:
            engine = self._engines[home]
            engine.releases.append(session_id)
            if self._barrier is None and len(engine.releases) >= 16:
                engine.wake.set()

    async def _wait_for_engine(self) -> None:
        try:
            await asyncio.wait_for(self._joined.wait(), self._timeout_s)
        except TimeoutError:
            raise EngineFault(f"no inference engine was serving within {self._timeout_s:.0f} s") from None

    def _route(self, pending: _Pending) -> None:
        """Send a request, or what is left of it, to the engine of its session."""
        left = remaining(pending.request, pending.chunks)
        if left.max_tokens <= 0:
            pending.future.set_result(
                msgspec.structs.replace(joined(pending.chunks), finish_reason=FinishReason.LENGTH)
            )
            return
        name = self._router.choose(pending.request.session_id)
        if name is None:
            pending.engine = ""
            waiter = asyncio.create_task(self._route_later(pending))
            pending.future.add_done_callback(lambda _: waiter.cancel())
            return
        pending.engine = name
        engine = self._engines[name]
        engine.requests.append(left)
        engine.wake.set()

    async def _route_later(self, pending: _Pending) -> None:
        try:
            await self._wait_for_engine()
        except EngineFault as fault:
            if not pending.future.done():
                pending.future.set_exception(fault)
            return
        if not pending.future.done():
            self._route(pending)

    def _abort(self, pending: _Pending) -> None:
        if pending in self._held:
            self._held.remove(pending)
        engine = self._engines.get(pending.engine)
        if engine is None:
            return
        unsent = [request for request in engine.requests if request.request_id != pending.request.request_id]
        if len(unsent) < len(engine.requests):
            engine.requests = unsent
            return
        engine.aborts.append(pending.request.request_id)
        engine.wake.set()

    async def _send(self, name: str, engine: _Engine) -> None:
        """Submit whatever has gathered, one call at a time."""
        while True:
            await engine.wake.wait()
            engine.wake.clear()
            limit = MAX_BATCH if self._barrier is None else len(engine.requests)
            now, later = engine.requests[:limit], engine.requests[limit:]
            batch = SubmitBatch(client=self.client, requests=now, releases=engine.releases, aborts=engine.aborts)
            engine.requests, engine.releases, engine.aborts = later, [], []
            if later:
                engine.wake.set()
            self._observe(batch.requests)
            try:
                await engine.handle.submit(encode(batch))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the engine is unusable
                self.remove_engine(name, error)
                return

    def _observe(self, requests: list[GenerateRequest]) -> None:
        """Note how long new requests waited for the submission before theirs (continued ones are not new)."""
        vitals, now = process_vitals(), time.monotonic()
        for request in requests:
            pending = self._pending.get(request.request_id)
            if pending is not None and pending.request is request:
                vitals.observe(SUBMIT, now - pending.asked_at)

    async def _receive(self, name: str, engine: _Engine) -> None:
        while True:
            try:
                chunks = decode(await engine.handle.collect(self.client), list[TokenChunk])
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the engine is unusable
                self.remove_engine(name, error)
                return
            async for chunk in in_slices(chunks):
                self._accept(name, chunk)

    def _accept(self, name: str, chunk: TokenChunk) -> None:
        pending = self._pending.get(chunk.request_id)
        if pending is None or pending.engine != name or pending.future.done():
            return
        pending.chunks.append(chunk)
        if chunk.finish_reason is not None:
            pending.future.set_result(joined(pending.chunks))


def remaining(request: GenerateRequest, chunks: list[TokenChunk]) -> GenerateRequest:
    """What is left of a request after ``chunks``: they become context and count against its budget."""
    done = sum(len(chunk.tokens) for chunk in chunks)
    if not done:
        return request
    return msgspec.structs.replace(
        request,
        prompt=np.concatenate([request.prompt, *(chunk.tokens for chunk in chunks)]),
        max_tokens=request.max_tokens - done,
    )


def joined(chunks: list[TokenChunk]) -> TokenChunk:
    """The chunks of one request as one; the last one's ending, the first one's cache count."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    return TokenChunk(
        request_id=last.request_id,
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        logprobs=np.concatenate([chunk.logprobs for chunk in chunks]),
        versions=np.concatenate([chunk.versions for chunk in chunks]),
        finish_reason=last.finish_reason,
        stop_match=last.stop_match,
        cached_tokens=chunks[0].cached_tokens,
        error=last.error,
    )


ENGINE_LANE = ("submit", "collect")
"""What workers call of an engine over a socket (`experience.transport.lane.OverLane`)."""


class RayEngineHandle:
    """An engine actor's handle with plain awaitable calls."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def submit(self, batch: bytes) -> None:
        await self._actor.submit.remote(batch)

    async def collect(self, client: str) -> bytes:
        result: bytes = await self._actor.collect.remote(client)
        return result
