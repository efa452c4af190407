"""Grows one trajectory token by token. Knows nothing of text, engines or time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from experience.records import NOT_SAMPLED, Status, Trajectory, Turn
from rollout_workers.engines.protocol import TokenChunk

ROOM = 256
"""Tokens that a trajectory has room for at first; the room is doubled when it is full."""


class TrajectoryBuilder:
    """The four arrays of a trajectory and its turn boundaries, append-only.

    >>> builder = TrajectoryBuilder("e/0", "e", "g", "t")
    >>> builder.append_context([5, 6], "prompt", 0.0)
    >>> len(builder)
    2
    """

    def __init__(
        self, trajectory_id: str, episode_id: str, group_id: str, task_id: str, parent: str | None = None
    ) -> None:
        self.trajectory_id = trajectory_id
        self.episode_id = episode_id
        self.group_id = group_id
        self.task_id = task_id
        self.parent = parent
        self._length = 0
        self._tokens = np.empty(ROOM, np.int32)
        self._trainable = np.empty(ROOM, np.bool_)
        self._logprobs = np.empty(ROOM, np.float32)
        self._versions = np.empty(ROOM, np.int32)
        self.turns: list[Turn] = []
        self.sampled = 0
        """Number of trainable tokens."""
        self.generations = 0
        """Turns that were sampled, those shared with the parent included."""

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> list[int]:
        """A copy of all tokens so far."""
        tokens: list[int] = self._tokens[: self._length].tolist()
        return tokens

    def prompt(self) -> npt.NDArray[np.int32]:
        """All tokens so far, the context of the next generation: a view that later tokens do not change."""
        view = self._tokens[: self._length]
        view.flags.writeable = False
        return view

    def tail(self, count: int, before: int = 0) -> list[int]:
        """At most ``count`` tokens, the last ones of those that stand before the last ``before``."""
        end = self._length - before
        tokens: list[int] = self._tokens[max(0, end - count) : end].tolist()
        return tokens

    def append_context(self, tokens: Sequence[int], role: str, at: float) -> None:
        """Add tokens that no engine sampled (``role`` is ``prompt`` or ``observation``)."""
        if not tokens:
            return
        start, end = self._grow(len(tokens))
        self._tokens[start:end] = tokens
        self._trainable[start:end] = False
        self._logprobs[start:end] = 0.0
        self._versions[start:end] = NOT_SAMPLED
        self.turns.append(Turn(start=start, end=end, role=role, began_at=at, ended_at=at))

    def append_generation(self, chunk: TokenChunk, began_at: float, ended_at: float) -> None:
        """Add sampled tokens with the log-probabilities and versions that their engine gave them."""
        start, end = self._grow(len(chunk.tokens))
        self._tokens[start:end] = chunk.tokens
        self._trainable[start:end] = True
        self._logprobs[start:end] = chunk.logprobs
        self._versions[start:end] = chunk.versions
        self.turns.append(Turn(start=start, end=end, role="model", began_at=began_at, ended_at=ended_at))
        self.sampled += end - start
        self.generations += 1

    def branch(self, trajectory_id: str) -> TrajectoryBuilder:
        """A copy to go on from separately. What is shared stays trainable in the parent only."""
        child = TrajectoryBuilder(trajectory_id, self.episode_id, self.group_id, self.task_id, self.trajectory_id)
        child._length = self._length
        child._tokens = self._tokens.copy()
        child._trainable = np.zeros_like(self._trainable)
        child._logprobs = self._logprobs.copy()
        child._versions = self._versions.copy()
        child.turns = list(self.turns)
        child.generations = self.generations
        return child

    def _grow(self, count: int) -> tuple[int, int]:
        """Make room for ``count`` tokens; returns where they begin and end."""
        start, end = self._length, self._length + count
        room = len(self._tokens)
        if end > room:
            added = max(end, 2 * room) - room
            self._tokens = np.concatenate([self._tokens, np.empty(added, np.int32)])
            self._trainable = np.concatenate([self._trainable, np.empty(added, np.bool_)])
            self._logprobs = np.concatenate([self._logprobs, np.empty(added, np.float32)])
            self._versions = np.concatenate([self._versions, np.empty(added, np.int32)])
        self._length = end
        return start, end

    def build(self, status: Status, domain: str, difficulty: int, temperature: float, attempt: int) -> Trajectory:
        return Trajectory(
            trajectory_id=self.trajectory_id,
            episode_id=self.episode_id,
            group_id=self.group_id,
            task_id=self.task_id,
            tokens=self.prompt(),
            trainable=self._trainable[: self._length],
            logprobs=self._logprobs[: self._length],
            versions=self._versions[: self._length],
            status=status,
            domain=domain,
            difficulty=difficulty,
            temperature=temperature,
            turns=list(self.turns),
            parent=self.parent,
            attempt=attempt,
        )
