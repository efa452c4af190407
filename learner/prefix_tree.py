"""Sequences that begin alike, as a forest whose shared prefixes are there once.

A *segment* is a run of tokens that the same sequences go through; a sequence is the path of segments from a root to where
it ends. Segments lie one after another in a flat row, each followed by everything that continues it (depth-first), so

- a token attends to the tokens of its own segment up to itself and to all of the segments above it;
- the readers of a segment, all that lie below it, are one contiguous range: ``segment.end:segment.last``;
- key ``k`` is seen by exactly the queries ``k <= q < last(k)``, with ``last`` of the segment that holds ``k``.

No torch: tokens in, plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sharing:
    """When a common prefix is computed once: if that saves more tokens than it costs.

    A shared prefix saves its length for every branch but one. It costs another attention call, and its result has to be
    merged into every token below it; both in tokens of forward and backward pass, as measured by
    ``millrace bench prefix-tree --break-even``.
    """

    call: float = 0.0
    reader: float = 0.0

    def pays(self, saved: int, readers: int) -> bool:
        """Whether to share a prefix that saves ``saved`` tokens and is read by ``readers`` tokens below it."""
        return saved > self.call + self.reader * readers


ALWAYS = Sharing()
WHERE_IT_PAYS = Sharing(call=16.0, reader=0.2)


class Segment(NamedTuple):
    """Flat tokens ``start:end``, continued by ``end:last``."""

    start: int
    end: int
    last: int
    parent: int
    """Index of the segment before it; -1 for none."""
    depth: int
    """Position of its first token in its sequences."""


@dataclass(frozen=True)
class PrefixForest:
    """Sequences as paths through segments, which are in flat order."""

    segments: tuple[Segment, ...]
    ends_in: tuple[int, ...]
    """For each sequence the segment that holds its last token."""
    tokens: Tokens
    """[T]"""
    positions: npt.NDArray[np.int64]
    """[T]: the position of each token in its sequences, from 0."""

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, sequence: int) -> list[Segment]:
        """The segments of a sequence, root first."""
        path, index = [], self.ends_in[sequence]
        while index >= 0:
            path.append(self.segments[index])
            index = self.segments[index].parent
        return path[::-1]

    def columns(self, sequence: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in the flat row these positions of a sequence are."""
        path = self.path(sequence)
        depths = np.array([segment.depth for segment in path])
        shifts = np.array([segment.start - segment.depth for segment in path])
        found: npt.NDArray[np.int64] = positions + shifts[np.searchsorted(depths, positions, side="right") - 1]
        return found

    def last(self) -> npt.NDArray[np.int64]:
        """[T]: behind the last query that sees each key."""
        lengths = [segment.end - segment.start for segment in self.segments]
        return np.repeat(np.array([segment.last for segment in self.segments], dtype=np.int64), lengths)


class _Open(NamedTuple):
    """Leaves ``first:stop`` whose tokens from ``start`` on have no segment yet."""

    first: int
    stop: int
    start: int
    parent: int


def build_forest(sequences: Sequence[Tokens], sharing: Sharing) -> PrefixForest:
    """The forest of some sequences (none empty), with the prefixes shared that ``sharing`` says pay.

    A sequence that is the beginning of another one, or equal to it, costs nothing at all, so it always runs within it.
    """
    order = sorted_order(sequences)
    common = [common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    leaves, leaf_of, shared = _leaves(sequences, order, common)
    segments, tokens, leaf_segment = _cut([sequences[i] for i in leaves], shared, sharing)
    ends_in = [0] * len(sequences)
    for index, leaf in zip(order, leaf_of, strict=True):
        segment = leaf_segment[leaf]
        while segments[segment].depth >= len(sequences[index]):
            segment = segments[segment].parent
        ends_in[index] = segment
    depths = [np.arange(s.depth, s.depth + s.end - s.start, dtype=np.int64) for s in segments]
    return PrefixForest(
        segments=tuple(segments),
        ends_in=tuple(ends_in),
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        positions=np.concatenate(depths) if depths else np.zeros(0, np.int64),
    )


def sorted_order(sequences: Sequence[Tokens]) -> list[int]:
    """Indices in lexicographic order, in which the neighbours of a sequence have the most in common with it."""
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Tokens that two sequences begin with alike."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _leaves(sequences: Sequence[Tokens], order: list[int], common: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Sequences that no other one continues, in order; for each in ``order`` the leaf it runs within; what neighbours share."""
    leaves: list[int] = []
    leaf_of: list[int] = []
    shared: list[int] = []
    least = 0
    for place, index in enumerate(order):
        leaf_of.append(len(leaves))
        least = min(least, common[place - 1]) if place else 0
        if place < len(common) and common[place] == len(sequences[index]):
            continue
        if leaves:
            shared.append(least)
        leaves.append(index)
        least = len(sequences[index])
    return leaves, leaf_of, shared


def _cut(leaves: list[Tokens], shared: list[int], sharing: Sharing) -> tuple[list[Segment], list[Tokens], list[int]]:
    """Segments in flat order, their tokens, and the last segment of each leaf; ``shared[i]``: prefix of leaves i and i + 1."""
    lengths = np.concatenate([[0], np.cumsum([len(leaf) for leaf in leaves])])
    segments: list[Segment] = []
    tokens: list[Tokens] = []
    leaf_segment = [0] * len(leaves)
    waiting = [_Open(0, len(leaves), 0, -1)] if leaves else []
    flat = 0
    while waiting:
        first, stop, start, parent = waiting.pop()
        alone = stop - first == 1
        end = len(leaves[first]) if alone else min(shared[first : stop - 1])
        bounds = [first, *(i + 1 for i in range(first, stop - 1) if shared[i] == end), stop]
        readers = int(lengths[stop] - lengths[first]) - (stop - first) * end
        if alone or (end > start and sharing.pays((len(bounds) - 2) * (end - start), readers)):
            segments.append(Segment(flat, flat + end - start, flat + end - start, parent, start))
            tokens.append(leaves[first][start:end])
            flat += end - start
            start, parent = end, len(segments) - 1
        if alone:
            leaf_segment[first] = parent
        else:
            waiting.extend(_Open(a, b, start, parent) for a, b in reversed(list(pairwise(bounds))))
    return _with_last(segments), tokens, leaf_segment


def _with_last(segments: list[Segment]) -> list[Segment]:
    last = [segment.end for segment in segments]
    for index in range(len(segments) - 1, -1, -1):
        parent = segments[index].parent
        if parent >= 0:
            last[parent] = max(last[parent], last[index])
    return [segment._replace(last=end) for segment, end in zip(segments, last, strict=True)]


class BlockTable(NamedTuple):
    """Which blocks of keys a block of queries sees."""

    partial: npt.NDArray[np.bool_]
    """[query blocks, key blocks]: some pairs of the block see each other."""
    full: npt.NDArray[np.bool_]
    """[query blocks, key blocks]: all pairs do."""


def block_table(last: npt.NDArray[np.int64], block: int) -> BlockTable:
    """The blocks of the mask ``k <= q < last[k]``, without making the mask.

    What the keys of one block are seen by is one range, as each key is seen at least by its own query: from the block's first
    token to the largest ``last``. Blocks that reach beyond the row are never full.
    """
    tokens = len(last)
    count = -(-tokens // block)
    padded = np.concatenate([last, np.zeros(count * block - tokens, dtype=np.int64)]).reshape(count, block)
    starts = np.arange(count) * block
    queries, keys = np.arange(count)[:, None], np.arange(count)[None, :]
    seen = (queries >= keys) & (starts[:, None] < padded.max(axis=1, initial=0)[None, :])
    whole = (queries > keys) & (starts[:, None] + block <= padded.min(axis=1, initial=tokens)[None, :])
    return BlockTable(partial=seen & ~whole, full=whole)
