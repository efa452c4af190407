"""One engine under the contract, whichever it is: driven through the calls of its actor, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from contract_model import MAX_LEN, named_weights

from experience.wire import decode, encode
from rollout_workers.continuation import joined
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.actor import ServerEngineActor
from rollout_workers.engines.servers.environment import ROOT
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.submission import SubmitBatch
from weight_sync.config import WeightsConfig
from weight_sync.transports.protocol import WeightSender
from weight_sync.transports.select import make_sender

NAME = "engine-0.0"
PATIENCE_S = 120.0
"""No wait of the suite is longer than this (the server's own start aside)."""
STREAM_EVERY = 4


def require_environment(kind: str) -> None:
    """Skip a test whose engine has no environment here; in CI, where there must be one, fail."""
    if kind == "torch" or (ROOT / f".venv-{kind}" / "READY").exists():
        return
    reason = f"no environment for {kind}: run `make engines`"
    if os.environ.get("REQUIRE_ENGINES"):
        pytest.fail(reason)
    pytest.skip(reason)


def settings(kind: str, **changed: object) -> EnginesConfig:
    """Of a small engine on a CPU."""
    return EnginesConfig(
        **(  # type: ignore[arg-type]
            {
                "kind": kind,
                "slots": 16,
                "max_len": MAX_LEN,
                "stream_every": STREAM_EVERY,
                "device": "cpu",
                "dtype": "float32",
                "trace": False,
                "vllm": VllmConfig(request_timeout_s=60.0),
                "sglang": SglangConfig(request_timeout_s=60.0),
            }
            | changed
        )
    )


class Engine:
    """An engine in service. ``seed_of`` tells which weights each version of it has."""

    def __init__(self, kind: str, actor: EngineActor | ServerEngineActor, model: Path) -> None:
        self.kind = kind
        self.actor = actor
        self.model = model
        self.version = 0
        self.seed_of = {0: 0}
        self._names = itertools.count()
        self._senders: dict[str, WeightSender] = {}

    @classmethod
    async def start(cls, kind: str, model: Path, logs: Path, **changed: object) -> Engine:
        require_environment(kind)
        config = settings(kind, **changed)
        config.validate()
        actor = EngineActor(NAME, config) if kind == "torch" else ServerEngineActor(NAME, config, logs)
        await actor.load(str(model), "float32", 1, 0)
        return cls(kind, actor, model)

    async def stop(self) -> None:
        for sender in self._senders.values():
            sender.close()
        await self.actor.stop()

    def request(self, given: npt.NDArray[np.int32], max_tokens: int = 24, **fields: object) -> GenerateRequest:
        name = f"r{next(self._names)}"
        defaults = {"request_id": name, "session_id": f"session of {name}", "prompt": given, "max_tokens": max_tokens}
        return GenerateRequest(**(defaults | fields))  # type: ignore[arg-type]

    async def submit(self, *requests: GenerateRequest, aborts: tuple[str, ...] = (), client: str = "suite") -> None:
        batch = SubmitBatch(client=client, requests=list(requests), releases=[], aborts=list(aborts))
        await self.actor.submit(encode(batch))

    async def collect(self, client: str = "suite") -> list[TokenChunk]:
        return decode(await self.actor.collect(client), list[TokenChunk])

    def actor_has_news(self, client: str = "suite") -> bool:
        """Whether `collect` would return at once with chunks."""
        source = self.actor if isinstance(self.actor, EngineActor) else self.actor._traffic
        return bool(source._outbox[client])

    def serves(self, request_id: str) -> bool:
        """Whether the server of such an engine still has this request, aborted or not."""
        return isinstance(self.actor, ServerEngineActor) and request_id in self.actor._traffic.flights

    async def results(
        self, *requests: GenerateRequest, client: str = "suite", during: Callable[[int], None] | None = None
    ) -> list[TokenChunk]:
        """The chunks of these requests, joined, once all have ended. ``during`` hears how many tokens there are so far."""
        parts: dict[str, list[TokenChunk]] = {request.request_id: [] for request in requests}
        async with asyncio.timeout(PATIENCE_S):
            while not all(chunks and chunks[-1].finish_reason is not None for chunks in parts.values()):
                for chunk in await self.collect(client):
                    parts[chunk.request_id].append(chunk)
                if during is not None:
                    during(min(sum(len(chunk.tokens) for chunk in chunks) for chunks in parts.values()))
        return [joined(chunks) for chunks in parts.values()]

    async def run(self, *requests: GenerateRequest) -> list[TokenChunk]:
        await self.submit(*requests)
        return await self.results(*requests)

    async def one(self, given: npt.NDArray[np.int32], max_tokens: int = 24, **fields: object) -> TokenChunk:
        (result,) = await self.run(self.request(given, max_tokens, **fields))
        return result

    async def health(self) -> EngineHealth:
        return decode(await self.actor.health(), EngineHealth)

    async def publish(self, seed: int, kv: str = "keep", transport: str = "shared_memory") -> int:
        """Bring the weights of ``seed`` to the engine, as the learner and the fleet do."""
        await self.stage(seed, transport)
        return await self.commit(seed, kv)

    async def stage(self, seed: int, transport: str = "shared_memory") -> None:
        """The first half: the weights are beside the served ones."""
        if transport not in self._senders:
            kind, _, delta = transport.partition(", ")
            self._senders[transport] = make_sender(WeightsConfig(delta=bool(delta)), kind)
        sender, version = self._senders[transport], self.version + 1
        offer = await asyncio.to_thread(sender.prepare, version, named_weights(seed), [NAME])
        async with asyncio.timeout(PATIENCE_S):
            staged, _ = await asyncio.gather(self.actor.stage(offer), asyncio.to_thread(sender.send))
        assert staged == version

    async def commit(self, seed: int, kv: str) -> int:
        """The second half, for what was staged last; returns the version."""
        version = self.version + 1
        async with asyncio.timeout(PATIENCE_S):
            assert await self.actor.commit(version, kv) == version
        self.version = version
        self.seed_of[version] = seed
        return version

    async def stage_and_commit(self, offer: bytes, version: int, kv: str) -> None:
        """Both halves of an update, of an offer that needs no sender."""
        await self.actor.stage(offer)
        await self.actor.commit(version, kv)

    @property
    def seed(self) -> int:
        """Of the weights that are served."""
        return self.seed_of[self.version]
