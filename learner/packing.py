"""How even the passes of several ranks are, and how much of them is padding.

Ranks go through their passes in step: a round takes as long as its fullest pass. So what counts is the fullest pass of each
round against the mean, summed over the rounds of a step.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

from learner.attention import padded_tokens
from learner.batching import balance, pack

Item = TypeVar("Item", bound=Sized)


def even_bins(samples: Sequence[Item], width: int, token_budget: int) -> list[list[Item]]:
    """Bins for ``width`` ranks, a multiple of it, fullest first; bin i is for rank ``i % width``.

    As few rounds as the budget allows (a longer sample still runs, alone). Loads differ by at most the longest sample (Graham
    1969), and neighbours in the order run together, so a step's imbalance is at most
    ``(width - 1) * longest / tokens``: see `imbalance_bound`.
    """
    bins = pack(samples, token_budget)
    if width == 1 or not bins:
        return bins
    limit = max(token_budget, max(map(len, samples)))
    count = -(-len(bins) // width) * width
    while True:
        even = sorted(balance(samples, count), key=_load, reverse=True)
        if _load(even[0]) <= limit:
            return even
        count += width


def imbalance_bound(lengths: Sequence[int], width: int) -> float:
    """What the imbalance of `even_bins` cannot exceed.

    In a round, ``max - mean <= (width - 1) / width * (max - min)``; the rounds are sorted, so the differences add up to at
    most that of the fullest and the emptiest bin, which is at most the longest sample; the means add up to ``tokens / width``.
    """
    return (width - 1) * max(lengths) / sum(lengths) if lengths else 0.0


def imbalance(loads: Sequence[int]) -> float:
    """How much more than the mean the fullest has: ``max / mean - 1``; 0 for nothing.

    >>> imbalance([90, 110])
    0.1
    """
    total = sum(loads)
    return round(max(loads) * len(loads) / total - 1.0, 12) if total else 0.0


@dataclass
class PackingCounts:
    """Sums over the rounds of a step."""

    width: int
    tokens: int = 0
    padded: int = 0
    """Tokens with the padding of the attention; nothing else is padded."""
    fullest: int = 0
    """Tokens of the fullest pass of each round."""

    def add(self, bins: Sequence[Sequence[Sized]]) -> None:
        """Passes in the order in which ranks get them; the last round may lack some, whose ranks then wait."""
        loads = [_load(samples) for samples in bins]
        self.tokens += sum(loads)
        self.padded += sum(padded_tokens(sorted(map(len, samples), reverse=True)) for samples in bins)
        self.fullest += sum(max(loads[first : first + self.width]) for first in range(0, len(loads), self.width))

    def metrics(self) -> dict[str, float]:
        """Share of padding among the tokens that the attention runs on; fullest rank over the mean, minus 1."""
        if not self.tokens:
            return {}
        return {
            "packing/padding": 1.0 - self.tokens / self.padded,
            "packing/imbalance": self.fullest * self.width / self.tokens - 1.0,
        }


def _load(samples: Sequence[Sized]) -> int:
    return sum(map(len, samples))
