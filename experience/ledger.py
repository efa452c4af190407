"""The ledger: where every dispatched group and every generated token went.

It holds at every moment, in groups, ``dispatched = trained + dropped + live``, and in sampled tokens, ``generated =
trained + masked + wasted + live``. Tokens are counted as generated when the trajectories of their episode arrive, as
wasted when their group is dropped (or they arrive for a group that is gone), and as trained or masked when the learner
acknowledges their group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np


class LedgerError(RuntimeError):
    """The ledger does not balance: a defect of the program, not of its input."""


def ks_distance(first: Counter[int], second: Counter[int]) -> float:
    """Kolmogorov-Smirnov distance, sup |F1 - F2|, of two histograms ``value -> count``; 0.0 when either is empty."""
    if not first or not second:
        return 0.0
    values = np.array(sorted(first.keys() | second.keys()))
    cumulated = []
    for histogram in (first, second):
        counts = np.array([histogram.get(int(value), 0) for value in values], dtype=np.float64)
        cumulated.append(np.cumsum(counts) / counts.sum())
    return float(np.abs(cumulated[0] - cumulated[1]).max())


class Ledger:
    """Counts groups and tokens; each method is one thing that can happen to a group."""

    def __init__(self) -> None:
        self.dispatched = 0
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        self.live = 0
        self.generated_tokens = 0
        self.trained_tokens = 0
        self.masked_tokens = 0
        self.wasted_tokens = 0
        self.live_tokens = 0
        self._finished_lengths: Counter[int] = Counter()
        self._trained_lengths: Counter[int] = Counter()

    @property
    def returned(self) -> int:
        """Groups that gave their pacing slot back without being trained."""
        return self.dropped.total()

    def dispatch(self) -> None:
        """A group was dispatched."""
        self.dispatched += 1
        self.live += 1

    def arrive(self, tokens: int) -> None:
        """An episode of a live group finished with ``tokens`` sampled tokens."""
        self.generated_tokens += tokens
        self.live_tokens += tokens
        self._finished_lengths[tokens] += 1

    def arrive_late(self, tokens: int) -> None:
        """An episode finished whose group is gone or closed."""
        self.generated_tokens += tokens
        self.wasted_tokens += tokens
        self._finished_lengths[tokens] += 1

    def drop(self, reason: str, tokens: int) -> None:
        """A live group with ``tokens`` sampled tokens was dropped."""
        self.live -= 1
        self.dropped[reason] += 1
        self.live_tokens -= tokens
        self.wasted_tokens += tokens

    def train(self, groups: int, trained_tokens: int, masked_tokens: int, lengths: Iterable[int]) -> None:
        """``groups`` live groups were trained; ``lengths`` are the sampled tokens of each of their episodes."""
        self.live -= groups
        self.trained += groups
        self.live_tokens -= trained_tokens + masked_tokens
        self.trained_tokens += trained_tokens
        self.masked_tokens += masked_tokens
        self._trained_lengths.update(lengths)

    def untrain(self, groups: int, trained_tokens: int, masked_tokens: int, lengths: Iterable[int]) -> None:
        """Undo ``train``: the step is not in the checkpoint that the run continues from."""
        self.live += groups
        self.trained -= groups
        self.live_tokens += trained_tokens + masked_tokens
        self.trained_tokens -= trained_tokens
        self.masked_tokens -= masked_tokens
        self._trained_lengths.subtract(lengths)
        self._trained_lengths += Counter()

    def length_distance(self) -> float:
        """Distance, 0 to 1, between the lengths of finished and of trained episodes: the length bias of training."""
        return ks_distance(self._finished_lengths, self._trained_lengths)

    def check(self) -> None:
        """Raises ``LedgerError`` unless both balances hold and nothing is negative."""
        if self.dispatched != self.trained + self.returned + self.live or min(self.live, self.trained) < 0:
            raise LedgerError(f"groups do not balance: {self.snapshot()}")
        tokens = self.token_snapshot()
        generated = tokens.pop("generated")
        if generated != sum(tokens.values()) or min(tokens.values()) < 0:
            raise LedgerError(f"tokens do not balance: {self.token_snapshot()}")

    def snapshot(self) -> dict[str, Any]:
        """Groups: ``{dispatched, trained, dropped: {reason: n}, live}``."""
        return {
            "dispatched": self.dispatched,
            "trained": self.trained,
            "dropped": dict(sorted(self.dropped.items())),
            "live": self.live,
        }

    def token_snapshot(self) -> dict[str, int]:
        """Sampled tokens: ``{generated, trained, masked, wasted, live}``."""
        return {
            "generated": self.generated_tokens,
            "trained": self.trained_tokens,
            "masked": self.masked_tokens,
            "wasted": self.wasted_tokens,
            "live": self.live_tokens,
        }
