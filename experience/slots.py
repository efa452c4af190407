"""What the episodes of a worker are doing, in slot-seconds: exact, because every change of an episode's state is told."""

from __future__ import annotations

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
    {'environment': 1.0, 'free': 17.0, 'generating': 2.0, 'empty': 2.0}
    >>> slots.seconds(5.0)
    {<Cause.ENVIRONMENT: 'environment'>: 0.25, <Cause.IDLE: 'idle'>: 4.25, <Cause.DECODE: 'decode'>: 0.5}
    """

    def __init__(self, lane: str, capacity: int, now: float) -> None:
        self.lane = lane
        self.capacity = capacity
        self._now = now
        self._taken_to = now
        self._counts = dict.fromkeys(Doing, 0)
        self._evaluations = 0
        self._slot_seconds: dict[str, float] = {}
        self._seconds: dict[Cause, float] = {}
        self._taken: dict[Cause, float] = {}
        self._episodes: dict[str, Wait] = {}

    def begin(self, episode_id: str, group_id: str, now: float, evaluation: bool = False) -> None:
        """An episode takes a slot; it is in its environment until `move` says otherwise."""
        self._pass(now)
        self._episodes[episode_id] = Wait(episode_id, group_id, Doing.ENVIRONMENT, now, evaluation)
        self._counts[Doing.ENVIRONMENT] += 1
        self._evaluations += evaluation

    def move(self, episode_id: str, doing: Doing, now: float) -> Doing:
        """The episode does something else from ``now`` on; returns what it did before."""
        wait = self._episodes.get(episode_id)
        if wait is None or wait.doing is doing:
            return doing
        self._pass(now)
        self._counts[wait.doing] -= 1
        self._counts[doing] += 1
        self._episodes[episode_id] = wait._replace(doing=doing, since=now)
        return wait.doing

    def end(self, episode_id: str, now: float) -> None:
        """The episode gives its slot back."""
        self._pass(now)
        wait = self._episodes.pop(episode_id, None)
        if wait is not None:
            self._counts[wait.doing] -= 1
            self._evaluations -= wait.evaluation

    def waits(self, groups: set[str], limit: int) -> list[Wait]:
        """The episodes that have been in one state for longest, those of ``groups`` first."""
        return sorted(self._episodes.values(), key=lambda wait: (wait.group_id not in groups, wait.since))[:limit]

    def slot_seconds(self, now: float) -> dict[str, float]:
        """Slot-seconds so far by state, and ``free`` ones; ``empty`` seconds."""
        self._pass(now)
        return dict(self._slot_seconds)

    def seconds(self, now: float) -> dict[Cause, float]:
        """The worker's seconds, shared out by what its slots did; they add up to the wall-clock."""
        self._pass(now)
        return dict(self._seconds)

    def take_spans(self, now: float | None = None) -> list[Span]:
        """The time since the last call, the causes laid end to end."""
        if now is not None:
            self._pass(now)
        spans, at = [], self._taken_to
        for cause, total in self._seconds.items():
            seconds = total - self._taken.get(cause, 0.0)
            if seconds > 0:
                spans.append(Span(self.lane, cause, at, at + seconds))
                at += seconds
        self._taken, self._taken_to = dict(self._seconds), self._now
        return spans

    def _pass(self, now: float) -> None:
        elapsed = now - self._now
        if elapsed <= 0:
            return
        self._now = now
        if not self._episodes:
            self._slot_seconds[EMPTY] = self._slot_seconds.get(EMPTY, 0.0) + elapsed
        free = max(0, self.capacity - len(self._episodes) + self._evaluations)
        total = free + len(self._episodes)
        for doing, count in self._counts.items():
            if count:
                self._slot_seconds[doing.value] = self._slot_seconds.get(doing.value, 0.0) + count * elapsed
                cause = CAUSES[doing]
                self._seconds[cause] = self._seconds.get(cause, 0.0) + elapsed * count / total
        if free:
            self._slot_seconds[FREE] = self._slot_seconds.get(FREE, 0.0) + free * elapsed
            self._seconds[Cause.IDLE] = self._seconds.get(Cause.IDLE, 0.0) + elapsed * free / total
