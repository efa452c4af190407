"""The engine's log-probabilities are those of a plain forward pass, whatever else shares the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from engine_helpers import (
    ARCHITECTURES,
    Result,
    drain,
    make_engine,
    make_model,
    prompt,
    reference_logits,
    reference_logprobs,
    request,
    run_all,
)
from transformers import DynamicCache, PreTrainedModel

from rollout_workers.engines.protocol import KvPolicy

TOLERANCE = 1e-4


def ragged_requests(count: int, **fields: object) -> list:  # type: ignore[type-arg]
    rng = np.random.default_rng(1)
    return [
        request(
            f"r{i}", prompt=prompt(int(rng.integers(1, 60)), i), max_tokens=int(rng.integers(1, 60)), seed=i, **fields
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_ragged_batches_match_a_plain_forward(name: str) -> None:
    model = make_model(name)
    requests = ragged_requests(24)
    results = run_all(make_engine(model, slots=8, prefill_tokens=48, trace=True), *requests)
    for each in requests:
        result = results[each.request_id]
        assert len(result.tokens) == each.max_tokens
        expected = reference_logprobs(model, each.prompt, result.tokens)
        np.testing.assert_allclose(result.logprobs, expected, atol=TOLERANCE)


def test_moving_slots_changes_no_result() -> None:
    """Long requests in high slots move down when the short ones below them end, in the middle of their tokens."""
    model = make_model()
    requests = [request(f"r{i}", prompt=prompt(4 + i, i), max_tokens=5 if i < 12 else 60, seed=i) for i in range(16)]
    engine = make_engine(model, trace=True)
    for each in requests:
        engine.submit(each)
    engine.step()
    before = {name: engine.table.slot_of[f"session of {name}"] for name in ("r13", "r14")}
    results = drain(engine)
    assert all(engine.table.slot_of[f"session of {name}"] < slot for name, slot in before.items())
    for each in requests:
        tokens = results[each.request_id].tokens
        expected = reference_logprobs(model, each.prompt, tokens)
        np.testing.assert_allclose(results[each.request_id].logprobs, expected, atol=TOLERANCE)
    again = run_all(engine, request("again", session_id="session of r14", prompt=np.append(requests[14].prompt, 9)))
    assert again["again"].chunks[0].cached_tokens == len(requests[14].prompt)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_traced_and_untraced_forward_passes_give_the_same_bits(name: str) -> None:
    engines = [make_engine(make_model(name), trace=trace, prefill_tokens=32) for trace in (True, False)]
    assert [engine.traced for engine in engines] == [True, False]
    for engine in engines:
        engine.stage(1, make_model(name, seed=1).named_parameters())
        engine.commit(1)
    traced, untraced = (run_all(engine, *ragged_requests(20)) for engine in engines)
    for each, result in traced.items():
        assert result.tokens.tobytes() == untraced[each].tokens.tobytes()
        assert result.logprobs.tobytes() == untraced[each].logprobs.tobytes()


def test_half_precision_stays_close_to_a_plain_forward() -> None:
    model = make_model().to(torch.bfloat16)
    requests = ragged_requests(8)
    results = run_all(make_engine(model), *requests)
    gaps = [
        np.abs(
            results[r.request_id].logprobs - reference_logprobs(model, r.prompt, results[r.request_id].tokens)
        ).mean()
        for r in requests
    ]
    assert np.mean(gaps) < 0.05


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.7), (0.8, 9, 0.9)]
)
def test_logprobs_are_of_the_distribution_sampled_from(temperature: float, top_k: int, top_p: float) -> None:
    model = make_model()
    requests = ragged_requests(6, temperature=temperature, top_k=top_k, top_p=top_p)
    results = run_all(make_engine(model), *requests, request("plain", seed=3))
    for each in requests:
        tokens = results[each.request_id].tokens
        logits = reference_logits(model, np.concatenate([each.prompt, tokens]))[len(each.prompt) - 1 : -1]
        expected = [
            filtered_logprob(row / temperature, int(token), top_k, top_p)
            for row, token in zip(logits, tokens, strict=True)
        ]
        np.testing.assert_allclose(results[each.request_id].logprobs, expected, atol=TOLERANCE)
    plain = reference_logprobs(model, prompt(5), results["plain"].tokens)
    np.testing.assert_allclose(results["plain"].logprobs, plain, atol=TOLERANCE)


def filtered_logprob(logits: torch.Tensor, token: int, top_k: int, top_p: float) -> float:
    """Straight from the definition, for one row."""
    order = logits.argsort(descending=True)[: top_k or None].tolist()
    probabilities = logits[order].softmax(0)
    kept, mass = [], 0.0
    for candidate, probability in zip(order, probabilities.tolist(), strict=True):
        kept.append(candidate)
        mass += probability
        if mass >= top_p:
            break
    return float(logits[token] - logits[kept].logsumexp(0))


def test_a_greedy_token_is_the_argmax_with_its_logprob_at_temperature_one() -> None:
    model = make_model()
    result = run_all(make_engine(model), request(max_tokens=20, temperature=0.0, top_k=1, top_p=0.1))["r"]
    logits = reference_logits(model, np.concatenate([prompt(5), result.tokens]))[4:-1]
    assert result.tokens.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(result.logprobs, logits.log_softmax(-1).max(-1).values.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("policy", [KvPolicy.RECOMPUTE, KvPolicy.AUTO])
def test_after_an_update_with_recomputed_kv_each_token_is_of_its_own_version(policy: KvPolicy) -> None:
    old, new = make_model(seed=0), make_model(seed=1)
    requests = ragged_requests(12)
    engine = make_engine(old, stream_every=1000, trace=True)
    results = update_after(engine, new, 15, policy, requests)
    seen = set()
    for each in requests:
        result = results[each.request_id]
        for version, weights in enumerate((old, new)):
            of_version = result.versions == version
            expected = reference_logprobs(weights, each.prompt, result.tokens)
            np.testing.assert_allclose(result.logprobs[of_version], expected[of_version], atol=TOLERANCE)
        seen.add(len(set(result.versions.tolist())))
        assert (np.diff(result.versions) >= 0).all()
    assert 2 in seen
    assert engine.health().recomputed_tokens > 0


def test_after_an_update_with_kept_kv_tokens_match_a_forward_over_the_mixed_cache() -> None:
    old, new = make_model(seed=0), make_model(seed=1)
    requests = ragged_requests(12)
    engine = make_engine(old, stream_every=1000, trace=True)
    results = update_after(engine, new, 15, KvPolicy.KEEP, requests)
    crossed = 0
    for each in requests:
        result = results[each.request_id]
        before = int((result.versions == 0).sum())
        expected = mixed_cache_logprobs(old, new, each.prompt, result.tokens, before)
        np.testing.assert_allclose(result.logprobs, expected, atol=TOLERANCE)
        crossed += 0 < before < len(result.tokens)
    assert crossed > 3
    assert engine.health().recomputed_tokens == 0


def update_after(engine, new: PreTrainedModel, steps: int, policy: KvPolicy, requests: list) -> dict:  # type: ignore
    """Run with an update to version 1 after some steps."""
    chunks: dict = {}  # type: ignore[type-arg]
    for each in requests:
        engine.submit(each)
    for _ in range(steps):
        for chunk in engine.step():
            chunks.setdefault(chunk.request_id, []).append(chunk)
    engine.stage(1, new.named_parameters())
    assert engine.commit(1, policy) == 1
    for name, result in drain(engine).items():
        chunks.setdefault(name, []).extend(result.chunks)
    return {name: Result(parts) for name, parts in chunks.items()}


def mixed_cache_logprobs(
    old: PreTrainedModel, new: PreTrainedModel, given: np.ndarray, sampled: np.ndarray, before: int
) -> np.ndarray:
    """The first ``before`` tokens are sampled by ``old``; ``new`` goes on over the cache that ``old`` left."""
    if before in (0, len(sampled)):
        return reference_logprobs(old if before else new, given, sampled)
    tokens = torch.from_numpy(np.concatenate([given, sampled]).astype(np.int64))[None]
    split = len(given) + before - 1
    cache = DynamicCache()
    with torch.no_grad():
        first = old(tokens[:, :split], past_key_values=cache, use_cache=True).logits[0]
        second = new(tokens[:, split:], past_key_values=cache, use_cache=True).logits[0]
    logits = torch.cat([first, second])[len(given) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, len(given) :, None])[:, 0].numpy()


def test_chunked_prefill_equals_one_shot() -> None:
    model = make_model()
    requests = ragged_requests(10)
    whole = run_all(make_engine(model, prefill_tokens=4096), *requests)
    pieces = run_all(make_engine(model, prefill_tokens=7), *requests)
    for each in requests:
        assert whole[each.request_id].tokens.tolist() == pieces[each.request_id].tokens.tolist()
        np.testing.assert_allclose(whole[each.request_id].logprobs, pieces[each.request_id].logprobs, atol=TOLERANCE)


def test_the_same_calls_give_the_same_bits() -> None:
    runs = [run_all(make_engine(slots=6, prefill_tokens=32, trace=True), *ragged_requests(20)) for _ in range(2)]
    assert runs[0].keys() == runs[1].keys()
    for name, result in runs[0].items():
        assert result.tokens.tobytes() == runs[1][name].tokens.tobytes()
        assert result.logprobs.tobytes() == runs[1][name].logprobs.tobytes()


def test_a_request_does_not_depend_on_its_batch_mates() -> None:
    requests = ragged_requests(16)
    together = run_all(make_engine(), *requests)
    for each in requests[:5]:
        alone = run_all(make_engine(), each)[each.request_id]
        assert alone.tokens.tolist() == together[each.request_id].tokens.tolist()


def test_a_request_that_goes_on_elsewhere_goes_on_as_it_would_have_here() -> None:
    whole = run_all(make_engine(), request(max_tokens=30, seed=5))["r"]
    rest = request(prompt=np.concatenate([prompt(5), whole.tokens[:11]]), max_tokens=19, seed=5)
    assert run_all(make_engine(), rest)["r"].tokens.tolist() == whole.tokens[11:].tolist()


def test_sampling_follows_the_model_s_distribution() -> None:
    model = make_model()
    requests = [request(f"r{seed}", max_tokens=1, seed=seed) for seed in range(4000)]
    results = run_all(make_engine(model, slots=256), *requests)
    counts = np.bincount([int(result.tokens[0]) for result in results.values()], minlength=96)
    expected = reference_logits(model, prompt(5))[-1].softmax(-1).numpy() * 4000
    common = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[common].sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_the_engine_does_not_change_the_model_it_was_copied_from(model: PreTrainedModel) -> None:
    before = copy.deepcopy(model.state_dict())
    engine = make_engine(model)
    engine.stage(1, make_model(seed=1).named_parameters())
    engine.commit(1)
    run_all(engine, request())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_ragged_batches_match_a_plain_forward_on_a_gpu() -> None:
    model = make_model().cuda()
    requests = ragged_requests(24)
    results = run_all(make_engine(model, slots=8, prefill_tokens=48, device="cuda"), *requests)
    for each in requests:
        result = results[each.request_id]
        expected = reference_logprobs(model.cpu(), each.prompt, result.tokens)
        np.testing.assert_allclose(result.logprobs, expected, atol=TOLERANCE)
