"""Engines of both roles in processes of their own, killed while they hand over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import prompt, request, run_all
from split_engines import until

from rollout_workers.disaggregation.client import PairedEngineClient
from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.engine_client import RayEngineHandle
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.engines.torch_engine import build_engine

SETTINGS: dict[str, Any] = {"slots": 24, "max_len": 512, "trace": False, "prefill_tokens": 32, "stream_every": 4}
CONFIG = EnginesConfig(prefill=2, decode=2, handoff=HandoffConfig(ring_mb=1, piece_kb=16), **SETTINGS)


class Processes:
    """Two prefill and two decode engines, each a Ray actor, and a client of them."""

    def __init__(self) -> None:
        self.client = PairedEngineClient("w", CONFIG.handoff.min_tokens, engine_timeout_s=60)
        self.handles: dict[str, Any] = {}

    async def start(self, model: Path) -> None:
        import ray

        kind = ray.remote(EngineActor)
        for index in range(CONFIG.count):
            role = CONFIG.role_of(index)
            name = f"{role.value}-{index}"
            actor = kind.options(num_cpus=0, max_concurrency=100, max_restarts=0).remote(name, CONFIG, role)
            self.handles[name] = actor
        for name, actor in self.handles.items():
            await actor.load.remote(str(model), "float32", 1, 0)
            told, address = await actor.kv_place.remote()
            self.client.add_paired_engine(name, RayEngineHandle(actor), EngineRole(told), address)

    async def kill_9(self, name: str) -> None:
        os.kill(await self.handles[name].__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)


@pytest.fixture
async def processes(ray_local: None, split_model: Path) -> AsyncIterator[Processes]:
    import ray

    started = Processes()
    await started.start(split_model)
    yield started
    await started.client.close()
    for actor in started.handles.values():
        ray.kill(actor)


async def test_kill_9_of_an_engine_of_either_role_loses_nothing_and_changes_no_token(
    processes: Processes, split_model: Path
) -> None:
    asked = [request(f"r{n}", prompt=prompt(300 + n, seed=n), max_tokens=40, seed=n) for n in range(40)]
    client = processes.client
    calls = [asyncio.create_task(client.generate(each)) for each in asked]
    await until(lambda: client.handed_over >= 2, "hand-offs complete")
    assert not any(call.done() for call in calls[-4:])
    await processes.kill_9("prefill-0")
    await until(lambda: "prefill-0" not in client.serving, "the client notices")
    done = client.handed_over
    await until(lambda: client.handed_over >= done + 2, "hand-offs go on")
    await processes.kill_9("decode-2")
    await until(lambda: "decode-2" not in client.serving, "the client notices")
    async with asyncio.timeout(120):
        got = await asyncio.gather(*calls)
    assert client.continued > 0
    unsplit = run_all(build_engine(EnginesConfig(**SETTINGS), split_model, "float32", 1), *asked)
    different = [
        each.request_id
        for each, answer in zip(asked, got, strict=True)
        if answer.tokens.tolist() != unsplit[each.request_id].tokens.tolist()
    ]
    assert different == []
    assert client.in_flight == 0
