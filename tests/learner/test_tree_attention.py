"""Attention over a forest against a dense mask, and training on it against training without sharing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_fixtures import Sequences, as_samples, forests
from torch.nn.functional import scaled_dot_product_attention

from learner.attention import ragged_attention
from learner.backends.fsdp import FsdpBackend
from learner.batching import Sample, collate
from learner.config import LearnerConfig
from learner.errors import ModelError
from learner.objectives.config import ObjectiveConfig
from learner.prefix_tree import ALWAYS, build_forest
from learner.tree_attention import TreeLayout, make_tree_layout, sees

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def dense_mask(layout: TreeLayout) -> torch.Tensor:
    index = torch.arange(layout.tokens)
    mask: torch.Tensor = sees(layout.last)(None, None, index[:, None], index[None, :])
    return mask


def random_inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, tokens, WIDTH, generator=generator, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@settings(max_examples=40)
@given(sequences=forests(vocabulary=3), seed=st.integers(0, 99))
def test_attention_and_its_gradient_are_those_of_the_dense_mask(sequences: Sequences, seed: int) -> None:
    layout = make_tree_layout(build_forest(sequences, ALWAYS))
    inputs = random_inputs(layout.tokens, seed)
    mask = dense_mask(layout)

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ragged_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, ragged=layout)[0]

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)

    results = []
    for attend in (ours, dense):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*leaves)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(sequences=forests(most=30))
def test_the_block_mask_gives_flex_attention_the_same_mask(sequences: Sequences) -> None:
    """FlexAttention's own plain implementation; compiled it runs on GPUs only (tests/gpu)."""
    from torch.nn.attention.flex_attention import flex_attention

    layout = make_tree_layout(build_forest(sequences, ALWAYS))
    query, key, value = random_inputs(layout.tokens, 1, torch.float32)
    found = flex_attention(query, key, value, block_mask=layout.block_mask, scale=0.3, enable_gqa=True)
    expected = ragged_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, ragged=layout)[0]
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_the_block_mask_is_the_one_made_from_the_mask_function() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9, 300).astype(np.int32)
    branches = [np.concatenate([prompt, rng.integers(0, 9, n).astype(np.int32)]) for n in (200, 90, 400, 31)]
    layout = make_tree_layout(build_forest(branches, ALWAYS))
    made = create_block_mask(sees(layout.last), None, None, layout.tokens, layout.tokens, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(layout.block_mask.to_dense(), made.to_dense())
    assert layout.block_mask.sparsity() == made.sparsity() > 40


def test_dropout_is_refused() -> None:
    layout = make_tree_layout(build_forest([np.arange(3, dtype=np.int32)], ALWAYS))
    with pytest.raises(ValueError, match=r"dropout 0\.1 has no meaning where sequences share a prefix"):
        ragged_attention(torch.nn.Identity(), *random_inputs(3, 0), None, dropout=0.1, ragged=layout)


# --- the whole model ------------------------------------------------------------------------------------------------


def passes(directory: Path, samples: Sequence[Sample], sharing: Any, **changes: Any) -> tuple[FsdpBackend, list[Any]]:
    """One pass, and its loss sums, targets' log-probabilities and gradient."""
    config = LearnerConfig(device="cpu", **changes)
    backend = FsdpBackend(directory, config)
    batch = collate(samples, config.aggregation, sharing=sharing)
    logp = backend.forward(batch)
    done = backend.forward_backward(batch, config)
    return backend, [vars(done.sums), logp, {name: p.grad for name, p in backend._parameters.items()}]


def assert_equal_passes(shared: list[Any], plain: list[Any]) -> None:
    """To 1e-5, relative to the largest entry of each tensor."""
    assert shared[0] == pytest.approx(plain[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(shared[1], plain[1], rtol=0, atol=1e-5 * float(plain[1].abs().max()))
    for name, gradient in plain[2].items():
        torch.testing.assert_close(shared[2][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)


@settings(max_examples=25)
@given(sequences=forests(), seed=st.integers(0, 99))
def test_log_probabilities_loss_and_gradient_are_those_without_sharing(
    model_directory: Path, sequences: Sequences, seed: int
) -> None:
    samples = as_samples(sequences, seed)
    _, shared = passes(model_directory, samples, ALWAYS)
    _, plain = passes(model_directory, samples, None)
    assert_equal_passes(shared, plain)


OBJECTIVES: list[dict[str, Any]] = [
    {"gradient_checkpointing": True},
    {"kl_coef": 0.1, "entropy_coef": 0.01},
    {"distill_coef": 1.0, "teacher": "teacher"},
    {"distill_coef": 1.0, "teacher": "teacher", "distill_top_k": 5},
    {"aggregation": "sequence", "ratio": "sequence", "correction": "none"},
]


@pytest.mark.parametrize("changes", OBJECTIVES, ids=lambda changes: ",".join(changes))
def test_every_kind_of_pass_is_that_without_sharing(
    model_directory: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from learner_fixtures import make_model_directory

    if "teacher" in changes:
        changes = {**changes, "teacher": str(make_model_directory(tmp_path, seed=7))}
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 64, 40).astype(np.int32)
    turns = [np.concatenate([prompt, rng.integers(0, 64, n).astype(np.int32)]) for n in (12, 9, 9)]
    fork = np.concatenate([turns[0][:46], rng.integers(0, 64, 11).astype(np.int32)])
    samples = as_samples([*turns, fork, turns[0][:44]], 5)
    batch = collate(samples, "token", sharing=ALWAYS)
    assert batch.inputs.numel() < sum(map(len, samples)) / 2
    assert batch.distinct is not None
    assert len(batch.distinct.targets) < len(batch.targets)
    _, shared = passes(model_directory, samples, ALWAYS, **changes)
    _, plain = passes(model_directory, samples, None, **changes)
    assert_equal_passes(shared, plain)


def test_sharing_in_bfloat16_is_as_near_to_float32_as_not_sharing(model_directory: Path) -> None:
    prompt = np.random.default_rng(2).integers(0, 64, 30).astype(np.int32)
    samples = as_samples([np.append(prompt, np.arange(n, dtype=np.int32)) for n in (9, 5, 3)])
    found = {}
    for name, dtype, sharing in (
        ("exact", "float32", None),
        ("plain", "bfloat16", None),
        ("shared", "bfloat16", ALWAYS),
    ):
        backend = FsdpBackend(model_directory, LearnerConfig(device="cpu"), dtype)
        found[name] = backend.forward(collate(samples, "token", sharing=sharing))
        assert backend.forward_backward(collate(samples, "token", sharing=sharing), ObjectiveConfig()).bad_samples == ()
    errors = {name: float((found[name] - found["exact"]).abs().max()) for name in ("plain", "shared")}
    assert 0 < errors["shared"] < 2 * errors["plain"]


def test_a_model_with_attention_dropout_shares_nothing(model_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(model_directory, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    assert FsdpBackend(tmp_path, LearnerConfig(device="cpu")).sharing is None
    with pytest.raises(ModelError, match=r"learner\.prefix_sharing=on: this model has dropout"):
        FsdpBackend(tmp_path, LearnerConfig(device="cpu", prefix_sharing="on"))


def test_a_bad_sample_is_named_though_others_share_its_tokens(model_directory: Path) -> None:
    good, bad = as_samples([np.arange(30, dtype=np.int32), np.arange(20, dtype=np.int32)])
    broken = replace(bad, behaviour=np.full_like(bad.behaviour, np.nan))
    backend = FsdpBackend(model_directory, LearnerConfig(device="cpu"))
    done = backend.forward_backward(collate([good, broken], "token", sharing=ALWAYS), ObjectiveConfig())
    assert done.bad_samples == (f"{bad.group_id}/{bad.trajectory_id} tokens 2 to 20",)
    assert all(p.grad is None for p in backend._parameters.values())
