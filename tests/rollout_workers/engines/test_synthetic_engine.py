"""The synthetic engine: several accelerators, exact versions, pinned versions, and its actor in real time without torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experience.wire import decode, encode
from orchestrator.recipes.synthetic import build, vocabulary
from rollout_workers.engine_client import SubmitBatch
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, FinishReason, GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.engine import SyntheticEngine
from rollout_workers.engines.synthetic.weights import (
    STAMP,
    SyntheticModelError,
    VersionedWeights,
    Vocabulary,
    read_vocabulary,
    read_weights,
)

REPOSITORY = Path(__file__).resolve().parents[3]

COST = CostModel(
    prefill_rate=1e9, decode_peak=100.0, half_concurrency=4.0, slots=8, kv_tokens=1000, update_pause_s=0.0, stage_s=0.0
)


def make_engine(accelerators: int = 2, max_len: int = 200) -> SyntheticEngine:
    weights = VersionedWeights({STAMP: np.zeros(1)}, 0)
    return SyntheticEngine(COST, accelerators, max_len, Vocabulary(7, 68), weights, 0.0)


def request(name: str, prompt: int = 10, max_tokens: int = 20, **more: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        session_id=f"session of {name}",
        prompt=np.arange(7, 7 + prompt, dtype=np.int32),
        max_tokens=max_tokens,
        **more,  # type: ignore[arg-type]
    )


def stage(engine: SyntheticEngine, version: int) -> None:
    engine.weights.begin(version)
    engine.weights.take(STAMP, np.array([float(version)]))
    engine.weights.end()


def drain(engine: SyntheticEngine) -> list[TokenChunk]:
    chunks = []
    while (at := engine.next_event()) is not None:
        chunks += engine.advance(at)
    return chunks


def test_two_sessions_run_side_by_side_on_two_accelerators() -> None:
    engine = make_engine()
    for name in "ab":
        engine.submit(request(name), 0.0)
    assert engine.advance(0.99) == []
    chunks = engine.advance(1.01)
    assert {chunk.request_id for chunk in chunks} == {"a", "b"}
    assert all(chunk.finish_reason is FinishReason.LENGTH and len(chunk.tokens) == 20 for chunk in chunks)
    assert engine.requests == 0


def test_tokens_are_words_of_the_vocabulary_with_their_logprob_and_versions_of_the_weights() -> None:
    engine = make_engine()
    engine.submit(request("a", seed=3), 0.0)
    stage(engine, 1)
    engine.advance(0.5)
    engine.commit(1, KvPolicy.KEEP, 0.5)
    (chunk,) = drain(engine)
    assert chunk.versions.tolist() == [0] * 10 + [1] * 10
    assert chunk.tokens.min() >= 7
    assert chunk.tokens.max() < 68
    assert np.exp(chunk.logprobs) * 61 == pytest.approx(np.ones(20))
    assert chunk.tokens.dtype == np.int32
    assert (chunk.logprobs.dtype, chunk.versions.dtype) == (np.float32, np.int32)


def test_what_another_engine_continues_is_what_this_one_would_have_made() -> None:
    whole, other = make_engine(), make_engine()
    whole.submit(request("a", prompt=10, max_tokens=20, seed=9), 0.0)
    (expected,) = drain(whole)
    other.submit(request("a", prompt=15, max_tokens=15, seed=9), 0.0)
    (rest,) = drain(other)
    assert rest.tokens.tolist() == expected.tokens[5:].tolist()


def test_an_abort_gives_the_tokens_there_are_and_a_release_the_room() -> None:
    engine = make_engine(accelerators=1)
    engine.submit(request("a", max_tokens=20), 0.0)
    engine.abort("a", 0.5)
    engine.abort("a", 0.5)
    (chunk,) = engine.advance(0.5)
    assert chunk.finish_reason is FinishReason.ABORT
    assert len(chunk.tokens) == 10
    assert engine.health(0.5).kv_used > 0
    engine.release("session of a", 0.6)
    assert engine.health(0.6).kv_used == 0


def test_a_pinned_version_is_served_beside_the_newest() -> None:
    engine = make_engine()
    engine.weights.pin(0)
    stage(engine, 1)
    engine.commit(1, KvPolicy.KEEP, 0.1)
    engine.submit(request("old", pinned_version=0), 0.2)
    engine.submit(request("new"), 0.2)
    engine.submit(request("unknown", pinned_version=5), 0.2)
    with pytest.raises(ValueError, match="in use by 1"):
        engine.unpin(0)
    chunks = {chunk.request_id: chunk for chunk in drain(engine)}
    assert set(chunks["old"].versions) == {0}
    assert set(chunks["new"].versions) == {1}
    assert chunks["unknown"].finish_reason is FinishReason.ERROR
    assert "version 5 is not pinned" in (chunks["unknown"].error or "")
    engine.unpin(0)
    assert engine.weights.pinned == set()


def test_what_does_not_fit_is_refused_or_cut() -> None:
    engine = make_engine(max_len=30)
    engine.submit(request("long", prompt=30), 0.0)
    engine.submit(request("cut", prompt=20, max_tokens=50), 0.0)
    chunks = {chunk.request_id: chunk for chunk in drain(engine)}
    assert "engines.max_len is 30" in (chunks["long"].error or "")
    assert len(chunks["cut"].tokens) == 10


def test_weights_of_another_version_than_offered_are_noticed() -> None:
    weights = VersionedWeights({STAMP: np.zeros(1), "w": np.zeros((2, 3))}, 0)
    weights.begin(4)
    with pytest.raises(SyntheticModelError, match="not one of the model's"):
        weights.take("w", np.zeros((3, 2)))
    weights.take("w", np.ones((2, 3)))
    with pytest.raises(SyntheticModelError, match="tensors missing"):
        weights.end()
    weights.take(STAMP, np.array([3.0]))
    with pytest.raises(SyntheticModelError, match="offered as version 4 are those of version 3"):
        weights.end()
    with pytest.raises(SyntheticModelError, match="cannot commit version 4"):
        weights.commit(4)


def test_another_model_is_no_synthetic_one(tmp_path: Path) -> None:
    build(tmp_path)
    assert read_vocabulary(tmp_path) == Vocabulary(7, len(vocabulary()))
    assert read_weights(tmp_path)[STAMP].tolist() == [0.0]
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 5}')
    with pytest.raises(SyntheticModelError, match=r"type 'qwen3'.*model.recipe=synthetic"):
        read_vocabulary(tmp_path)


async def test_the_actor_answers_in_modelled_time_and_sleeps_in_between(tmp_path: Path) -> None:
    build(tmp_path)
    synthetic = SyntheticEngineConfig(accelerators=2, decode_tokens_per_s=660.0, half_concurrency=2.0, time_scale=1.0)
    synthetic.token_scale = 1.0
    actor = EngineActor("engine-0.0", EnginesConfig(kind="synthetic", max_len=100, synthetic=synthetic))
    await actor.load(str(tmp_path), "float32", 1, 0)
    steps = 0
    step = actor._engine.step

    def counted() -> list[TokenChunk]:
        nonlocal steps
        steps += 1
        chunks: list[TokenChunk] = step()
        return chunks

    actor._engine.step = counted
    requests = [request("a", max_tokens=44), request("b", max_tokens=66)]
    began_at = asyncio.get_running_loop().time()
    await actor.submit(encode(SubmitBatch(client="c", requests=requests, releases=[], aborts=[])))
    chunks: list[TokenChunk] = []
    while len(chunks) < 2:
        chunks += decode(await actor.collect("c"), list[TokenChunk])
    took = asyncio.get_running_loop().time() - began_at
    assert [chunk.request_id for chunk in chunks] == ["a", "b"]
    assert 0.3 <= took < 30.0
    assert steps < 20
    health = decode(await actor.health(), EngineHealth)
    assert health.generated_tokens == 110
    assert health.decode_s == pytest.approx(0.5, rel=0.01)
    await actor.stop()


def test_the_engine_process_needs_no_torch(tmp_path: Path) -> None:
    build(tmp_path)
    code = (
        "import sys; from pathlib import Path; from rollout_workers.engines.config import EnginesConfig\n"
        "import rollout_workers.engines.actor; from rollout_workers.engines.synthetic.driver import build_driver\n"
        f"driver = build_driver(EnginesConfig(kind='synthetic'), Path({str(tmp_path)!r}), 0)\n"
        "driver.make_receiver('engine'); assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=REPOSITORY)
