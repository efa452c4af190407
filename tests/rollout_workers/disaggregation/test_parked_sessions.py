"""Sessions that have to leave their slot while they wait for a tool, and come back."""

from __future__ import annotations

import numpy as np
import pytest
from engine_helpers import make_engine, make_model, prompt, reference_logprobs, request, run_all

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy, PauseMode
from rollout_workers.engines.torch_engine import TorchEngine

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


def turn(session: str, number: int, tokens: np.ndarray, **fields: object) -> GenerateRequest:
    return request(f"{session}.{number}", session_id=session, prompt=tokens, **fields)


def first_turns(engine: TorchEngine, sessions: str, length: int = 30) -> dict[str, np.ndarray]:
    """One turn each, one after another; returns the contexts of the next turns."""
    contexts = {}
    for index, session in enumerate(sessions):
        tokens = prompt(length, seed=index)
        answer = run_all(engine, turn(session, 0, tokens, seed=index))[f"{session}.0"]
        contexts[session] = np.concatenate([tokens, answer.tokens, prompt(6, seed=90 + index)])
    return contexts


def test_a_session_comes_back_to_what_it_had_computed() -> None:
    parked, roomy, model = make_engine(slots=2, park_mb=1), make_engine(slots=16), make_model()
    contexts = first_turns(parked, "abcde")
    first_turns(roomy, "abcde")
    assert parked.health().parked_sessions == 3
    for session, context in contexts.items():
        asked = turn(session, 1, context, seed=7)
        got, wanted = (run_all(engine, asked)[f"{session}.1"] for engine in (parked, roomy))
        assert got.tokens.tolist() == wanted.tokens.tolist()
        assert got.chunks[0].cached_tokens == wanted.chunks[0].cached_tokens == 37
        np.testing.assert_allclose(got.logprobs, reference_logprobs(model, context, got.tokens), atol=1e-4)
    health = parked.health()
    assert (health.park_hits, health.parks, health.park_evictions) == (5, 8, 0)
    assert health.evicted_sessions == 8
    assert health.prefill_tokens == roomy.health().prefill_tokens


def test_the_budget_holds_and_the_session_parked_longest_ago_is_dropped() -> None:
    engine = make_engine(slots=1, park_mb=1)
    engine.kv.park.budget = 2 * 37 * TOKEN_BYTES
    contexts = first_turns(engine, "abcd")
    health = engine.health()
    assert (health.parks, health.park_evictions, health.parked_sessions) == (3, 1, 2)
    assert health.parked_mb == 2 * 37 * TOKEN_BYTES / 2**20
    assert run_all(engine, turn("b", 1, contexts["b"]))["b.1"].chunks[0].cached_tokens == 37
    assert run_all(engine, turn("a", 1, contexts["a"]))["a.1"].chunks[0].cached_tokens == 0


def test_without_a_budget_nothing_is_parked() -> None:
    engine = make_engine(slots=1)
    contexts = first_turns(engine, "ab")
    assert run_all(engine, turn("a", 1, contexts["a"]))["a.1"].chunks[0].cached_tokens == 0
    health = engine.health()
    assert (health.parks, health.park_hits, health.parked_mb) == (0, 0, 0.0)


def test_release_frees_the_park_too() -> None:
    engine = make_engine(slots=1, park_mb=1)
    first_turns(engine, "ab")
    engine.release("a")
    engine.release("b")
    health = engine.health()
    assert (health.parked_sessions, health.parked_mb, health.sessions) == (0, 0.0, 0)


@pytest.mark.parametrize(
    ("policy", "length", "stays"),
    [
        (KvPolicy.KEEP, 30, True),
        (KvPolicy.RECOMPUTE, 30, False),
        (KvPolicy.AUTO, 30, True),
        (KvPolicy.AUTO, 1, False),
    ],
)
def test_a_weight_update_does_with_parked_kv_what_its_policy_does_with_idle_sessions(
    policy: KvPolicy, length: int, stays: bool
) -> None:
    engine = make_engine(slots=1, park_mb=1)
    contexts = first_turns(engine, "ab", length)
    engine.stage(1, make_model(seed=1).named_parameters())
    engine.commit(1, policy)
    idle = engine.kv.computed("b") > 0
    assert (engine.health().parked_sessions == 1) is idle is stays
    again = run_all(engine, turn("a", 1, contexts["a"]))["a.1"]
    assert again.versions.tolist() == [1] * 8
    if not stays:
        expected = reference_logprobs(make_model(seed=1), contexts["a"], again.tokens)
        np.testing.assert_allclose(again.logprobs, expected, atol=1e-4)


def test_a_pause_that_drops_kv_drops_what_is_parked() -> None:
    engine = make_engine(slots=1, park_mb=1)
    first_turns(engine, "ab")
    engine.pause(PauseMode.KEEP_REQUESTS)
    assert engine.health().parked_sessions == 0


def test_parked_kv_of_a_pinned_version_survives_updates() -> None:
    engine = make_engine(slots=1, park_mb=1)
    engine.pin(0)
    tokens = prompt(30)
    answer = run_all(engine, turn("a", 0, tokens, pinned_version=0))["a.0"]
    run_all(engine, turn("b", 0, prompt(10)))
    engine.stage(1, make_model(seed=1).named_parameters())
    engine.commit(1, KvPolicy.RECOMPUTE)
    context = np.concatenate([tokens, answer.tokens])
    again = run_all(engine, turn("a", 1, context, pinned_version=0))["a.1"]
    assert again.versions.tolist() == [0] * 8
    assert again.chunks[0].cached_tokens == 37
