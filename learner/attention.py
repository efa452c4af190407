"""Causal attention for training on ragged batches, without padding anywhere else in the model.

The sequences of a micro-batch lie end to end in one row of T tokens, so that every linear layer and norm runs on exactly
T tokens. Only the attention itself needs rows: it scatters the sequences into groups of similar length, right-padded to
``[B, heads, longest, head_dim]``, runs causal attention on each group, and gathers the T results. Padding sits to the
right, where causal attention never looks, so the result is exact and the gradient of the padding is zero.

The function is registered with transformers under :data:`RAGGED_ATTENTION`; a :class:`RaggedLayout` reaches it as the
keyword argument ``ragged`` of the model's forward. Where sequences share prefixes it is a `tree_attention.TreeLayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from learner.length_groups import spans
from learner.tree_attention import TreeLayout, tree_attention

RAGGED_ATTENTION = "millrace_ragged"


@dataclass(frozen=True)
class LengthGroup:
    """Sequences ``first:last`` of the layout, padded to ``longest``."""

    rows: int
    longest: int
    scatter: torch.Tensor
    """int64 ``[rows * longest]``: the flat position of each padded one (padding repeats a token of its row)."""
    gather: torch.Tensor
    """int64 ``[tokens]``: the padded position of each flat token of the group, in flat order."""
    start: int
    end: int
    """Flat positions of the group's tokens."""

    @property
    def even(self) -> bool:
        """All sequences have one length: padded and flat positions are the same."""
        return self.rows * self.longest == self.end - self.start


@dataclass(frozen=True)
class RaggedLayout:
    """How T tokens divide into sequences (longest first) and these into padded groups."""

    groups: tuple[LengthGroup, ...]
    tokens: int

    @property
    def padded_tokens(self) -> int:
        return sum(group.rows * group.longest for group in self.groups)


def make_layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> RaggedLayout:
    """The layout of sequences of these lengths, which must be sorted, longest first.

    Raises ValueError if they are not, or if one is empty.
    """
    if any(a < b for a, b in pairwise(lengths)) or (lengths and lengths[-1] < 1):
        raise ValueError(f"sequences must be sorted longest first and not be empty, got lengths {list(lengths)}")
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
    groups = [
        _make_group(np.asarray(lengths[first:last]), offsets[first : last + 1], device)
        for first, last in spans(lengths)
    ]
    return RaggedLayout(tuple(groups), int(offsets[-1]))


def _make_group(lengths: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], device: Any) -> LengthGroup:
    rows, longest = len(lengths), int(lengths[0])
    columns = np.arange(longest)
    inside = columns[None, :] < lengths[:, None]
    scatter = offsets[:-1, None] + np.minimum(columns[None, :], lengths[:, None] - 1)
    return LengthGroup(
        rows=rows,
        longest=longest,
        scatter=torch.from_numpy(scatter.reshape(-1)).to(device),
        gather=torch.from_numpy(np.flatnonzero(inside)).to(device),
        start=int(offsets[0]),
        end=int(offsets[-1]),
    )


class _Pad(torch.autograd.Function):
    """``flat [T, ...] -> padded [rows * longest, ...]``; the gradient of the padding is zero by construction."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, group: LengthGroup) -> torch.Tensor:
        ctx.group, ctx.tokens = group, flat.shape[0]
        return flat[group.start : group.end].contiguous() if group.even else flat.index_select(0, group.scatter)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        group: LengthGroup = ctx.group
        inside = gradient if group.even else gradient.index_select(0, group.gather)
        if group.end - group.start == ctx.tokens:
            return inside, None
        flat = gradient.new_zeros((ctx.tokens, *gradient.shape[1:]))
        flat[group.start : group.end] = inside
        return flat, None


class _Unpad(torch.autograd.Function):
    """``padded [rows * longest, ...] -> flat [tokens of the group, ...]``."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, group: LengthGroup) -> torch.Tensor:
        ctx.group = group
        return padded.view_as(padded) if group.even else padded.index_select(0, group.gather)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        group: LengthGroup = ctx.group
        if group.even:
            return gradient, None
        padded = gradient.new_zeros((group.rows * group.longest, *gradient.shape[1:]))
        padded.index_copy_(0, group.gather, gradient)
        return padded, None


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: RaggedLayout | TreeLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of ``query [1, heads, T, D]`` to ``key`` and ``value [1, kv_heads, T, D]``: ``[1, T, heads, D]``.

    Raises ValueError without a layout, with one for another number of tokens, or for dropout over a prefix forest.
    """
    tokens = query.shape[2]
    if ragged is None or ragged.tokens != tokens or query.shape[0] != 1:
        described = "no layout" if ragged is None else f"a layout of {ragged.tokens} tokens"
        raise ValueError(f"{RAGGED_ATTENTION}: got {query.shape[0]} rows of {tokens} tokens and {described}")
    if isinstance(ragged, TreeLayout):
        if dropout:
            raise ValueError(f"{RAGGED_ATTENTION}: dropout {dropout} has no meaning where sequences share a prefix")
        return tree_attention(query, key, value, ragged, scaling), None
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    results = [_attend(flat, group, scaling, dropout) for group in ragged.groups]
    return (results[0] if len(results) == 1 else torch.cat(results)).unsqueeze(0), None


def _attend(flat: list[torch.Tensor], group: LengthGroup, scaling: float | None, dropout: float) -> torch.Tensor:
    """Attention of one group over ``[T, heads, D]`` tensors; ``[tokens of the group, heads, D]``."""
    heads = flat[0].shape[1]
    query, key, value = (
        _Pad.apply(tensor, group).view(group.rows, group.longest, *tensor.shape[1:]).transpose(1, 2) for tensor in flat
    )
    if key.shape[1] != heads:
        repeats = heads // key.shape[1]
        key, value = (_repeat_heads(tensor, repeats) for tensor in (key, value))
    output = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    padded = output.transpose(1, 2).reshape(group.rows * group.longest, heads, output.shape[-1])
    result: torch.Tensor = _Unpad.apply(padded, group)
    return result


def _repeat_heads(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    rows, heads, length, width = tensor.shape
    repeated = tensor[:, :, None].expand(rows, heads, repeats, length, width)
    return repeated.reshape(rows, heads * repeats, length, width)


def register_ragged_attention() -> None:
    """Makes :data:`RAGGED_ATTENTION` a valid ``attn_implementation`` of transformers (no mask is made for it)."""
    from transformers import AttentionInterface

    AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
