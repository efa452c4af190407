"""The contract of every inference engine: the embedded one, real vLLM and real SGLang run the same tests."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time

import numpy as np
import numpy.typing as npt
import pytest
from contract_engine import NAME, PATIENCE_S, Engine
from contract_model import (
    MAX_LEN,
    VOCABULARY,
    adapted_logits,
    greedy,
    logits_of,
    logprobs_of,
    make_adapter,
    make_tokenizer,
    mixed_logits,
    named_weights,
    prompt,
)
from server_helpers import until

from rollout_workers.engine_client import EngineClient
from rollout_workers.engines.protocol import EngineHealth, FinishReason, GenerateRequest, TokenChunk
from rollout_workers.errors import EngineFault
from weight_sync.transports.protocol import decode_offer
from weight_sync.transports.shared_memory import SharedMemorySender

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

TOLERANCE = 1e-3
"""Of log-probabilities."""
LONG = 480
"""Tokens of a request that should still be under way when something happens to it."""
TRIES = 8
"""How often a test tries to meet a request of a server under way: a process that is not given the cores in between hears of
its first tokens when all of them are there."""


async def test_greedy_tokens_are_the_model_s(engine: Engine) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 7, 33, 150))]
    results = await engine.run(*(engine.request(given, 24, temperature=0.0) for given in prompts))
    for given, result in zip(prompts, results, strict=True):
        assert result.tokens.tolist() == greedy(engine.seed, given, 24)
        assert result.finish_reason is FinishReason.LENGTH
        logits = logits_of(engine.seed, np.concatenate([given, result.tokens]))[len(given) - 1 : -1]
        np.testing.assert_allclose(result.logprobs, logprobs_of(logits, result.tokens), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (0.8, 0, 0.7), (0.7, 9, 0.9)]
)
async def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: Engine, temperature: float, top_k: int, top_p: float
) -> None:
    given = prompt(20, seed=int(temperature * 100) + top_k)
    draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    results = await engine.run(*(engine.request(given, 40, seed=seed, **draw) for seed in range(4)))
    for result in results:
        assert len(result.tokens) == len(result.logprobs) == len(result.versions) == 40
        logits = logits_of(engine.seed, np.concatenate([given, result.tokens]))[len(given) - 1 : -1]
        np.testing.assert_allclose(result.logprobs, logprobs_of(logits, result.tokens, **draw), atol=TOLERANCE)


async def test_the_seed_decides_what_is_sampled(engine: Engine) -> None:
    given = prompt(12, seed=40)
    first, again, other = await engine.run(*(engine.request(given, 30, seed=seed) for seed in (5, 5, 6)))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()


async def test_a_seed_means_the_same_however_its_prompt_is_computed(engine: Engine) -> None:
    """Together the prompts take several steps, and some of them are cut; alone each of them takes one."""
    prompts = [prompt(400, seed=42 + index) for index in range(8)]
    together = await engine.run(*(engine.request(given, 20, seed=index) for index, given in enumerate(prompts)))
    for index, (given, result) in enumerate(zip(prompts, together, strict=True)):
        alone = await engine.one(given, 20, seed=index)
        assert alone.tokens.tolist() == result.tokens.tolist()


async def test_samples_follow_the_model_s_probabilities(engine: Engine) -> None:
    given = prompt(9, seed=41)
    count = 160
    results = await engine.run(*(engine.request(given, 1, seed=seed) for seed in range(count)))
    likely = int(logits_of(engine.seed, given)[-1].argmax())
    expected = math.exp(float(logprobs_of(logits_of(engine.seed, given)[-1:], np.array([likely], np.int32))[0]))
    found = sum(int(result.tokens[0]) == likely for result in results) / count
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


async def test_concurrent_sessions_do_not_mix(engine: Engine) -> None:
    prompts = [prompt(10 + 7 * index, seed=50 + index) for index in range(24)]
    results = await engine.run(*(engine.request(given, 20 + index, seed=index) for index, given in enumerate(prompts)))
    for index, (given, result) in enumerate(zip(prompts, results, strict=True)):
        assert len(result.tokens) == 20 + index
        logits = logits_of(engine.seed, np.concatenate([given, result.tokens]))[len(given) - 1 : -1]
        np.testing.assert_allclose(result.logprobs, logprobs_of(logits, result.tokens), atol=TOLERANCE)


async def test_the_next_turn_of_a_session_goes_on_from_its_tokens(engine: Engine) -> None:
    given = prompt(64, seed=60)
    first = await engine.one(given, 16, seed=1, session_id="turns")
    longer = np.concatenate([given, first.tokens, prompt(8, seed=61)])
    second = await engine.one(longer, 16, temperature=0.0, session_id="turns")
    assert second.tokens.tolist() == greedy(engine.seed, longer, 16)
    assert second.cached_tokens > 0


async def test_an_abort_before_the_first_token(engine: Engine) -> None:
    doomed, other = engine.request(prompt(300, seed=70), 100), engine.request(prompt(5, seed=71), 10, temperature=0.0)
    await engine.submit(doomed, other)
    await engine.submit(aborts=(doomed.request_id,))
    began_at = time.monotonic()
    aborted, served = await engine.results(doomed, other)
    assert aborted.finish_reason is FinishReason.ABORT
    assert len(aborted.tokens) < 100
    assert time.monotonic() - began_at < 30
    assert served.tokens.tolist() == greedy(engine.seed, other.prompt, 10)


async def test_an_abort_keeps_the_tokens_so_far(engine: Engine) -> None:
    for _ in range(TRIES):
        request, parts = await begun(engine, prompt(10, seed=72))
        await engine.submit(aborts=(request.request_id,))
        async with asyncio.timeout(PATIENCE_S):
            while parts[-1].finish_reason is None:
                parts += await engine.collect()
        if parts[-1].finish_reason is not FinishReason.LENGTH:
            break
    tokens = [token for chunk in parts for token in chunk.tokens.tolist()]
    assert parts[-1].finish_reason is FinishReason.ABORT
    assert 0 < len(tokens) < LONG
    assert tokens == greedy(engine.seed, request.prompt, len(tokens))


async def begun(engine: Engine, given: npt.NDArray[np.int32]) -> tuple[GenerateRequest, list[TokenChunk]]:
    """A long request that has its first tokens, and these."""
    request = engine.request(given, LONG, temperature=0.0)
    await engine.submit(request)
    parts: list[TokenChunk] = []
    async with asyncio.timeout(PATIENCE_S):
        while not parts:
            parts += await engine.collect()
    return request, parts


@pytest.mark.parametrize("keep", ["keep_kv", "keep_requests"])
async def test_a_pause_keeps_requests_and_changes_no_token(engine: Engine, keep: str) -> None:
    given, late = prompt(15, seed=80), engine.request(prompt(6, seed=81), 8, temperature=0.0)
    for _ in range(TRIES):
        request, parts = await begun(engine, given)
        await engine.actor.pause(keep)
        try:
            assert (await engine.health()).paused
            await asyncio.sleep(0.5)  # what was on its way has arrived
            if engine.actor_has_news():
                parts += await engine.collect()
            if parts[-1].finish_reason is not None:
                continue
            await engine.submit(late)
            await asyncio.sleep(1.0)
            assert not engine.actor_has_news()
            break
        finally:
            await engine.actor.resume()
    assert sum(len(chunk.tokens) for chunk in parts) < LONG, "it always ended before the pause"
    ended: dict[str, list[TokenChunk]] = {request.request_id: parts, late.request_id: []}
    async with asyncio.timeout(PATIENCE_S):
        while not all(chunks and chunks[-1].finish_reason for chunks in ended.values()):
            for chunk in await engine.collect():
                ended[chunk.request_id].append(chunk)
    tokens = [token for chunk in parts for token in chunk.tokens.tolist()]
    assert tokens == greedy(engine.seed, given, LONG)
    assert [token for chunk in ended[late.request_id] for token in chunk.tokens.tolist()] == greedy(
        engine.seed, late.prompt, 8
    )


async def update_under_way(engine: Engine, kv: str, transport: str) -> list[tuple[GenerateRequest, TokenChunk]]:
    """Three requests that were half done when other weights came."""
    for _ in range(TRIES):
        seed = engine.seed + 1
        await engine.stage(seed, transport)
        requests = [engine.request(prompt(20 + 11 * index, seed=90 + index), 440, seed=index) for index in range(3)]
        await engine.submit(*requests)
        commits: list[asyncio.Task[int]] = []

        def commit(tokens: int, seed: int = seed, commits: list[asyncio.Task[int]] = commits) -> None:
            if tokens >= 20 and not commits:
                commits.append(asyncio.create_task(engine.commit(seed, kv)))

        results = await engine.results(*requests, during=commit)
        version = await commits[0]
        assert {len(result.tokens) for result in results} == {440}
        assert all(set(result.versions.tolist()) <= {version - 1, version} for result in results)
        if all(len(set(result.versions.tolist())) == 2 for result in results):
            return list(zip(requests, results, strict=True))
    raise AssertionError("the requests always ended before the commit")


@pytest.mark.parametrize(("kv", "transport"), [("recompute", "shared_memory"), ("recompute", "collective")])
async def test_an_update_with_recomputed_kv_stamps_what_each_version_sampled(
    engine: Engine, kv: str, transport: str
) -> None:
    for request, result in await update_under_way(engine, kv, transport):
        assert (np.diff(result.versions) >= 0).all()
        whole = np.concatenate([request.prompt, result.tokens])
        for version in set(result.versions.tolist()):
            mine = result.versions == version
            logits = logits_of(engine.seed_of[version], whole)[len(request.prompt) - 1 : -1]
            expected = logprobs_of(logits, result.tokens)
            np.testing.assert_allclose(result.logprobs[mine], expected[mine], atol=TOLERANCE)


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
async def test_an_update_with_kept_kv_stamps_what_was_drawn_from_the_mixed_cache(
    engine: Engine, transport: str
) -> None:
    for request, result in await update_under_way(engine, "keep", transport):
        seeds = [engine.seed_of[version] for version in result.versions.tolist()]
        expected = logprobs_of(mixed_logits(seeds, request.prompt, result.tokens), result.tokens)
        np.testing.assert_allclose(result.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("transport", ["shared_memory, delta", "relay, delta"])
async def test_changes_bring_an_engine_to_the_same_weights_as_whole_versions(engine: Engine, transport: str) -> None:
    """The first version whole, then one that changes nothing, then one that changes everything."""
    given, first = prompt(60, seed=130), engine.seed + 1
    for seed in (first, first, first + 1):
        await engine.publish(seed, "recompute", transport)
        result = await engine.one(given, 8, temperature=0.0)
        assert result.tokens.tolist() == greedy(seed, given, 8)
        assert set(result.versions.tolist()) == {engine.version}


@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_new_requests_find_nothing_that_older_weights_computed(engine: Engine, kv: str) -> None:
    given = prompt(160, seed=100)
    await engine.one(given, 4, temperature=0.0)
    await engine.publish(engine.seed + 1, kv)
    result = await engine.one(given, 12, temperature=0.0)
    assert result.tokens.tolist() == greedy(engine.seed, given, 12)
    logits = logits_of(engine.seed, np.concatenate([given, result.tokens]))[len(given) - 1 : -1]
    np.testing.assert_allclose(result.logprobs, logprobs_of(logits, result.tokens), atol=TOLERANCE)
    assert set(result.versions.tolist()) == {engine.version}


async def test_a_stop_string_ends_a_request_at_the_token_that_completes_it(engine: Engine) -> None:
    await telling(engine)
    given, tokenizer = prompt(14, seed=110), make_tokenizer().backend_tokenizer
    tokens = greedy(engine.seed, given, 40)
    text = tokenizer.decode(tokens[:30], skip_special_tokens=False)
    stop = next(
        text[start : start + 3] for start in range(12, len(text) - 3) if "\ufffd" not in text[start : start + 3]
    )
    end = next(n for n in range(1, 41) if stop in tokenizer.decode(tokens[:n], skip_special_tokens=False))
    stopped, other = await engine.run(
        engine.request(given, 40, temperature=0.0, stop=("never said", stop)),
        engine.request(given, 40, temperature=0.0),
    )
    assert stopped.tokens.tolist() == tokens[:end]
    assert (stopped.finish_reason, stopped.stop_match) == (FinishReason.STOP, stop)
    assert other.tokens.tolist() == tokens


async def test_a_stop_token_ends_a_request_and_is_kept(engine: Engine) -> None:
    await telling(engine)
    given = prompt(14, seed=111)
    tokens = greedy(engine.seed, given, 40)
    end = next(n for n in range(8, 40) if tokens[n] not in tokens[:n])
    result = await engine.one(given, 40, temperature=0.0, stop_token_ids=(tokens[end],))
    assert result.tokens.tolist() == tokens[: end + 1]
    assert result.finish_reason is FinishReason.STOP


async def telling(engine: Engine) -> None:
    """Bring the first weights back: with those of some versions the model says the same token for ever."""
    if engine.seed != 0:
        await engine.publish(0)


class Failing:
    """An engine's handle that fails when so many chunks have come through it."""

    def __init__(self, engine: Engine, after: int) -> None:
        self._engine = engine
        self._left = after

    async def submit(self, batch: bytes) -> bytes | None:
        return await self._engine.actor.submit(batch)

    async def collect(self, client: str) -> bytes:
        if self._left <= 0:
            raise EngineFault("lost, as the test wants it")
        self._left -= 1
        return await self._engine.actor.collect(client)


async def test_a_request_that_goes_on_elsewhere_keeps_its_budget(engine: Engine) -> None:
    given = prompt(18, seed=120)
    client = EngineClient("budget")
    client.add_engine("first", Failing(engine, after=1))
    asked_for = engine.request(given, LONG, temperature=0.0)
    asked = asyncio.create_task(client.generate(asked_for))
    async with asyncio.timeout(PATIENCE_S):
        await until(lambda: "first" not in client._router.members, "the client to lose its engine")
        await engine.actor.forget_client("budget")  # the engine is not really lost; its part of the request is
        await until(lambda: not engine.serves(asked_for.request_id), "the engine to end the request")
        client.add_engine("second", Failing(engine, after=10**9))
        result = await asked
    await client.close()
    assert client.continued == 1
    assert result.tokens.tolist() == greedy(engine.seed, given, LONG)
    assert result.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [(MAX_LEN, 10, str(MAX_LEN)), (MAX_LEN - 5, 10, str(MAX_LEN)), (2000, 10, "2000")],
)
async def test_a_context_that_is_too_long_fails_with_a_reason(
    engine: Engine, length: int, max_tokens: int, words: str
) -> None:
    bad, good = engine.request(prompt(length, seed=130), max_tokens), engine.request(prompt(5, seed=131), 6)
    failed, served = await engine.run(bad, good)
    assert failed.finish_reason is FinishReason.ERROR
    assert words in (failed.error or "")
    assert (len(failed.tokens), len(served.tokens)) == (0, 6)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": np.zeros(0, np.int32)},
        {"prompt": np.array([VOCABULARY + 9], np.int32)},
        {"top_p": 0.0},
        {"top_k": -5},
    ],
)
async def test_a_request_that_makes_no_sense_fails_with_a_reason(engine: Engine, fields: dict[str, object]) -> None:
    given = prompt(5, seed=132)
    failed, served = await engine.run(engine.request(given, 6, **fields), engine.request(given, 6))
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error
    assert len(served.tokens) == 6


async def test_more_requests_than_fit_wait_their_turn(engine: Engine) -> None:
    prompts = [prompt(100, seed=140 + index) for index in range(40)]
    results = await engine.run(*(engine.request(given, 12, temperature=0.0) for given in prompts))
    for given, result in zip(prompts, results, strict=True):
        assert result.tokens.tolist() == greedy(engine.seed, given, 12)


async def test_its_health_tells_what_it_does(engine: Engine) -> None:
    before = await engine.health()
    for _ in range(TRIES):
        requests = [engine.request(prompt(30, seed=1500 + index), 200) for index in range(4)]
        await engine.submit(*requests)
        busy: list[asyncio.Task[EngineHealth]] = []

        def look(tokens: int, busy: list[asyncio.Task[EngineHealth]] = busy) -> None:
            if not busy and tokens > 0:
                busy.append(asyncio.create_task(engine.health()))

        await engine.results(*requests, during=look)
        during, after = await busy[0], await engine.health()
        if during.running > 0:
            break
    assert during.running > 0
    assert after.version == engine.version
    assert after.generated_tokens - before.generated_tokens >= 800
    assert after.prefill_tokens - before.prefill_tokens >= 4 * 30 - 4
    assert 0 <= after.kv_used <= 1
    assert not after.paused
    assert await engine.actor.node()
    assert await engine.actor.first_token_at() is not None


async def test_an_adapter_is_merged_into_the_weights_that_the_engine_was_started_with(engine: Engine) -> None:
    """Version after version, whatever was served in between; the adapter alone is sent."""
    before = engine.seed
    sender = SharedMemorySender()
    for seed in (1, 2):
        adapter = make_adapter(seed)
        offer = sender.prepare(engine.version + 1, adapter, [NAME])
        assert len(decode_offer(offer).manifest.tensors) == len(adapter)
        await engine.stage_and_commit(offer, engine.version + 1, "recompute")
        engine.version += 1
        given = prompt(20, seed=180 + seed)
        result = await engine.one(given, 24, seed=seed)
        tokens, first = np.concatenate([given, result.tokens]), len(given) - 1
        expected = logprobs_of(adapted_logits(adapter, tokens)[first:-1], result.tokens)
        np.testing.assert_allclose(result.logprobs, expected, atol=TOLERANCE)
        assert np.abs(expected - logprobs_of(logits_of(0, tokens)[first:-1], result.tokens)).max() > 0.1
        assert set(result.versions.tolist()) == {engine.version}
    sender.close()
    await engine.publish(before, "recompute")


async def test_weights_of_another_model_are_refused_and_the_old_ones_served(engine: Engine) -> None:
    sender = SharedMemorySender()
    named = [(name, tensor[:-1] if "lm_head" in name else tensor) for name, tensor in named_weights(0)]
    offer = sender.prepare(engine.version + 1, named, [NAME])
    with pytest.raises(Exception, match=r"lm_head\.weight"):
        await engine.stage_and_commit(offer, engine.version + 1, "keep")
    sender.close()
    given = prompt(11, seed=160)
    result = await engine.one(given, 10, temperature=0.0)
    assert result.tokens.tolist() == greedy(engine.seed, given, 10)
    assert set(result.versions.tolist()) == {engine.version}


async def test_z_a_killed_server_is_noticed(engine: Engine) -> None:
    """The last test of an engine: it is gone after it."""
    if engine.kind == "torch":
        pytest.skip("the embedded engine has no server; what happens when its actor dies is tested with the fleet")
    request = engine.request(prompt(10, seed=170), 480)
    await engine.submit(request)
    pid = await engine.actor.server_pid()  # type: ignore[union-attr]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(EngineFault, match="killed by signal SIGKILL"):
        await asyncio.wait_for(engine.actor.alive(), 10)
    assert time.monotonic() - killed_at < 5
    with pytest.raises(EngineFault):
        await engine.submit(engine.request(prompt(10, seed=171)))
