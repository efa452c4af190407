"""Grows one trajectory token by token. Knows nothing of text, engines or time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from experience.records import NOT_SAMPLED, Status, Trajectory, Turn
from rollout_workers.engines.protocol import TokenChunk


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
        self.tokens: list[int] = []
        self.trainable: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.turns: list[Turn] = []
        self.sampled = 0
        """Number of trainable tokens."""
        self.generations = 0
        """Turns that were sampled, those shared with the parent included."""

    def __len__(self) -> int:
        return len(self.tokens)

    def prompt(self) -> npt.NDArray[np.int32]:
        """All tokens so far: the context of the next generation."""
        return np.asarray(self.tokens, dtype=np.int32)

    def append_context(self, tokens: Sequence[int], role: str, at: float) -> None:
        """Add tokens that no engine sampled (``role`` is ``prompt`` or ``observation``)."""
        if not tokens:
            return
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.trainable.extend([False] * len(tokens))
        self.logprobs.extend([0.0] * len(tokens))
        self.versions.extend([NOT_SAMPLED] * len(tokens))
        self.turns.append(Turn(start=start, end=len(self.tokens), role=role, began_at=at, ended_at=at))

    def append_generation(self, chunk: TokenChunk, began_at: float, ended_at: float) -> None:
        """Add sampled tokens with the log-probabilities and versions that their engine gave them."""
        start = len(self.tokens)
        self.tokens.extend(chunk.tokens.tolist())
        self.trainable.extend([True] * len(chunk.tokens))
        self.logprobs.extend(chunk.logprobs.tolist())
        self.versions.extend(chunk.versions.tolist())
        self.turns.append(Turn(start=start, end=len(self.tokens), role="model", began_at=began_at, ended_at=ended_at))
        self.sampled += len(chunk.tokens)
        self.generations += 1

    def branch(self, trajectory_id: str) -> TrajectoryBuilder:
        """A copy to go on from separately. What is shared stays trainable in the parent only."""
        child = TrajectoryBuilder(trajectory_id, self.episode_id, self.group_id, self.task_id, self.trajectory_id)
        child.tokens = list(self.tokens)
        child.trainable = [False] * len(self.tokens)
        child.logprobs = list(self.logprobs)
        child.versions = list(self.versions)
        child.turns = list(self.turns)
        child.generations = self.generations
        return child

    def build(self, status: Status, domain: str, difficulty: int, temperature: float, attempt: int) -> Trajectory:
        return Trajectory(
            trajectory_id=self.trajectory_id,
            episode_id=self.episode_id,
            group_id=self.group_id,
            task_id=self.task_id,
            tokens=self.prompt(),
            trainable=np.asarray(self.trainable, dtype=np.bool_),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            versions=np.asarray(self.versions, dtype=np.int32),
            status=status,
            domain=domain,
            difficulty=difficulty,
            temperature=temperature,
            turns=list(self.turns),
            parent=self.parent,
            attempt=attempt,
        )
