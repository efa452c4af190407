"""The asyncio front: concurrent requests, updates in flight, failures."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from engine_helpers import Result, make_engine, make_model, prompt, reference_logprobs, request, run_all

from rollout_workers.engines.protocol import (
    FinishReason,
    GenerateRequest,
    InferenceEngine,
    KvPolicy,
    PauseMode,
    TokenChunk,
    WeightUpdate,
)
from rollout_workers.engines.torch_engine import AsyncTorchEngine, EngineFailedError

LIMIT_S = 30.0


async def collect(engine: InferenceEngine, wanted: GenerateRequest) -> Result:
    async with asyncio.timeout(LIMIT_S):
        return Result([chunk async for chunk in engine.generate(wanted)])


async def test_concurrent_requests_get_their_own_tokens() -> None:
    engine = AsyncTorchEngine(make_engine(slots=8))
    requests = [request(f"r{i}", prompt=prompt(3 + i, i), max_tokens=5 + i, seed=i) for i in range(20)]
    results = await asyncio.gather(*(collect(engine, each) for each in requests))
    expected = run_all(make_engine(slots=8), *requests)
    for each, result in zip(requests, results, strict=True):
        assert result.tokens.tolist() == expected[each.request_id].tokens.tolist()
    await engine.close()


async def test_a_commit_lands_in_the_middle_of_requests() -> None:
    old, new = make_model(seed=0), make_model(seed=1)
    engine = AsyncTorchEngine(make_engine(old, stream_every=4))
    await engine.stage(1, new.named_parameters())
    committed = asyncio.Event()

    async def follow(wanted: GenerateRequest) -> Result:
        chunks = []
        async for chunk in engine.generate(wanted):
            chunks.append(chunk)
            if not committed.is_set():
                committed.set()
                assert await engine.apply(WeightUpdate(version=1, kv=KvPolicy.RECOMPUTE)) == 1
        return Result(chunks)

    requests = [request(f"r{i}", prompt=prompt(6, i), max_tokens=30) for i in range(6)]
    async with asyncio.timeout(LIMIT_S):
        results = await asyncio.gather(*(follow(each) for each in requests))
    for each, result in zip(requests, results, strict=True):
        assert set(result.versions.tolist()) == {0, 1}
        for version, weights in enumerate((old, new)):
            of_version = result.versions == version
            expected = reference_logprobs(weights, each.prompt, result.tokens)
            np.testing.assert_allclose(result.logprobs[of_version], expected[of_version], atol=1e-4)
    assert (await engine.health()).version == 1
    assert (await engine.health()).stall_s > 0
    await engine.close()


async def test_batches_are_delivered_once_a_step() -> None:
    batches: list[list[TokenChunk]] = []
    done = asyncio.Event()

    def deliver(chunks: list[TokenChunk]) -> None:
        batches.append(chunks)
        if sum(chunk.finish_reason is not None for batch in batches for chunk in batch) == 6:
            done.set()

    engine = AsyncTorchEngine(make_engine(), deliver)
    engine.submit_many([request(f"r{i}", max_tokens=5) for i in range(5)] + [request("bad", max_tokens=0)])
    await asyncio.wait_for(done.wait(), LIMIT_S)
    assert [len(batch) for batch in batches] == [1, 5] or [len(batch) for batch in batches] == [6]
    await engine.close()


async def test_leaving_early_aborts_the_request() -> None:
    engine = AsyncTorchEngine(make_engine(stream_every=1))
    stream = engine.generate(request(max_tokens=100))
    assert (await anext(stream)).finish_reason is None
    await stream.aclose()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="already in flight"):
        await collect(engine, request())
    again = await collect(engine, request("again", session_id="session of r"))
    assert len(again.tokens) == 8
    assert (await engine.health()).running == 0
    await engine.close()


async def test_pause_abort_and_resume() -> None:
    engine = AsyncTorchEngine(make_engine(stream_every=1))
    first = engine.generate(request("a", max_tokens=100))
    assert len((await anext(first)).tokens) == 1
    await engine.pause(PauseMode.KEEP_REQUESTS)
    before = (await engine.health()).generated_tokens
    for _ in range(20):
        await asyncio.sleep(0)
    assert (await engine.health()).generated_tokens == before
    await engine.resume()
    second = asyncio.create_task(collect(engine, request("b", max_tokens=10)))
    assert len((await second).tokens) == 10
    await engine.abort("a")
    async with asyncio.timeout(LIMIT_S):
        reasons = [chunk.finish_reason async for chunk in first]
    assert reasons[-1] is FinishReason.ABORT
    await engine.release("session of a")
    assert (await engine.health()).sessions == 1
    await engine.close()


async def test_closing_ends_what_is_in_flight() -> None:
    engine = AsyncTorchEngine(make_engine())
    running = asyncio.create_task(collect(engine, request(max_tokens=120)))
    for _ in range(5):
        await asyncio.sleep(0)
    await engine.close()
    result = await running
    assert result.last.finish_reason is FinishReason.ABORT


async def test_a_failing_step_reaches_everyone_who_waits() -> None:
    core = make_engine()
    engine = AsyncTorchEngine(core)
    running = asyncio.create_task(collect(engine, request(max_tokens=120)))
    for _ in range(5):
        await asyncio.sleep(0)
    core.table.tokens = core.table.tokens[:0]
    with pytest.raises(EngineFailedError, match="the engine failed: IndexError"):
        await running
    with pytest.raises(EngineFailedError):
        await engine.health()
    with pytest.raises(EngineFailedError):
        await collect(engine, request("later"))
