"""How even the passes of several ranks are, and how much of them is padding.

Ranks go through their passes in step: a round takes as long as its fullest pass. So what counts is the fullest pass of each
round against the mean, summed over the rounds of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from learner.batching import balance, pack
from learner.length_groups import padded_tokens

Item = TypeVar("Item", bound=Sized)


def _own_lengths(samples: Sequence[Sized]) -> list[int]:
    return list(map(len, samples))


@dataclass(frozen=True)
class Packer(Generic[Item]):
    """How samples become bins, and what a bin makes a pass run on."""

    pack: Callable[[Sequence[Item], int], list[list[Item]]]
    """Samples and a budget of tokens to bins within it (or with one longer sample alone)."""
    balance: Callable[[Sequence[Item], int], list[list[Item]]]
    """Samples and a number of bins to that many, as even as can be had."""
    lengths: Callable[[Sequence[Item]], list[int]] = _own_lengths
    """Samples of a bin to the lengths of the runs of tokens that a pass over them computes."""

    def load(self, samples: Sequence[Item]) -> int:
        """Tokens that a pass over these samples computes."""
        return sum(self.lengths(samples))


def even_bins(samples: Sequence[Item], width: int, token_budget: int, packer: Packer[Item]) -> list[list[Item]]:
    """Bins for ``width`` ranks, a multiple of it, fullest first; bin i is for rank ``i % width``.

    As few rounds as the budget allows (a longer sample still runs, alone). Where samples share nothing, loads differ by at most
    the longest sample (Graham 1969), and neighbours in the order run together, so a step's imbalance is at most
    ``(width - 1) * longest / tokens``: see `imbalance_bound`.
    """
    bins = packer.pack(samples, token_budget)
    if width == 1 or not bins:
        return bins
    limit = max(token_budget, max(map(packer.load, bins)))
    count = -(-len(bins) // width) * width
    while True:
        even = sorted(packer.balance(samples, count), key=packer.load, reverse=True)
        if packer.load(even[0]) <= limit:
            return even
        count += width


def imbalance_bound(lengths: Sequence[int], width: int) -> float:
    """What the imbalance of `even_bins` cannot exceed.

    In a round, ``max - mean <= (width - 1) / width * (max - min)``; the rounds are sorted, so the differences add up to at
    most that of the fullest and the emptiest bin, which is at most the longest sample; the means add up to ``tokens / width``.
    """
    return (width - 1) * max(lengths) / sum(lengths) if lengths else 0.0


@dataclass
class PackingCounts(Generic[Item]):
    """Sums over the rounds of a step."""

    width: int
    packer: Packer[Item] = field(default_factory=lambda: Packer(pack, balance))
    plain: int = 0
    """Tokens of the samples."""
    tokens: int = 0
    """Those that the passes compute: fewer where samples share prefixes."""
    padded: int = 0
    """With the padding of the attention; nothing else is padded."""
    fullest: int = 0
    """Tokens of the fullest pass of each round."""

    def add(self, bins: Sequence[Sequence[Item]]) -> None:
        """Passes in the order in which ranks get them; the last round may lack some, whose ranks then wait."""
        lengths = [sorted(self.packer.lengths(samples), reverse=True) for samples in bins]
        loads = [sum(runs) for runs in lengths]
        self.plain += sum(len(sample) for samples in bins for sample in samples)
        self.tokens += sum(loads)
        self.padded += sum(map(padded_tokens, lengths))
        self.fullest += sum(max(loads[first : first + self.width]) for first in range(0, len(loads), self.width))

    def metrics(self) -> dict[str, float]:
        """Shares: of padding among the tokens that attention runs on; of the fullest rank over the mean, minus 1; of tokens saved."""
        if not self.tokens:
            return {}
        return {
            "packing/padding": 1.0 - self.tokens / self.padded,
            "packing/imbalance": self.fullest * self.width / self.tokens - 1.0,
            "packing/prefix_saved": 1.0 - self.tokens / self.plain,
        }
