"""Synthetic engines of which one prefills for the other: requests are handed over in modelled time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from split_engines import LocalSplit

from orchestrator.recipes.synthetic import build
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineRole, FinishReason, GenerateRequest, KvTarget, TokenChunk
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.engine import SyntheticEngine
from rollout_workers.engines.synthetic.sending import Sending
from rollout_workers.engines.synthetic.weights import STAMP, VersionedWeights, Vocabulary, read_weights

COST = CostModel(
    prefill_rate=1000.0,
    decode_peak=100.0,
    half_concurrency=4.0,
    slots=8,
    kv_tokens=1000,
    update_pause_s=0.0,
    stage_s=0.0,
    kv_token_s=0.0005,
)


def make_engine() -> SyntheticEngine:
    return SyntheticEngine(COST, 1, 600, Vocabulary(7, 68), VersionedWeights({STAMP: np.zeros(1)}, 0), 0.0)


def request(name: str, prompt: int, session: str = "s", **more: object) -> GenerateRequest:
    ids = np.arange(prompt, dtype=np.int32) % 50
    return GenerateRequest(request_id=name, session_id=session, prompt=ids, max_tokens=20, **more)  # type: ignore[arg-type]


TARGET = KvTarget(handoff_id="h", engine="decode", address="")


def changed_cost(cost: CostModel, **changed: float) -> CostModel:
    """The same cost model with some figures changed."""
    return dataclasses.replace(cost, **changed)  # type: ignore[arg-type]


def step(engine: SyntheticEngine) -> tuple[float, list[TokenChunk]]:
    """Live to the next chunks."""
    while True:
        at = engine.next_event()
        assert at is not None, "nothing is left to happen"
        if chunks := engine.advance(at):
            return at, chunks


def test_a_prompt_is_handed_over_when_its_kv_has_arrived() -> None:
    prefill, decode = make_engine(), make_engine()
    asked = request("r", 200)
    prefill.submit(msgspec.structs.replace(asked, kv_target=TARGET), 0.0)
    at, (chunk,) = step(prefill)
    assert at == pytest.approx(0.2 + 200 * 0.0005)
    assert (chunk.finish_reason, len(chunk.tokens), chunk.error) == (FinishReason.HANDED_OVER, 0, None)
    assert prefill.requests == 0
    decode.submit(msgspec.structs.replace(asked, kv_source="h"), at)
    ended, (chunk,) = step(decode)
    assert ended == pytest.approx(at + 20 / 20)
    assert (chunk.finish_reason, len(chunk.tokens)) == (FinishReason.LENGTH, 20)
    assert (prefill.health(ended).prefill_tokens, decode.health(ended).prefill_tokens) == (200, 0)
    assert prefill.health(ended).generated_tokens == 0


def test_only_what_was_not_sent_before_is_sent_again() -> None:
    engine = make_engine()
    engine.submit(request("turn1", 200, kv_target=TARGET), 0.0)
    step(engine)
    engine.submit(request("turn2", 260, kv_target=TARGET), 1.0)
    at, _ = step(engine)
    assert at == pytest.approx(1.0 + 0.06 + 60 * 0.0005)
    assert engine.sending.tokens == 260
    engine.release("s", 2.0)
    engine.submit(request("again", 260, kv_target=TARGET), 3.0)
    at, _ = step(engine)
    assert at == pytest.approx(3.0 + 0.26 + 260 * 0.0005)


def test_pieces_leave_while_the_prompt_is_computed_and_one_prompt_after_the_other() -> None:
    pieces = Sending(changed_cost(COST, prefill_chunk=50.0), 1)
    pieces.computed("a", "a", "d", prompt=200, cached=0, accelerator=0, now=0.2)
    assert pieces.next_event() == pytest.approx(0.2 + 50 * 0.0005)
    slow = Sending(changed_cost(COST, prefill_chunk=50.0, kv_token_s=0.002), 1)
    slow.computed("a", "a", "d", prompt=200, cached=0, accelerator=0, now=0.2)
    slow.computed("b", "b", "d", prompt=100, cached=0, accelerator=0, now=0.3)
    assert slow.next_event() == pytest.approx(200 * 0.002)
    assert slow.arrived(0.5) == ["a"]
    assert slow.next_event() == pytest.approx(0.4 + 100 * 0.002)


def test_an_abort_ends_a_hand_over_wherever_it_is() -> None:
    engine = make_engine()
    engine.submit(request("computing", 200, kv_target=TARGET), 0.0)
    engine.abort("computing", 0.1)
    (chunk,) = engine.advance(0.1)
    assert (chunk.request_id, chunk.finish_reason) == ("computing", FinishReason.ABORT)
    engine.submit(request("moving", 300, "t", kv_target=TARGET), 0.1)
    assert engine.advance(0.45) == []
    engine.abort("moving", 0.45)
    (chunk,) = engine.advance(0.45)
    assert (chunk.request_id, chunk.finish_reason) == ("moving", FinishReason.ABORT)
    assert engine.next_event() is None
    assert engine.requests == 0


async def test_clients_pair_modelled_engines_and_hear_when_their_kv_is_gone(tmp_path: Path) -> None:
    build(tmp_path)
    synthetic = SyntheticEngineConfig(accelerators=1, time_scale=1000.0, token_scale=1.0)
    config = EnginesConfig(kind="synthetic", max_len=400, prefill=1, decode=1, synthetic=synthetic)
    split = LocalSplit(config)
    await split.join("p", EngineRole.PREFILL, tmp_path)
    await split.join("d", EngineRole.DECODE, tmp_path)
    for name in "ab":
        answer = await split.client.generate(request(f"{name}1", 200, name))
        assert len(answer.tokens) == 20
    assert split.client.handed_over == 2
    prefill, decode = await split.health("p"), await split.health("d")
    assert (prefill.prefill_tokens, prefill.generated_tokens) == (400, 0)
    assert (decode.prefill_tokens, decode.generated_tokens) == (0, 40)
    assert (prefill.role, decode.role) == (EngineRole.PREFILL, EngineRole.DECODE)
    await split.client.generate(request("a2", 225, "a"))
    assert split.client.handed_over == 2, "a few new tokens stay where the session's KV is"
    for actor in split.actors.values():
        actor._engine.stage_begin(1)
        for name, tensor in (read_weights(tmp_path) | {STAMP: np.array([1.0])}).items():
            actor._engine.stage_tensor(name, tensor)
        actor._engine.stage_end()
        await actor.commit(1, "recompute")
    await split.client.generate(request("a3", 250, "a"))  # with its answer the client hears of the commit
    await split.client.generate(request("b2", 225, "b"))
    assert split.client.handed_over == 3, "nothing of the session is anywhere, so its context is a prompt again"
    await split.client.close()
    for actor in split.actors.values():
        await actor.stop()
