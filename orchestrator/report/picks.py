"""Which few of a run's many episodes are worth a look: the extremes of each kind, and some at random. Pure."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from experience.records import Status
from orchestrator.episodes import Episode

EACH = 12
"""Episodes kept for each reason."""
AT_RANDOM = 48
SLOWEST = 20


@dataclass(frozen=True)
class Picked:
    """An episode that is shown, and why it was chosen."""

    episode: Episode
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds, as the worker measured them: ``total``, ``generate``, ``environment``."""
    turns: int = 0
    why: str = ""

    @property
    def seconds(self) -> float:
        return self.timings.get("total", 0.0)


class _Best:
    """The ``size`` items with the largest keys, ties decided at random (else the first of the run would win them all)."""

    def __init__(self, size: int, source: random.Random) -> None:
        self._size = size
        self._random = source
        self._heap: list[tuple[float, float, int, Picked]] = []
        self._count = 0

    def offer(self, key: float, item: Picked) -> None:
        self._count += 1
        entry = (key, self._random.random(), self._count, item)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def items(self) -> list[Picked]:
        return [entry[3] for entry in sorted(self._heap, key=lambda entry: entry[:3], reverse=True)]


def _reward(picked: Picked, sign: float) -> float | None:
    reward = picked.episode.reward
    return None if reward is None or not math.isfinite(reward) else sign * reward


def _lost(picked: Picked) -> float | None:
    """Episodes that were dropped or ended other than by finishing."""
    lost = picked.episode.dropped is not None or picked.episode.status in (Status.ABORTED, Status.SYSTEM_ERROR)
    return 0.0 if lost else None


KINDS: tuple[tuple[str, int, Callable[[Picked], float | None]], ...] = (
    ("best reward", EACH, lambda picked: _reward(picked, 1.0)),
    ("worst reward", EACH, lambda picked: _reward(picked, -1.0)),
    ("slowest", SLOWEST, lambda picked: picked.seconds or None),
    ("longest", EACH, lambda picked: float(picked.episode.tokens)),
    ("oldest tokens", EACH, lambda picked: float(picked.episode.lag) if picked.episode.lag else None),
    ("dropped or failed", EACH, _lost),
    ("trained last", EACH, lambda picked: None if picked.episode.trained_at is None else picked.episode.trained_at),
    ("at random", AT_RANDOM, lambda picked: 0.0),
)
"""Reason, how many, and the key of an episode (None: it does not qualify)."""


class Picks:
    """Takes one episode after another and keeps a bounded number of them."""

    def __init__(self, source: random.Random) -> None:
        self._best = {name: _Best(size, source) for name, size, _ in KINDS}

    def offer(self, item: Picked) -> None:
        for name, _, key in KINDS:
            value = key(item)
            if value is not None:
                self._best[name].offer(value, item)

    def slowest(self) -> list[Picked]:
        """Longest wall-clock first."""
        return self._best["slowest"].items()

    def all(self) -> list[Picked]:
        """Every episode that was kept, once, with all the reasons it was kept for; the foremost of each reason first."""
        kept: dict[Any, Picked] = {}
        named = [[(name, item) for item in best.items()] for name, best in self._best.items()]
        for name, item in (choice for rank in zip_longest(*named) for choice in rank if choice is not None):
            identity = (item.episode.group_id, item.episode.episode_id, item.episode.positions)
            earlier = kept.get(identity)
            kept[identity] = replace(item, why=name if earlier is None else f"{earlier.why}, {name}")
        return list(kept.values())
