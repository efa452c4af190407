"""Attention over a prefix forest: every token to its own segment up to itself and to all segments above it.

On a CPU the softmax over a path is computed segment by segment and merged. Each segment attends to itself causally,
segments of similar length together; then, for every segment that others continue, all tokens below it attend to it in one
unmasked call. With ``o_i`` the attention over a part of the keys and ``l_i`` the logarithm of its sum of exponentials, two
parts merge exactly:

    l = log(exp(l_1) + exp(l_2))        o = o_1 + sigmoid(l_2 - l_1) (o_2 - o_1)

(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). The backward pass of a part needs nothing but the
*merged* ``o`` and ``l``, because its probabilities are ``exp(s - l)`` and the gradient of a score is ``p (dp - dout . o)``
(Dao et al. 2022, "FlashAttention", appendix B.4). No key is copied for a branch, and nothing is computed for pairs that do not
see each other.

On a GPU the same layout becomes the block mask of FlexAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.length_groups import spans
from learner.prefix_tree import PrefixForest, block_table

BLOCK = 128
"""Rows and columns of a block of FlexAttention's mask."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class OwnPart:
    """Segments of similar length that attend to themselves in one call, padded on the right to ``longest``."""

    rows: int
    longest: int
    span: slice | None
    """Their flat tokens, where these lie together and none is padded; then no token is moved."""
    scatter: Tensor
    """int64 [rows * longest]: the flat position of each padded one (padding repeats the last token of its row)."""
    flat: Tensor
    """int64 [tokens]: the flat positions of their tokens."""
    gather: Tensor
    """int64 [tokens]: the padded position of each of these."""

    def rows_of(self, tensor: Tensor) -> Tensor:
        """``flat [T, ...] -> [rows, longest, ...]``."""
        chosen = tensor[self.span] if self.span is not None else tensor.index_select(0, self.scatter)
        return chosen.view(self.rows, self.longest, *tensor.shape[1:])

    def gradient_rows(self, tensor: Tensor) -> Tensor:
        """As `rows_of`, with zeros as padding."""
        if self.span is not None:
            return self.rows_of(tensor)
        padded = tensor.new_zeros((self.rows * self.longest, *tensor.shape[1:]))
        padded.index_copy_(0, self.gather, tensor.index_select(0, self.flat))
        return padded.view(self.rows, self.longest, *tensor.shape[1:])

    def put(self, rows: Tensor, target: Tensor) -> None:
        """``[rows, longest, ...]`` to the flat ``target [T, ...]``."""
        padded = rows.reshape(self.rows * self.longest, *rows.shape[2:])
        if self.span is not None:
            target[self.span] = padded
        else:
            target.index_copy_(0, self.flat, padded.index_select(0, self.gather))


@dataclass(frozen=True)
class SharedPart:
    """A segment (``keys``) and all tokens below it (``readers``)."""

    keys: slice
    readers: slice


@dataclass(frozen=True)
class TreeLayout:
    """How a flat row of ``tokens`` attends to itself."""

    tokens: int
    own: tuple[OwnPart, ...]
    shared: tuple[SharedPart, ...]
    last: Tensor
    """int64 [tokens]: behind the last query that sees each key."""

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask, a few numbers a block."""
        from torch.nn.attention.flex_attention import BlockMask

        table = block_table(self.last.cpu().numpy(), BLOCK)
        device = self.last.device
        return BlockMask.from_kv_blocks(
            *_in_front(table.partial, device),
            *_in_front(table.full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees(self.last),
            seq_lengths=(self.tokens, self.tokens),
        )


def sees(last: Tensor) -> Any:
    """FlexAttention's ``mask_mod`` of a forest: whether query ``q`` sees key ``k``."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < last[key])

    return mask


def _in_front(blocks: np.ndarray[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their indices first: int32 [1, 1, rows] and [1, 1, rows, columns]."""
    counts = blocks.sum(axis=1).astype(np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(indices)[None, None].to(device)


def make_tree_layout(forest: PrefixForest, device: torch.device | str = "cpu") -> TreeLayout:
    """The layout of a forest's flat row."""
    segments = sorted(((s.start, s.end) for s in forest.segments), key=lambda span: (span[0] - span[1], span[0]))
    lengths = [end - start for start, end in segments]
    own = [_own_part(segments[first:last], device) for first, last in spans(lengths)]
    shared = [SharedPart(slice(s.start, s.end), slice(s.end, s.last)) for s in forest.segments if s.last > s.end]
    return TreeLayout(len(forest), tuple(own), tuple(shared), torch.from_numpy(forest.last()).to(device))


def _own_part(segments: Sequence[tuple[int, int]], device: torch.device | str) -> OwnPart:
    starts = np.array([start for start, _ in segments])
    lengths = np.array([end - start for start, end in segments])
    rows, longest = len(segments), int(lengths[0])
    columns = np.arange(longest)
    inside = columns[None, :] < lengths[:, None]
    scatter = (starts[:, None] + np.minimum(columns[None, :], lengths[:, None] - 1)).reshape(-1)
    gather = np.flatnonzero(inside)
    together = bool(inside.all()) and bool((np.diff(starts) == longest).all())
    return OwnPart(
        rows=rows,
        longest=longest,
        span=slice(int(starts[0]), int(starts[0]) + rows * longest) if together else None,
        scatter=torch.from_numpy(scatter).to(device),
        flat=torch.from_numpy(scatter[gather]).to(device),
        gather=torch.from_numpy(gather).to(device),
    )


def tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scaling: float | None) -> Tensor:
    """Attention of ``query [1, heads, T, D]`` to ``key`` and ``value [1, kv_heads, T, D]``: ``[1, T, heads, D]``."""
    query, key, value = _of_one_dtype(query, key, value)
    if query.device.type != "cpu":
        attend = _compiled_flex_attention()
        found = attend(query, key, value, block_mask=layout.block_mask, scale=scaling, enable_gqa=True)
        result: Tensor = found.transpose(1, 2)
        return result
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    merged: Tensor = _Merged.apply(*flat, layout, scaling)  # type: ignore[no-untyped-call]
    return merged.unsqueeze(0)


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """In the dtype that autocast, if it is on, would choose for attention; norms leave queries and keys in another than values."""
    kind, dtype = query.device.type, value.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in (query, key, value)]


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


class _Merged(torch.autograd.Function):
    """``query [T, heads, D]``, ``key`` and ``value [T, kv_heads, D]`` to ``[T, heads, D]``."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scaling: float | None
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype)
        norms = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in layout.own:
            rows, row_norms = _part([part.rows_of(x) for x in (query, key, value)], scaling, causal=True)
            part.put(rows, output)
            part.put(row_norms, norms)
        for shared in layout.shared:
            below = shared.readers
            found, found_norms = _part([query[None, below], key[None, shared.keys], value[None, shared.keys]], scaling)
            weight = torch.sigmoid(found_norms[0] - norms[below])
            output[below].lerp_(found[0], weight.to(query.dtype)[..., None])
            torch.logaddexp(norms[below], found_norms[0], out=norms[below])
        ctx.save_for_backward(query, key, value, output, norms)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, norms = ctx.saved_tensors
        layout: TreeLayout = ctx.layout
        gradient = gradients[0].contiguous()
        to_query, to_key, to_value = results = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        for part in layout.own:
            rows = [part.rows_of(x) for x in (query, key, value, output, norms)]
            found = _part_backward(part.gradient_rows(gradient), rows, ctx.scaling, causal=True)
            for result, gradient_rows in zip(results, found, strict=True):
                part.put(gradient_rows, result)
        for shared in layout.shared:
            below, keys = shared.readers, shared.keys
            rows = [query[None, below], key[None, keys], value[None, keys], output[None, below], norms[None, below]]
            found = _part_backward(gradient[None, below], rows, ctx.scaling)
            for result, span, added in zip(results, (below, keys, keys), found, strict=True):
                result[span].add_(added[0])
        return to_query, to_key, to_value, None, None


def _part(inputs: Sequence[Tensor], scaling: float | None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of ``query [rows, L, heads, D]`` to one part of ``key`` and ``value``, and its log-sum-exp ``[rows, L, heads]``."""
    found, norms = _attend(*(x.transpose(1, 2) for x in inputs), 0.0, causal, scale=scaling)
    return found.transpose(1, 2), norms.transpose(1, 2)


def _part_backward(
    gradient: Tensor, rows: Sequence[Tensor], scaling: float | None, *, causal: bool = False
) -> list[Tensor]:
    """Gradients of query, key and value through one part, given output and log-sum-exp of all parts together."""
    found = _attend_backward(*(x.transpose(1, 2) for x in (gradient, *rows)), 0.0, causal, scale=scaling)
    return [x.transpose(1, 2) for x in found]
