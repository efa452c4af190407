"""Prefill and decode on two engines: the same tokens as on one, whatever happens on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from engine_helpers import Result, prompt, request, run_all
from split_engines import LocalSplit, local_split, until

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.torch_engine import TorchEngine, build_engine

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""KV of the tiny model: layers, keys and values, heads, head size, bytes of a number."""

KINDS = {
    "greedy": {"temperature": 0.0},
    "plain": {"seed": 11},
    "filtered": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5},
}


def whole(model: Path, **settings: object) -> TorchEngine:
    """One engine that does both phases, set up as the two are."""
    defaults: dict[str, object] = {"slots": 16, "max_len": 160, "trace": False, "prefill_tokens": 32}
    return build_engine(EnginesConfig(**(defaults | settings)), model, "float32", 1)  # type: ignore[arg-type]


def assert_same(split: TokenChunk, unsplit: Result, exact: bool = False) -> None:
    assert split.tokens.tolist() == unsplit.tokens.tolist()
    assert split.versions.tolist() == unsplit.versions.tolist()
    assert split.finish_reason == unsplit.last.finish_reason
    if exact:
        assert split.logprobs.tobytes() == unsplit.logprobs.tobytes()
    else:
        np.testing.assert_allclose(split.logprobs, unsplit.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["auto", "ring", "tcp"])
async def test_tokens_and_logprobs_are_those_of_one_engine_bit_for_bit(
    split_model: Path, kind: str, transport: str
) -> None:
    asked = request("r", prompt=prompt(100), max_tokens=40, **KINDS[kind])
    wanted = run_all(whole(split_model), asked)["r"]
    async with local_split(split_model, handoff=HandoffConfig(transport=transport, piece_kb=4)) as split:
        got = await split.client.generate(asked)
        assert_same(got, wanted, exact=True)
        assert split.client.handed_over == 1
        prefill, decode = await split.health("p0"), await split.health("d0")
        assert (prefill.generated_tokens, decode.generated_tokens) == (1, 39)
        assert (prefill.prefill_tokens, decode.prefill_tokens) == (100, 0)
        assert prefill.kv_sent_mb == decode.kv_received_mb == 100 * TOKEN_BYTES / 2**20
        assert decode.cached_tokens == 0  # what was handed over was not found in the cache


async def test_many_sessions_of_several_turns_at_once(split_model: Path) -> None:
    unsplit = whole(split_model)

    async def episode(split: LocalSplit, number: int) -> list[TokenChunk]:
        context, answers = prompt(40 + number, seed=number), []
        for turn in range(3):
            asked = request(f"{number}.{turn}", session_id=f"s{number}", prompt=context, max_tokens=6, seed=number)
            answers.append(await split.client.generate(asked))
            context = np.concatenate([context, answers[-1].tokens, prompt(12 + number, seed=turn)])
        return answers

    async with local_split(split_model, 2, 2, handoff=HandoffConfig(min_tokens=8)) as split:
        got = await asyncio.gather(*(episode(split, number) for number in range(12)))
        for number in range(12):
            split.client.release(f"s{number}")
        await split.everything_settled()
        assert split.client.failed == {}
        assert split.client.handed_over > 12  # later turns, too
    for number, answers in enumerate(got):
        context = prompt(40 + number, seed=number)
        for turn, answer in enumerate(answers):
            asked = request(f"{number}.{turn}", session_id=f"s{number}", prompt=context, max_tokens=6, seed=number)
            assert_same(answer, run_all(unsplit, asked)[f"{number}.{turn}"])
            context = np.concatenate([context, answer.tokens, prompt(12 + number, seed=turn)])


async def test_a_groups_prompt_is_computed_and_handed_over_once(split_model: Path) -> None:
    context = prompt(100)
    asked = [request(f"r{n}", prompt=context, max_tokens=20, seed=n, prefix_group="g") for n in range(4)]
    unsplit = run_all(whole(split_model), *asked)
    async with local_split(split_model) as split:
        got = await asyncio.gather(*(split.client.generate(each) for each in asked))
        for each, answer in zip(asked, got, strict=True):
            assert_same(answer, unsplit[each.request_id])
        assert (await split.health("p0")).prefill_tokens < 2 * len(context)
        assert (await split.health("d0")).kv_received_mb < 2 * len(context) * TOKEN_BYTES / 2**20


@pytest.mark.parametrize("gone", [0, 1])
async def test_a_group_goes_on_when_one_of_it_ends_during_its_hand_off(split_model: Path, gone: int) -> None:
    """Siblings wait for the one that sends their common prompt, and must not wait for one that is gone."""
    context = prompt(120)
    asked = [request(f"r{n}", prompt=context, max_tokens=8, seed=n, prefix_group="g") for n in range(4)]
    unsplit = run_all(whole(split_model), *asked)
    async with local_split(split_model, prefill_tokens=16) as split:
        running = [asyncio.create_task(split.client.generate(each)) for each in asked]
        prefill = split.actors["p0"]._engine
        await until(lambda: prefill.health().prefill_tokens > 0, "the prompt is begun")
        running[gone].cancel()
        got = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), timeout=30)
        assert isinstance(got[gone], asyncio.CancelledError)
        for each, answer in zip(asked, got, strict=True):
            if isinstance(answer, TokenChunk):
                assert_same(answer, unsplit[each.request_id])
        assert sum(isinstance(answer, TokenChunk) for answer in got) == len(asked) - 1
        await split.everything_settled()


async def test_what_prefill_ends_needs_no_decode_engine(split_model: Path) -> None:
    asked = request("r", prompt=prompt(60), max_tokens=4, temperature=0.0)
    first = int(run_all(whole(split_model), asked)["r"].tokens[0])
    async with local_split(split_model) as split:
        one = await split.client.generate(msgspec.structs.replace(asked, max_tokens=1))
        assert (one.tokens.tolist(), one.finish_reason) == ([first], FinishReason.LENGTH)
        stopped = await split.client.generate(
            msgspec.structs.replace(asked, request_id="s", session_id="other", stop_token_ids=(first,))
        )
        assert (stopped.tokens.tolist(), stopped.finish_reason) == ([first], FinishReason.STOP)
        await split.everything_settled()
        assert split.client.handed_over == 0
        assert (await split.health("d0")).kv_received_mb > 0  # for the sessions' next turns


async def test_a_stop_string_may_begin_in_the_token_of_the_prefill_engine(split_model: Path) -> None:
    asked = request("r", prompt=prompt(60), max_tokens=30, temperature=0.0)
    engine = whole(split_model)
    tokens = run_all(engine, asked)["r"].tokens
    words = [f"w{token}" for token in tokens[:2]]
    assert min(tokens[:2]) > 1
    asked = msgspec.structs.replace(asked, stop=("".join(words),))
    async with local_split(split_model) as split:
        got = await split.client.generate(asked)
        assert (got.tokens.tolist(), got.finish_reason) == (tokens[:2].tolist(), FinishReason.STOP)
        assert got.stop_match == "".join(words)
        assert split.client.handed_over == 1


async def test_a_cancelled_request_leaves_nothing_behind(split_model: Path) -> None:
    async with local_split(split_model) as split:
        calls = [
            asyncio.create_task(split.client.generate(request(f"r{number}", prompt=prompt(100), max_tokens=50)))
            for number in range(8)
        ]
        for number, call in enumerate(calls):
            await asyncio.sleep(0.002 * number)
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for number in range(8):
            split.client.release(f"session of r{number}")
        await split.everything_settled()
        again = await split.client.generate(request("again", prompt=prompt(100), max_tokens=4, seed=3))
        assert len(again.tokens) == 4
        split.client.release("session of again")
        for name in ("p0", "d0"):
            engine = split.actors[name]._engine
            await until(lambda engine=engine: engine.health().sessions == 0, f"{name} is empty")  # type: ignore[misc]


async def test_kv_that_finds_no_free_slot_is_parked_until_its_request_gets_one(split_model: Path) -> None:
    asked = [request(f"r{n}", prompt=prompt(60 + n, seed=n), max_tokens=30, seed=n) for n in range(6)]
    unsplit = run_all(whole(split_model), *asked)
    async with local_split(split_model, slots=2, park_mb=4) as split:
        got = await asyncio.gather(*(split.client.generate(each) for each in asked))
        for each, answer in zip(asked, got, strict=True):
            assert_same(answer, unsplit[each.request_id])
        assert (await split.health("d0")).park_hits > 0


async def test_requests_too_long_for_an_engine_are_refused_with_words(split_model: Path) -> None:
    async with local_split(split_model) as split:
        chunk = await split.client.generate(request("r", prompt=prompt(150), max_tokens=50))
        assert chunk.finish_reason is FinishReason.ERROR
        assert "exceed engines.max_len=160" in str(chunk.error)
        await split.everything_settled()


async def test_pinned_versions_are_handed_over_too(split_model: Path) -> None:
    asked: GenerateRequest = request("r", prompt=prompt(80), max_tokens=10, seed=2)
    wanted = run_all(whole(split_model), asked)["r"]
    async with local_split(split_model) as split:
        for actor in split.actors.values():
            await actor.pin(0)
        got = await split.client.generate(msgspec.structs.replace(asked, pinned_version=0))
        assert_same(got, wanted)
        assert split.client.handed_over == 1
