"""A fleet without Ray: real engine actors of the torch engine, a real weight transport, a worker's real engine client."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_helpers import make_model, make_tokenizer, prompt
from pool_fixtures import LocalActor

from orchestrator.fleet import Fleet, FleetEvents
from rollout_workers.engine_client import EngineClient
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest, TokenChunk
from weight_sync.config import WeightsConfig
from weight_sync.membership import MemberState
from weight_sync.transports.shared_memory import SharedMemorySender

MODEL = make_model()
TIMEOUT_S = 20.0
"""`weights.timeout_s` of these fleets."""
LENGTH = 96
"""Tokens of a request in these tests; nothing else ends one."""


class TinyEngine(EngineActor):
    """The real actor of a tiny model made in memory. Can refuse weights or never answer, and tells when it commits."""

    def __init__(self, name: str, stream_every: int = 8) -> None:
        super().__init__(name, EnginesConfig(slots=48, max_len=128, threads=1, trace=False, stream_every=stream_every))
        self.refuses = False
        self.silent_at = ""
        """``stage`` or ``commit``: that call never returns."""
        self.silent = asyncio.Event()
        """Set once it has been called."""
        self.sampled = asyncio.Event()
        self.most_tokens: int | None = None
        """It samples no more than about so many of all requests together."""
        self.on_commit: Callable[[int], None] = lambda change: None

    def _build(self, path: Path, dtype: str, threads: int, version: int) -> Any:
        from rollout_workers.engines.torch_engine import TorchEngine

        return TorchEngine(copy.deepcopy(MODEL), make_tokenizer(), self._config, version)

    def _step(self) -> list[TokenChunk]:
        before = self._engine.counters.generated_tokens
        if self.most_tokens is not None and before >= self.most_tokens:
            return []
        chunks = super()._step()
        if self._engine.counters.generated_tokens > before:
            self.sampled.set()
        return chunks

    async def _answers(self, call: str) -> None:
        if self.silent_at == call:
            self.silent.set()
            await asyncio.Event().wait()

    async def stage(self, offer: bytes) -> int:
        if self.refuses:
            raise OSError("no space for another version")
        await self._answers("stage")
        return await super().stage(offer)

    async def commit(self, version: int, kv: str) -> int:
        await self._answers("commit")
        self.on_commit(+1)
        await asyncio.sleep(0)  # whoever commits at the same time begins now
        served = await super().commit(version, kv)
        self.on_commit(-1)
        return served


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    """The model's, a little different for each version."""
    return [(name, tensor.detach() * (1 + 0.05 * version)) for name, tensor in MODEL.named_parameters()]


def turn(number: int, max_tokens: int = LENGTH) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{number}", session_id=f"s{number}", prompt=prompt(8, number), max_tokens=max_tokens, seed=number
    )


@dataclass
class LocalFleet:
    """A fleet, its learner's side of the transport, and one worker."""

    fleet: Fleet
    client: EngineClient
    sender: SharedMemorySender
    engines: dict[str, TinyEngine] = field(default_factory=dict)
    states: list[tuple[str, str, int | None]] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    committing: int = 0
    most_committing: int = 0

    def on_commit(self, change: int) -> None:
        self.committing += change
        self.most_committing = max(self.most_committing, self.committing)

    async def join(self, name: str, **settings: Any) -> TinyEngine:
        """A new engine, from its start until the worker knows it. Its weights on disk are version 0."""
        engine = self.engines[name] = TinyEngine(name, **settings)
        engine.on_commit = self.on_commit
        self.fleet.starting(name)
        await engine.load("", "float32", 1, 0)
        await self.fleet.join(name, LocalActor(engine), 0)
        self.client.add_engine(name, engine)
        return engine

    async def leave(self, name: str, grace_s: float) -> tuple[int, int]:
        self.fleet.drain(name, "asked to")
        counts = await self.client.drain_engine(name, grace_s)
        await self.fleet.leave(name, "drained")
        await self.engines.pop(name).stop()
        return counts

    async def under_way(self, name: str) -> None:
        """Until an engine samples."""
        sampled = self.engines[name].sampled
        sampled.clear()
        async with asyncio.timeout(20):
            await sampled.wait()

    async def transfer(self, version: int, members: list[tuple[str, Any]]) -> list[str]:
        offer = self.sender.offer([name for name, _ in members])
        self.sender.send()
        stages = (self.fleet.while_there(name, handle.stage.remote(offer)) for name, handle in members)
        results = await asyncio.gather(*stages, return_exceptions=True)
        return [name for (name, _), result in zip(members, results, strict=True) if result == version]

    async def prepare(self, version: int) -> None:
        self.sender.prepare(version, weights(version), [])


@asynccontextmanager
async def local_fleet(directory: Path, rolling: bool = True, kv: str = "auto") -> AsyncIterator[LocalFleet]:
    local: LocalFleet

    async def nothing(*_: Any) -> None: ...

    async def served(oldest: int) -> None:
        local.served.append(oldest)

    def changed(name: str, state: MemberState, version: int | None, why: str) -> None:
        del why
        local.states.append((name, state.value, version))

    events = FleetEvents(
        expire=nothing,
        prepare=lambda version: local.prepare(version),
        served=served,
        committed=nothing,
        joined=nothing,
        broken=lambda name, reason: local.broken.append(name),
        changed=changed,
    )
    config = WeightsConfig(rolling=rolling, kv=kv, timeout_s=TIMEOUT_S)
    fleet = Fleet(config, 0, lambda version, members: local.transfer(version, members), events)
    local = LocalFleet(fleet, EngineClient("w"), SharedMemorySender(directory=directory, bucket_bytes=1 << 16))
    try:
        yield local
    finally:
        await local.client.close()
        for engine in local.engines.values():
            await engine.stop()
        local.sender.close()


def whole(results: list[TokenChunk]) -> bool:
    """No token is missing, and each has its log-probability and its version."""
    return all(len(r.tokens) == len(r.logprobs) == len(r.versions) == LENGTH for r in results)
