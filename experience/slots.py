"""What the episodes of a worker are doing, in slot-seconds: exact, because every change of an episode's state is told."""

from __future__ import annotations

import heapq
from enum import StrEnum
from typing import NamedTuple

from experience.accounting import Cause, Span


class Doing(StrEnum):
    """Where an episode is."""

    GENERATING = "generating"
    ENVIRONMENT = "environment"
    """In an environment, or in the rollout loop's own code."""
    REWARD = "reward"
    DELIVERING = "delivering"
    """On the way into the queue, or waiting for space in it."""


CAUSES = {
    Doing.GENERATING: Cause.DECODE,
    Doing.ENVIRONMENT: Cause.ENVIRONMENT,
    Doing.REWARD: Cause.REWARD,
    Doing.DELIVERING: Cause.QUEUE_FULL,
}
"""As which cause a state counts in a worker's account; a free slot is idle."""

STATES = list(Doing)
INDEX = {doing: index for index, doing in enumerate(STATES)}
ENVIRONMENT = INDEX[Doing.ENVIRONMENT]

FREE = "free"
EMPTY = "empty"
"""Seconds (not slot-seconds) in which no episode was live."""


class Wait(NamedTuple):
    """An episode that has been in one state since ``since`` (seconds of the caller's clock)."""

    episode_id: str
    group_id: str
    doing: Doing
    since: float
    evaluation: bool
    actor: str = ""
    """Who serves it, where that is known."""


class Slots:
    """The slots of one worker. Slot-seconds add up to ``capacity`` times the seconds (more while evaluations run, too).

    >>> slots = Slots("worker-0", 4, 0.0)
    >>> slots.begin("e", "g", 0.0)
    >>> slots.move("e", Doing.GENERATING, 1.0).value
    'environment'
    >>> slots.end("e", 3.0)
    >>> slots.slot_seconds(5.0)
    {'generating': 2.0, 'environment': 1.0, 'reward': 0.0, 'delivering': 0.0, 'free': 17.0, 'empty': 2.0}
    >>> slots.seconds(5.0)
    {<Cause.DECODE: 'decode'>: 0.5, <Cause.ENVIRONMENT: 'environment'>: 0.25, <Cause.IDLE: 'idle'>: 4.25}
    """

    def __init__(self, lane: str, capacity: int, now: float) -> None:
        self.lane = lane
        self.capacity = capacity
        self._now = now
        self._taken_to = now
        self._counts = [0] * len(STATES)
        self._slot_s = [0.0] * len(STATES)
        self._own_s = [0.0] * len(STATES)
        """Seconds of the worker, shared out."""
        self._free_slot_s = self._free_own_s = self._empty_s = 0.0
        self._evaluations = 0
        self._taken: dict[Cause, float] = {}
        self._episodes: dict[str, _Live] = {}

    def begin(self, episode_id: str, group_id: str, now: float, evaluation: bool = False) -> None:
        """An episode takes a slot; it is in its environment until `move` says otherwise."""
        self._pass(now)
        self._episodes[episode_id] = _Live(group_id, evaluation, Doing.ENVIRONMENT, ENVIRONMENT, now)
        self._counts[ENVIRONMENT] += 1
        self._evaluations += evaluation

    def move(self, episode_id: str, doing: Doing, now: float) -> Doing:
        """The episode does something else from ``now`` on; returns what it did before."""
        live = self._episodes.get(episode_id)
        if live is None or live.doing is doing:
            return doing
        self._pass(now)
        before, self._counts[live.index] = live.doing, self._counts[live.index] - 1
        live.doing, live.index, live.since = doing, INDEX[doing], now
        self._counts[live.index] += 1
        return before

    def end(self, episode_id: str, now: float) -> None:
        """The episode gives its slot back."""
        self._pass(now)
        live = self._episodes.pop(episode_id, None)
        if live is not None:
            self._counts[live.index] -= 1
            self._evaluations -= live.evaluation

    def waits(self, groups: set[str], limit: int) -> list[Wait]:
        """The episodes that have been in one state for longest, those of ``groups`` first."""
        found = heapq.nsmallest(
            limit, self._episodes.items(), key=lambda item: (item[1].group_id not in groups, item[1].since)
        )
        return [Wait(name, live.group_id, live.doing, live.since, live.evaluation) for name, live in found]

    def slot_seconds(self, now: float) -> dict[str, float]:
        """Slot-seconds so far by state, and ``free`` ones; ``empty`` seconds."""
        self._pass(now)
        told = {doing.value: seconds for doing, seconds in zip(STATES, self._slot_s, strict=True)}
        return {**told, FREE: self._free_slot_s, EMPTY: self._empty_s}

    def seconds(self, now: float) -> dict[Cause, float]:
        """The worker's seconds, shared out by what its slots did; they add up to the wall-clock."""
        self._pass(now)
        told = {CAUSES[doing]: seconds for doing, seconds in zip(STATES, self._own_s, strict=True)}
        told[Cause.IDLE] = self._free_own_s
        return {cause: seconds for cause, seconds in told.items() if seconds > 0}

    def take_spans(self, now: float | None = None) -> list[Span]:
        """The time since the last call, the causes laid end to end."""
        totals = self.seconds(self._now if now is None else now)
        spans, at = [], self._taken_to
        for cause, total in totals.items():
            seconds = total - self._taken.get(cause, 0.0)
            if seconds > 0:
                spans.append(Span(self.lane, cause, at, at + seconds))
                at += seconds
        self._taken, self._taken_to = totals, self._now
        return spans

    def _pass(self, now: float) -> None:
        elapsed = now - self._now
        if elapsed <= 0:
            return
        self._now = now
        live = len(self._episodes)
        if not live:
            self._empty_s += elapsed
        free = max(0, self.capacity - live + self._evaluations)
        each = elapsed / (free + live)
        for index, count in enumerate(self._counts):
            if count:
                self._slot_s[index] += count * elapsed
                self._own_s[index] += count * each
        self._free_slot_s += free * elapsed
        self._free_own_s += free * each


class _Live:
    """An episode with a slot."""

    __slots__ = ("doing", "evaluation", "group_id", "index", "since")

    def __init__(self, group_id: str, evaluation: bool, doing: Doing, index: int, since: float) -> None:
        self.group_id, self.evaluation = group_id, evaluation
        self.doing, self.index, self.since = doing, index, since
