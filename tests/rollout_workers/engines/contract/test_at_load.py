"""Updates one after another while an engine is busy (before the rest of the contract, which ends with its death)."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from contract_engine import Engine
from contract_model import greedy, prompt

from rollout_workers.engines.protocol import FinishReason, TokenChunk

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

UPDATES = 50
IN_FLIGHT = 8
POLICIES = ("keep", "recompute", "auto")


async def client(engine: Engine, number: int, over: asyncio.Event) -> list[tuple[int, TokenChunk]]:
    """One request after another until the updates are over; what was asked for, and what came of it."""
    served = []
    name = f"client-{number}"
    while not over.is_set():
        length = 60 + 30 * ((number + len(served)) % 5)
        request = engine.request(prompt(10 + 3 * number, seed=200 + len(served)), length, seed=number)
        await engine.submit(request, client=name)
        (result,) = await engine.results(request, client=name)
        served.append((length, result))
    return served


async def test_fifty_updates_under_load_abort_nothing_and_lose_no_token(engine: Engine) -> None:
    first, over = engine.version, asyncio.Event()
    clients = [asyncio.create_task(client(engine, number, over)) for number in range(IN_FLIGHT)]
    transports = ("shared_memory", "collective")
    try:
        for update in range(UPDATES):
            await engine.publish(update % 3, POLICIES[update % len(POLICIES)], transports[update % len(transports)])
    finally:
        over.set()
    served = [each for results in await asyncio.gather(*clients) for each in results]
    assert engine.version == first + UPDATES
    assert len(served) >= IN_FLIGHT
    for length, result in served:
        assert (result.finish_reason, result.error) == (FinishReason.LENGTH, None)
        assert len(result.tokens) == len(result.logprobs) == len(result.versions) == length
        assert np.isfinite(result.logprobs).all()
        assert (np.diff(result.versions) >= 0).all()
    seen = {int(version) for _, result in served for version in result.versions}
    assert len(seen) > UPDATES / 2
    assert any(len(set(result.versions.tolist())) > 2 for _, result in served), "no request lived through two updates"
    given = prompt(40, seed=300)
    assert (await engine.one(given, 12, temperature=0.0)).tokens.tolist() == greedy(engine.seed, given, 12)
