"""How one Megatron-Core parameter holds Hugging Face tensors, and how tensor parallelism cuts it. Pure functions of tensors.

The same cut and join serve weights and everything shaped like them: gradients, moments of the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """``cut(join(shards), rank, len(shards))`` is ``shards[rank]``, bit by bit."""

    @property
    def divided(self) -> bool:
        """Whether tensor-parallel ranks hold different parts."""
        ...

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        """The local parameter of tensor-parallel rank ``rank`` of ``ranks``, from the Hugging Face tensors that it holds."""
        ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors, from the local parameters of all tensor-parallel ranks in order."""
        ...


@dataclass(frozen=True)
class Copied:
    """One tensor, the same on all tensor-parallel ranks."""

    divided = False

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return whole[0]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Divided:
    """One tensor, cut along a dimension."""

    dimension: int
    divided = True

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return whole[0].chunk(ranks, self.dimension)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), self.dimension)]


@dataclass(frozen=True)
class PaddedRows:
    """One tensor of ``rows`` rows, cut along them; rows of zeros make their number a multiple of the ranks."""

    rows: int
    divided = True

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        missing = padded(self.rows, ranks) - self.rows
        return torch.nn.functional.pad(whole[0], (0, 0, 0, missing)).chunk(ranks, 0)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.rows]]


def padded(number: int, ranks: int) -> int:
    """The next multiple of ``ranks``.

    >>> padded(203, 2)
    204
    """
    return -(-number // ranks) * ranks


@dataclass(frozen=True)
class Stacked:
    """Gate over up projection: each rank has its rows of the first, then its rows of the second."""

    divided: bool = True

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        ranks, rank = (ranks, rank) if self.divided else (1, 0)
        return torch.cat([tensor.chunk(ranks, 0)[rank] for tensor in whole])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        kept = shards if self.divided else shards[:1]
        halves = [shard.chunk(2, 0) for shard in kept]
        return [torch.cat([half[index] for half in halves]) for index in range(2)]


@dataclass(frozen=True)
class Interleaved:
    """Query, key and value projections (or their biases): for each key-value head its query heads, the key, the value."""

    heads: int
    kv_heads: int
    width: int
    divided = True

    def cut(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        parts = [tensor.reshape(self.kv_heads, -1, *tensor.shape[1:]).chunk(ranks, 0)[rank] for tensor in whole]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        rows = [self.heads // self.kv_heads * self.width, self.width, self.width]
        grouped = torch.cat(list(shards)).reshape(self.kv_heads, sum(rows), *shards[0].shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]
