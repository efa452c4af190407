"""How requests end, how they are refused, and what pausing and aborting do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_helpers import (
    VOCABULARY,
    drain,
    make_engine,
    make_model,
    make_tokenizer,
    prompt,
    reference_logprobs,
    request,
    run_all,
)

from rollout_workers.engines.protocol import FinishReason, KvPolicy, PauseMode


def sampled(**fields: object) -> np.ndarray:
    return run_all(make_engine(), request(max_tokens=40, **fields))["r"].tokens


def test_max_tokens_ends_a_request() -> None:
    result = run_all(make_engine(), request(max_tokens=7))["r"]
    assert (len(result.tokens), result.last.finish_reason) == (7, FinishReason.LENGTH)


def test_a_stop_token_ends_a_request_and_is_kept() -> None:
    tokens = sampled()
    position = int(np.flatnonzero(tokens == tokens[9])[0])
    result = run_all(make_engine(), request(max_tokens=40, stop_token_ids=(5000, int(tokens[9]))))["r"]
    assert result.tokens.tolist() == tokens[: position + 1].tolist()
    assert result.last.finish_reason is FinishReason.STOP


def test_the_model_s_end_token_ends_a_request() -> None:
    tokens = sampled()
    model = make_model()
    model.generation_config.eos_token_id = [VOCABULARY + 5, int(tokens[6])]
    result = run_all(make_engine(model), request(max_tokens=40))["r"]
    assert result.last.finish_reason is FinishReason.STOP
    assert result.tokens[-1] == tokens[6]
    assert len(result.tokens) <= 7


def test_a_stop_string_ends_a_request_at_the_token_that_completes_it() -> None:
    tokens = sampled()
    stop = f"w{tokens[4]}w{tokens[5]}w{str(tokens[6])[0]}"
    result = run_all(make_engine(), request(max_tokens=40, stop=("never", stop)), request("other", max_tokens=40))
    assert result["r"].tokens.tolist() == tokens[:7].tolist()
    assert result["r"].last.stop_match == stop
    assert result["r"].last.finish_reason is FinishReason.STOP
    assert len(result["other"].tokens) == 40


def test_of_two_stop_strings_the_earlier_in_the_text_is_named() -> None:
    tokens = sampled()
    end = next(i for i in range(1, 40) if tokens[i] not in tokens[:i])
    short, long = f"w{tokens[end]}", f"w{tokens[end - 1]}w{tokens[end]}"
    result = run_all(make_engine(), request(max_tokens=40, stop=(short, long)))["r"]
    assert len(result.tokens) == end + 1
    assert result.last.stop_match == long


def test_stop_strings_do_not_match_the_prompt() -> None:
    text = make_tokenizer().decode(prompt(5).tolist())
    result = run_all(make_engine(), request(stop=(text[-3:] + "w",), max_tokens=1))["r"]
    assert result.last.finish_reason is FinishReason.LENGTH


def test_tokens_are_reported_at_least_every_so_many() -> None:
    result = run_all(make_engine(stream_every=6), request(max_tokens=20))["r"]
    assert [len(chunk.tokens) for chunk in result.chunks] == [6, 6, 6, 2]
    assert [chunk.finish_reason for chunk in result.chunks] == [None, None, None, FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": prompt(100), "max_tokens": 29}, "exceed engines.max_len=128"),
        ({"prompt": prompt(0)}, "prompt is empty"),
        ({"prompt": np.array([3, VOCABULARY], np.int32)}, "outside 0..95"),
        ({"prompt": np.array([-1], np.int32)}, "outside 0..95"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"pinned_version": 4}, "version 4 is not pinned"),
    ],
)
def test_a_request_that_cannot_be_served_ends_with_an_error(fields: dict[str, object], says: str) -> None:
    engine = make_engine()
    result = run_all(engine, request("bad", **fields), request("good"))
    assert result["bad"].last.finish_reason is FinishReason.ERROR
    assert says in (result["bad"].last.error or "")
    assert len(result["bad"].tokens) == 0
    assert len(result["good"].tokens) == 8


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    engine = make_engine()
    engine._stops.tokenizer = None
    assert "need a tokenizer" in (run_all(engine, request(stop=("x",)))["r"].last.error or "")


def test_a_request_id_in_flight_is_refused() -> None:
    engine = make_engine()
    engine.submit(request())
    with pytest.raises(ValueError, match="already in flight"):
        engine.submit(request(session_id="another"))


def test_an_abort_before_the_first_token_yields_none() -> None:
    engine = make_engine(slots=1)
    engine.submit(request("first"))
    engine.submit(request("second"))
    engine.abort("first")
    engine.step()
    engine.abort("nobody")
    results = {chunk.request_id: chunk for chunk in engine.step()} | {
        name: result.last for name, result in drain(engine).items()
    }
    assert results["second"].finish_reason is FinishReason.LENGTH
    engine.submit(request("third"))
    engine.submit(request("fourth"))
    engine.step()
    engine.abort("fourth")
    (aborted,) = [chunk for chunk in engine.step() if chunk.request_id == "fourth"]
    assert (aborted.finish_reason, len(aborted.tokens)) == (FinishReason.ABORT, 0)


def test_an_abort_in_the_middle_returns_every_token_and_keeps_the_session() -> None:
    whole = sampled(seed=3)
    engine = make_engine()
    engine.submit(request(max_tokens=40, seed=3))
    for _ in range(10):
        engine.step()
    engine.abort("r")
    (chunk,) = engine.step()
    assert chunk.finish_reason is FinishReason.ABORT
    assert chunk.tokens.tolist() == whole[:10].tolist()
    rest = request(
        "rest", session_id="session of r", prompt=np.concatenate([prompt(5), whole[:10]]), max_tokens=30, seed=3
    )
    result = run_all(engine, rest)["rest"]
    assert result.tokens.tolist() == whole[10:].tolist()
    assert result.chunks[0].cached_tokens == 14


@pytest.mark.parametrize("keep", [PauseMode.KEEP_KV, PauseMode.KEEP_REQUESTS])
def test_requests_survive_a_pause(keep: PauseMode) -> None:
    whole = sampled()
    engine = make_engine()
    engine.submit(request(max_tokens=40))
    for _ in range(10):
        engine.step()
    engine.pause(keep)
    assert not engine.has_work
    assert engine.step() == []
    assert engine.health().paused
    engine.resume()
    assert drain(engine)["r"].tokens.tolist() == whole.tolist()
    assert engine.health().recomputed_tokens == (0 if keep is PauseMode.KEEP_KV else 14)


def test_a_pause_that_aborts_ends_running_and_waiting_requests() -> None:
    engine = make_engine(slots=1)
    engine.submit(request("running", max_tokens=40))
    engine.submit(request("waiting", max_tokens=40))
    for _ in range(3):
        engine.step()
    engine.pause(PauseMode.ABORT)
    chunks = {chunk.request_id: chunk for chunk in engine.step()}
    assert {name: len(chunk.tokens) for name, chunk in chunks.items()} == {"running": 3, "waiting": 0}
    assert {chunk.finish_reason for chunk in chunks.values()} == {FinishReason.ABORT}
    engine.submit(request("later"))
    assert engine.step() == []
    engine.resume()
    assert len(drain(engine)["later"].tokens) == 8


def test_a_pinned_version_is_served_exactly_while_updates_go_on() -> None:
    models = [make_model(seed=seed) for seed in range(3)]
    engine = make_engine(models[0], trace=True)
    engine.pin(0)
    for each in range(6):
        engine.submit(request(f"pinned{each}", prompt=prompt(9, each), max_tokens=30, pinned_version=0))
        engine.submit(request(f"served{each}", prompt=prompt(9, each), max_tokens=30))
    chunks = []
    for version in (1, 2):
        for _ in range(12):
            chunks += engine.step()
        engine.stage(version, models[version].named_parameters())
        engine.commit(version)
    with pytest.raises(ValueError, match="in use by 6 requests"):
        engine.unpin(0)
    results = drain(engine)
    for each in range(6):
        parts = [c for c in chunks if c.request_id == f"pinned{each}"] + results[f"pinned{each}"].chunks
        tokens = np.concatenate([part.tokens for part in parts])
        logprobs = np.concatenate([part.logprobs for part in parts])
        assert {int(v) for part in parts for v in part.versions} == {0}
        np.testing.assert_allclose(logprobs, reference_logprobs(models[0], prompt(9, each), tokens), atol=1e-4)
        assert {0, 1, 2} >= set(results[f"served{each}"].versions.tolist()) > set()
        assert results[f"served{each}"].versions[-1] == 2
    engine.unpin(0)
    assert run_all(engine, request("late", pinned_version=0))["late"].last.finish_reason is FinishReason.ERROR


def test_pinned_and_served_turns_of_a_session_do_not_share_kv() -> None:
    engine = make_engine()
    engine.pin(0)
    run_all(engine, request("a", session_id="s", pinned_version=0))
    assert run_all(engine, request("b", session_id="s"))["b"].chunks[0].cached_tokens == 0


def test_weights_that_are_not_numbers_end_requests_with_an_error_and_spoil_nothing_later() -> None:
    model = make_model()
    engine = make_engine(model, slots=2)
    broken = {name: tensor * torch.nan for name, tensor in model.named_parameters()}
    engine.stage(1, broken.items())
    engine.commit(1)
    results = run_all(engine, request("a"), request("b"))
    assert all("not finite" in (result.last.error or "") for result in results.values())
    engine.stage(2, model.named_parameters())
    engine.commit(2, KvPolicy.KEEP)
    fresh = request("c", prompt=prompt(3))
    same_session = request("d", session_id="session of b")
    results = run_all(engine, same_session, fresh)
    for each in (fresh, same_session):
        result = results[each.request_id]
        assert len(result.tokens) == 8
        assert result.chunks[0].cached_tokens == 0
        np.testing.assert_allclose(result.logprobs, reference_logprobs(model, each.prompt, result.tokens), atol=1e-4)


def test_health_counts_what_was_done() -> None:
    engine = make_engine(slots=4)
    run_all(engine, request("a", prompt=prompt(10), max_tokens=5), request("b", prompt=prompt(6), max_tokens=3))
    health = engine.health()
    assert (health.generated_tokens, health.prefill_tokens, health.sessions) == (8, 16, 2)
    assert health.kv_used == pytest.approx((14 + 8) / (4 * 128))
    assert health.busy_s == pytest.approx(health.prefill_s + health.decode_s)
    assert health.busy_s > 0
