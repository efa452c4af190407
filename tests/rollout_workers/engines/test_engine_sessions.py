"""Sessions keep their KV between turns; slots are shared fairly."""

from __future__ import annotations

import numpy as np
import pytest
from engine_helpers import (
    drain,
    make_engine,
    make_model,
    prompt,
    reference_logprobs,
    request,
    run_all,
)

from rollout_workers.engines.protocol import FinishReason, KvPolicy


def turn(session: str, number: int, tokens: np.ndarray, **fields: object):  # type: ignore[no-untyped-def]
    return request(f"{session}.{number}", session_id=session, prompt=tokens, **fields)


def test_the_next_turn_computes_only_what_is_new() -> None:
    model = make_model()
    engine = make_engine(model)
    first = run_all(engine, turn("a", 0, prompt(20)))["a.0"]
    context = np.concatenate([prompt(20), first.tokens, prompt(6, seed=9)])
    second = run_all(engine, turn("a", 1, context))["a.1"]
    assert first.chunks[0].cached_tokens == 0
    assert second.chunks[0].cached_tokens == 27  # all but the last sampled token, which was never fed
    assert engine.health().prefill_tokens == 20 + 7
    np.testing.assert_allclose(second.logprobs, reference_logprobs(model, context, second.tokens), atol=1e-4)


def test_a_rewritten_history_reuses_only_the_common_prefix() -> None:
    model = make_model()
    engine = make_engine(model)
    run_all(engine, turn("a", 0, prompt(20)))
    rewritten = prompt(20).copy()
    rewritten[8] = 2 + (rewritten[8] - 1) % 90
    second = run_all(engine, turn("a", 1, rewritten))["a.1"]
    assert second.chunks[0].cached_tokens == 8
    np.testing.assert_allclose(second.logprobs, reference_logprobs(model, rewritten, second.tokens), atol=1e-4)


def test_the_same_prompt_again_computes_one_token() -> None:
    engine = make_engine()
    first = run_all(engine, turn("a", 0, prompt(20)))["a.0"]
    again = run_all(engine, turn("a", 1, prompt(20)))["a.1"]
    assert again.chunks[0].cached_tokens == 19
    assert again.tokens.tolist() == first.tokens.tolist()


def test_cached_tokens_are_reported_once() -> None:
    engine = make_engine(stream_every=2)
    run_all(engine, turn("a", 0, prompt(20)))
    chunks = run_all(engine, turn("a", 1, prompt(20)))["a.1"].chunks
    assert [chunk.cached_tokens for chunk in chunks] == [19, 0, 0, 0]
    assert engine.health().cached_tokens == 19


def test_the_session_unused_longest_is_evicted_first() -> None:
    engine = make_engine(slots=3)
    for session in "abc":
        run_all(engine, turn(session, 0, prompt(10)))
    run_all(engine, turn("a", 1, prompt(10)))
    run_all(engine, turn("d", 0, prompt(10)))
    assert engine.health().evicted_sessions == 1
    assert sorted(engine.table.slot_of) == ["a", "c", "d"]
    assert run_all(engine, turn("b", 1, prompt(10)))["b.1"].chunks[0].cached_tokens == 0


def test_a_session_whose_next_turn_waits_is_evicted_last() -> None:
    engine = make_engine(slots=2)
    run_all(engine, turn("a", 0, prompt(10)), turn("b", 0, prompt(10)))
    results = run_all(engine, turn("c", 0, prompt(10)), turn("a", 1, prompt(10)))
    assert results["a.1"].chunks[0].cached_tokens == 9
    assert "b" not in engine.table.slot_of


def test_requests_wait_for_a_slot_in_order() -> None:
    engine = make_engine(slots=2)
    names = [f"r{number}" for number in range(6)]
    for name in names:
        engine.submit(request(name, max_tokens=4))
    engine.step()
    assert (engine.health().running, engine.health().waiting) == (2, 4)
    assert list(drain(engine)) == names


def test_release_frees_the_slot() -> None:
    engine = make_engine(slots=1)
    run_all(engine, turn("a", 0, prompt(10)))
    engine.release("a")
    engine.release("never seen")
    assert engine.health().sessions == 0
    run_all(engine, turn("b", 0, prompt(10)))
    assert engine.health().evicted_sessions == 0


def test_release_aborts_a_request_in_flight() -> None:
    engine = make_engine()
    engine.submit(turn("a", 0, prompt(10), max_tokens=50))
    for _ in range(4):
        engine.step()
    engine.release("a")
    (chunk,) = engine.step()
    assert (chunk.finish_reason, len(chunk.tokens)) == (FinishReason.ABORT, 4)
    assert engine.health().sessions == 0
    assert not engine.has_work


def test_a_session_has_one_request_at_a_time() -> None:
    engine = make_engine()
    engine.submit(turn("a", 0, prompt(5)))
    engine.submit(turn("a", 1, prompt(5)))
    results = drain(engine)
    assert results["a.0"].last.finish_reason is FinishReason.LENGTH
    assert results["a.1"].last.finish_reason is FinishReason.ERROR
    assert "one at a time" in (results["a.1"].last.error or "")


@pytest.mark.parametrize(("policy", "cached"), [(KvPolicy.KEEP, 19), (KvPolicy.RECOMPUTE, 0)])
def test_an_update_between_turns_follows_the_kv_policy(policy: KvPolicy, cached: int) -> None:
    new = make_model(seed=1)
    engine = make_engine()
    run_all(engine, turn("a", 0, prompt(20)))
    engine.stage(1, new.named_parameters())
    engine.commit(1, policy)
    result = run_all(engine, turn("a", 1, prompt(20)))["a.1"]
    assert result.chunks[0].cached_tokens == cached
    assert set(result.versions.tolist()) == {1}
    if policy is KvPolicy.RECOMPUTE:
        np.testing.assert_allclose(result.logprobs, reference_logprobs(new, prompt(20), result.tokens), atol=1e-4)
