from __future__ import annotations

import numpy as np
import torch

from rollout_workers.engines.torch_engine.sampler import sample
from rollout_workers.engines.torch_engine.uniforms import mix, uniforms


def draw(logits: torch.Tensor, uniform: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):  # type: ignore[no-untyped-def]
    rows = len(logits)
    tokens, logprobs = sample(
        logits,
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int64),
        np.full(rows, top_p, np.float32),
        np.array(uniform),
    )
    return tokens.tolist(), logprobs.tolist()


def test_uniforms_depend_on_seed_and_position_only() -> None:
    seeds, positions = np.array([1, 2, 1, 1], np.uint64), np.array([7, 7, 8, 7])
    values = uniforms(seeds, positions)
    assert values[0] == values[3]
    assert len(set(values.tolist())) == 3
    assert values[:1] == uniforms(seeds[:1], positions[:1])


def test_uniforms_are_uniform_and_uncorrelated_along_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300), indexing="ij")
    values = uniforms(seeds.ravel(), positions.ravel()).reshape(300, 300)
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 100 + 5 * np.sqrt(200)
    centred = values - 0.5
    for neighbours in ((centred[1:] * centred[:-1]), (centred[:, 1:] * centred[:, :-1])):
        assert abs(neighbours.mean() * 12) < 5 / np.sqrt(neighbours.size)


def test_mix_is_a_bijection_where_each_bit_matters() -> None:
    values = np.arange(1 << 16, dtype=np.uint64) << np.uint64(20)
    mixed = mix(values)
    assert len(np.unique(mixed)) == len(values)
    flipped = mixed ^ mix(values ^ np.uint64(1 << 25))
    bits = np.unpackbits(flipped.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.01


def test_the_cumulative_distribution_is_inverted() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().repeat(5, 1)
    tokens, logprobs = draw(logits, [0.0, 0.19, 0.21, 0.51, 1 - 2**-52])
    assert tokens == [0, 0, 1, 2, 2]
    np.testing.assert_allclose(logprobs, np.log([0.2, 0.2, 0.3, 0.5, 0.5]), rtol=1e-5)


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    assert draw(logits, [0.0, 0.5, 1 - 2**-52])[0] == [1, 3, 3]


def test_top_k_and_top_p_renormalise() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().repeat(2, 1)
    tokens, logprobs = draw(logits, [0.0, 0.99], top_k=2)
    assert tokens == [1, 3]
    np.testing.assert_allclose(logprobs, np.log([4 / 7, 3 / 7]), rtol=1e-5)
    tokens, logprobs = draw(logits, [0.0, 0.99], top_p=0.75)
    assert tokens == [1, 3]
    np.testing.assert_allclose(logprobs, np.log([4 / 9, 3 / 9]), rtol=1e-5)
    assert draw(logits, [0.99, 0.0], top_p=1e-6)[0] == [1, 1]
    assert draw(logits, [0.99, 0.0], top_k=100)[0] == [3, 0]


def test_rows_with_and_without_filters_mix() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    parameters = np.array([1, 0.5, 0], np.float32), np.array([0, 3, 0]), np.array([1, 1, 1], np.float32)
    tokens, logprobs = sample(logits, *parameters, np.array([0.3, 0.3, 0.3]))
    for row in range(3):
        alone = sample(logits[row : row + 1], *(p[row : row + 1] for p in parameters), np.array([0.3]))
        assert (int(tokens[row]), float(logprobs[row])) == (int(alone[0]), float(alone[1]))
    assert int(tokens[2]) == int(logits[2].argmax())
