"""Engine actors of both roles in one process, and engines whose steps the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engine_helpers import make_engine

from experience.wire import decode
from rollout_workers.disaggregation.client import PairedEngineClient
from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.station import KvStation
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, EngineRole, GenerateRequest, KvTarget, TokenChunk

WAIT_S = 20.0


async def until(condition: Callable[[], bool], what: str) -> None:
    """Let the event loop run until ``condition`` holds."""
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what}: not within {WAIT_S:g} s"
        await asyncio.sleep(0.001)


class LocalSplit:
    """Engine actors without Ray, by name, and a client of them."""

    def __init__(self, config: EnginesConfig) -> None:
        self.config = config
        self.actors: dict[str, EngineActor] = {}
        self.client = PairedEngineClient("w", config.handoff.min_tokens, engine_timeout_s=WAIT_S)

    async def health(self, name: str) -> EngineHealth:
        return decode(await self.actors[name].health(), EngineHealth)

    async def join(self, name: str, role: EngineRole, model: Path) -> None:
        actor = self.actors[name] = EngineActor(name, self.config, role)
        await actor.load(str(model), "float32", 1, 0)
        told, address = await actor.kv_place()
        self.client.add_paired_engine(name, actor, EngineRole(told), address)

    async def everything_settled(self) -> None:
        """No hand-off is open anywhere."""
        await until(lambda: all(actor._station.open == 0 for actor in self.actors.values()), "hand-offs end")

    async def close(self) -> None:
        await self.client.close()
        for actor in self.actors.values():
            await actor.stop()


@asynccontextmanager
async def local_split(model: Path, prefill: int = 1, decode: int = 1, **settings: Any) -> AsyncIterator[LocalSplit]:
    """``p0``, ``p1``, ... prefill and ``d0``, ``d1``, ... decode."""
    defaults = {"slots": 16, "max_len": 160, "trace": False, "prefill_tokens": 32}
    config = EnginesConfig(prefill=prefill, decode=decode, **(defaults | settings))
    config.validate()
    split = LocalSplit(config)
    try:
        for index in range(prefill):
            await split.join(f"p{index}", EngineRole.PREFILL, model)
        for index in range(decode):
            await split.join(f"d{index}", EngineRole.DECODE, model)
        yield split
    finally:
        await split.close()


class SteppedEngine:
    """An engine with its station, stepped by the test only."""

    def __init__(self, handoff: HandoffConfig | None = None, **settings: Any) -> None:
        handoff = handoff or HandoffConfig(timeout_s=20.0)
        self.engine = make_engine(**({"prefill_tokens": 16, "prefill": 1, "decode": 1, "handoff": handoff} | settings))
        self.chunks: list[TokenChunk] = []
        self.wakes = 0
        self.station = KvStation(self.engine, handoff, "127.0.0.1", self.chunks.extend, self._wake)

    def _wake(self) -> None:
        self.wakes += 1

    def step(self) -> None:
        self.chunks += self.station.stepped(self.engine.step())

    def run(self, steps: int = 200) -> None:
        """Step until nothing is left to do."""
        for _ in range(steps):
            if not self.engine.has_work:
                return
            self.step()

    def computed(self, session: str) -> int:
        return self.engine.kv.computed(session)

    @property
    def ended(self) -> TokenChunk:
        """The only chunk with a finish reason."""
        (chunk,) = [chunk for chunk in self.chunks if chunk.finish_reason is not None]
        return chunk

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(chunk.tokens for chunk in self.chunks)])

    @property
    def logprobs(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *(chunk.logprobs for chunk in self.chunks)])

    @property
    def versions(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(chunk.versions for chunk in self.chunks)])

    def target(self, handoff_id: str = "h") -> KvTarget:
        """This engine as the one to send KV to."""
        return KvTarget(handoff_id=handoff_id, engine="d", address=self.station.address)


def from_source(request: GenerateRequest, first: TokenChunk, handoff_id: str = "h") -> GenerateRequest:
    """What the client sends to the decode engine after the prefill engine's chunk."""
    from msgspec.structs import replace

    from rollout_workers.continuation import remaining

    return replace(remaining(request, [first]), kv_source=handoff_id, kv_target=None)
