"""Many updates while requests are in flight: none is aborted, none loses a token, every token is stamped."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from contract_engine import PATIENCE_S, Engine
from contract_model import prompt

from rollout_workers.engines.protocol import FinishReason, TokenChunk

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

UPDATES = 50
AT_ONCE = 8
LENGTH = 120


async def test_fifty_updates_under_load_abort_nothing_and_lose_no_token(engine: Engine) -> None:
    """Eight requests are always in flight; a new one takes the place of each that ends, until all updates are done."""
    first, lengths = engine.version, dict[str, int]()
    ended: list[TokenChunk] = []

    async def load(updates: asyncio.Task[None]) -> None:
        parts: dict[str, list[TokenChunk]] = {}
        while not updates.done() or parts:
            while not updates.done() and len(parts) < AT_ONCE:
                request = engine.request(prompt(12, seed=len(lengths)), LENGTH, seed=len(lengths))
                lengths[request.request_id] = LENGTH
                parts[request.request_id] = []
                await engine.submit(request)
            for chunk in await engine.collect():
                parts[chunk.request_id].append(chunk)
                if chunk.finish_reason is not None:
                    mine = parts.pop(chunk.request_id)
                    assert np.isfinite(np.concatenate([part.logprobs for part in mine])).all()
                    versions = np.concatenate([part.versions for part in mine])
                    assert (np.diff(versions) >= 0).all()
                    assert sum(len(part.tokens) for part in mine) == len(versions) == lengths[chunk.request_id]
                    ended.append(chunk)

    async def update() -> None:
        for number in range(UPDATES):
            await engine.publish(number % 2, "keep" if number % 3 else "recompute")

    async with asyncio.timeout(4 * PATIENCE_S):
        updates = asyncio.create_task(update())
        await load(updates)
        await updates
    assert engine.version == first + UPDATES
    assert len(ended) == len(lengths) >= AT_ONCE
    assert {chunk.finish_reason for chunk in ended} == {FinishReason.LENGTH}
