"""What the plugin puts in place of SGLang's sampling. That SGLang calls it is shown with the real server (contract)."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout_workers.engines.torch_engine.uniforms import uniforms as embedded_uniforms
from weight_sync.engine_plugin.sglang_sampling import FILTERED, PLAIN, draw, install, keep, uniforms

ROWS, VOCABULARY = 6, 50


def probabilities(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def modules() -> tuple[Any, Any]:
    """With the names of SGLang's; its own functions say that they were called."""

    class Info:
        def __init__(self, rows: int, seeds: torch.Tensor | None) -> None:
            self.temperatures, self.sampling_seed = torch.ones(rows, 1), seeds

        @classmethod
        def from_schedule_batch(cls, batch: Any, vocab_size: int) -> Info:
            return cls(len(batch.reqs), batch.seeds)

    sampler, batches = ModuleType("sampler"), ModuleType("batches")
    setattr(sampler, PLAIN, lambda *arguments: ("plain", arguments))
    setattr(sampler, FILTERED, lambda *arguments, **named: ("filtered", arguments, named))
    batches.SamplingBatchInfo = Info  # type: ignore[attr-defined]
    install(sampler, batches)
    return sampler, batches


def test_random_numbers_are_those_of_the_embedded_engine() -> None:
    seeds = np.array([0, 1, 2**31 - 1, 77, 77], np.uint64)
    positions = np.array([0, 5, 123_456, 7, 8], np.int64)
    found = uniforms(torch.from_numpy(seeds.astype(np.int64)), torch.from_numpy(positions))
    np.testing.assert_array_equal(found.numpy(), embedded_uniforms(seeds, positions))


def test_draws_follow_the_weights_and_never_take_what_has_none() -> None:
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(40_000, 5)
    numbers = uniforms(torch.arange(40_000), torch.zeros(40_000, dtype=torch.int64))
    counts = draw(weights, numbers).bincount(minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(int(counts[1]) / 40_000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 40_000)
    ends = torch.tensor([0.0, 1 - 2.0**-52])
    assert draw(weights[:2], ends.to(torch.float64)).tolist() == [1, 3]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (2**20, 0.7), (9, 0.6), (1, 0.3), (2**20, 1.0), (7, 1e-9)])
def test_top_p_counts_what_top_k_has_left(top_k: int, top_p: float) -> None:
    probs = probabilities()
    kept, order = keep(probs, torch.full((ROWS,), top_k), torch.full((ROWS,), top_p))
    for row in range(ROWS):
        ranked = sorted(range(VOCABULARY), key=lambda token: -float(probs[row, token]))[:top_k]
        mass = sum(float(probs[row, token]) for token in ranked)
        nucleus, reached = list[int](), 0.0
        for token in ranked:
            if nucleus and reached >= top_p * mass:
                break
            nucleus.append(token)
            reached += float(probs[row, token])
        count = int((kept[row] > 0).sum())
        assert order[row, :count].tolist() == nucleus
        assert torch.equal(kept[row, :count], probs[row, nucleus])


def test_a_token_does_not_depend_on_the_filters_of_other_requests() -> None:
    sampler, _ = modules()
    probs, seeds, positions = probabilities(), torch.arange(ROWS), torch.arange(ROWS) + 9
    alone = getattr(sampler, PLAIN)(probs, seeds, positions)
    top_ks, top_ps = torch.full((ROWS,), 2**20), torch.ones(ROWS)
    top_ks[0], top_ps[1] = 2, 0.1
    beside = getattr(sampler, FILTERED)(
        probs, top_ks, top_ps, torch.zeros(ROWS), False, seeds, positions, max_top_k=None
    )
    assert alone.dtype == beside.dtype == torch.int32
    assert alone[2:].tolist() == beside[2:].tolist()


def test_what_was_kept_is_told_for_the_log_probabilities() -> None:
    sampler, _ = modules()
    probs, seeds, positions = probabilities(3), torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    tokens, kept, order, weight = getattr(sampler, FILTERED)(
        probs,
        torch.full((ROWS,), 4),
        torch.full((ROWS,), 0.9),
        None,
        False,
        seeds,
        positions,
        return_filtered_probs=True,
    )
    for row, token in enumerate(tokens.tolist()):
        rank = order[row].tolist().index(token)
        assert float(weight[row]) == float(kept[row, rank]) == float(probs[row, token]) > 0


def test_without_seeds_or_with_min_p_sglang_samples_itself() -> None:
    sampler, _ = modules()
    probs, seeds, positions = probabilities(), torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    assert getattr(sampler, PLAIN)(probs)[0] == "plain"
    filtered = getattr(sampler, FILTERED)
    assert filtered(probs, None, None, None, False, None, positions)[0] == "filtered"
    name, arguments, _ = filtered(probs, None, None, None, True, seeds, positions)
    assert (name, arguments[5]) == ("filtered", None)


def test_batches_get_the_seeds_of_their_requests() -> None:
    _, batches = modules()
    requests = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in (5, None, None, 0)]
    made = batches.SamplingBatchInfo.from_schedule_batch(SimpleNamespace(reqs=requests, seeds=None), VOCABULARY)
    first, one, other, last = made.sampling_seed.tolist()
    assert (first, last) == (5, 0)
    assert one != other
    own = torch.tensor([1, 2, 3, 4])
    kept = batches.SamplingBatchInfo.from_schedule_batch(SimpleNamespace(reqs=requests, seeds=own), VOCABULARY)
    assert kept.sampling_seed is own


def test_installing_again_changes_nothing_and_another_sglang_is_an_error() -> None:
    sampler, batches = modules()
    before = getattr(sampler, PLAIN)
    install(sampler, batches)
    assert getattr(sampler, PLAIN) is before
    with pytest.raises(AttributeError, match=PLAIN):
        install(ModuleType("other"), batches)
