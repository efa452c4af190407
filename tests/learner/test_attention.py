from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from learner.attention import make_layout, ragged_attention
from learner.length_groups import GROUP_OVERHEAD, MAX_PADDING

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Every sequence by itself, [1, T, heads, D]."""
    parts, start = [], 0
    for length in lengths:
        rows = [tensor[:, :, start : start + length] for tensor in (query, key, value)]
        key_rows, value_rows = (rows[i].repeat_interleave(HEADS // KV_HEADS, dim=1) for i in (1, 2))
        parts.append(scaled_dot_product_attention(rows[0], key_rows, value_rows, is_causal=True, scale=0.3))
        start += length
    return torch.cat(parts, dim=2).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_each_sequence_attends_to_itself_alone_and_so_does_its_gradient(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = sum(lengths)
    tensors = [
        torch.randn(1, heads, tokens, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    upstream = torch.randn(1, tokens, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    results = []
    for attend in (
        lambda *qkv: ragged_attention(torch.nn.Identity(), *qkv, None, scaling=0.3, ragged=make_layout(lengths))[0],
        lambda *qkv: reference(*qkv, lengths),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = attend(*leaves)
        output.backward(upstream)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=50))
def test_padding_is_bounded(lengths: list[int]) -> None:
    layout = make_layout(sorted(lengths, reverse=True))
    assert layout.tokens == sum(lengths)
    for group in layout.groups:
        assert group.rows * group.longest <= (group.end - group.start) * MAX_PADDING + GROUP_OVERHEAD
    assert [group.start for group in layout.groups[1:]] == [group.end for group in layout.groups[:-1]]


@pytest.mark.parametrize("lengths", [[3, 4], [3, 0]])
def test_unsorted_or_empty_sequences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="sorted longest first and not be empty"):
        make_layout(lengths)


def test_a_missing_or_wrong_layout_is_an_error() -> None:
    query = torch.zeros(1, HEADS, 5, WIDTH)
    key = torch.zeros(1, KV_HEADS, 5, WIDTH)
    for layout, message in ((None, "no layout"), (make_layout([4]), "a layout of 4 tokens")):
        with pytest.raises(ValueError, match=f"1 rows of 5 tokens and {message}"):
            ragged_attention(torch.nn.Identity(), query, key, key, None, ragged=layout)
