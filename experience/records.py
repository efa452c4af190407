"""The records that travel: task, turn, trajectory, group.

A *task* is one prompt plus what its environment and verifier need. An *episode* is one attempt at a task; it yields one
or more *trajectories* (forks, sub-agents, context rewrites) that share its ``episode_id``. A *group* holds the episodes
of one task that are compared with each other.

All arrays of one trajectory have the same length T. ``logprobs`` and ``versions`` come from the engine that sampled the
token; where nothing was sampled they are 0 and -1.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

NOT_SAMPLED = -1
"""The ``versions`` entry of a token that no engine sampled (prompt, tool or environment tokens)."""


class Status(StrEnum):
    """How an episode ended. ``system_error`` is never trained; the other three are."""

    FINISHED = "finished"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    SYSTEM_ERROR = "system_error"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One problem. ``payload`` is plain data (msgpack types) that the environment and the verifier understand."""

    task_id: str
    environment: str
    payload: dict[str, Any]
    domain: str = ""
    difficulty: int = 0


class Turn(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens ``start:end`` of a trajectory: one prompt, one generation or one observation, with wall-clock seconds."""

    start: int
    end: int
    role: str
    """``prompt``, ``model`` or ``observation``."""
    began_at: float = 0.0
    ended_at: float = 0.0


class Trajectory(msgspec.Struct, kw_only=True):
    """The token-level record of an episode (or of one branch of it)."""

    trajectory_id: str
    episode_id: str
    group_id: str
    task_id: str
    tokens: npt.NDArray[np.int32]
    trainable: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    status: Status = Status.FINISHED
    reward: float | None = None
    reward_parts: dict[str, float] = msgspec.field(default_factory=dict)
    domain: str = ""
    difficulty: int = 0
    temperature: float = 1.0
    turns: list[Turn] = msgspec.field(default_factory=list)
    timings: dict[str, float] = msgspec.field(default_factory=dict)
    parent: str | None = None
    """``trajectory_id`` this one was forked from, if any."""
    attempt: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.trainable), len(self.logprobs), len(self.versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"trajectory {self.trajectory_id}: tokens, trainable, logprobs and versions must have one length, got "
                f"{len(self.tokens)}, {len(self.trainable)}, {len(self.logprobs)}, {len(self.versions)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled_tokens(self) -> int:
        """How many of the tokens an engine sampled for training."""
        return int(np.count_nonzero(self.trainable))

    @property
    def newest_version(self) -> int | None:
        """The largest version among the sampled tokens; None when nothing was sampled."""
        sampled = self.versions[self.trainable]
        return int(sampled.max()) if len(sampled) else None

    @property
    def oldest_version(self) -> int | None:
        """The smallest version among the sampled tokens; None when nothing was sampled."""
        sampled = self.versions[self.trainable]
        return int(sampled.min()) if len(sampled) else None


class GroupHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a group when it is dispatched."""

    group_id: str
    index: int
    """Position in dispatch order, from 0, never reused within a run."""
    task: Task
    size: int
    """Number of episodes expected."""
    version_floor: int
    """The oldest policy version that any engine served at dispatch: no token of the group is older."""
    seed: int

    def episode_id(self, position: int) -> str:
        """The id of the episode at ``position`` (0 to ``size`` - 1); an episode that is run again keeps it."""
        return f"{self.group_id}-{position}"

    @property
    def episode_ids(self) -> list[str]:
        """The ids of all episodes of the group."""
        return [self.episode_id(position) for position in range(self.size)]


class Group(msgspec.Struct, kw_only=True):
    """A group that is complete, or was closed with fewer members than expected."""

    header: GroupHeader
    trajectories: list[Trajectory]

    @property
    def group_id(self) -> str:
        return self.header.group_id

    @property
    def sampled_tokens(self) -> int:
        return sum(t.sampled_tokens for t in self.trajectories)
