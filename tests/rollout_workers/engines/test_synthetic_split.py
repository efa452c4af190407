"""Synthetic engines of which one prefills for the other: requests are handed over in modelled time."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvTarget, TokenChunk
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.engine import SyntheticEngine
from rollout_workers.engines.synthetic.sending import Sending
from rollout_workers.engines.synthetic.weights import STAMP, VersionedWeights, Vocabulary

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
