"""What a rollout worker is told to do and what it reports. Plain records, msgpack on the wire."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from experience.records import GroupHeader, Status


class Purpose(StrEnum):
    TRAIN = "train"
    EVALUATE = "evaluate"


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """Run episodes ``members`` (indices within the group) of a group."""

    header: GroupHeader
    members: list[int]
    purpose: Purpose = Purpose.TRAIN
    pinned_version: int | None = None
    """Generate with exactly this version (evaluation)."""
    collection: str = ""
    """Under which name an evaluation keeps its trajectories."""
    opened_at: float | None = None
    """When the group was opened (Unix seconds)."""


class EpisodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one episode ended: metadata only."""

    group_id: str
    episode_id: str
    purpose: Purpose
    status: Status
    reward: float | None = None
    domain: str = ""
    difficulty: int = 0
    turns: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1
    rewrites: int = 0
    reason: str | None = None
    """Short name of what failed, when ``status`` is `system_error`."""
    cause: str | None = None
    """The error in words, with the tail of the traceback where user code raised."""


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of what a worker is doing, and counters since it started."""

    running: int = 0
    limit: int = 0
    """Training episodes that may run at once, now."""
    queued: int = 0
    generating: int = 0
    in_environment: int = 0
    in_reward: int = 0
    delivering: int = 0
    finished: int = 0
    failed: int = 0
    retried: int = 0
    replayed_steps: int = 0
    continued_requests: int = 0
    rewrites: int = 0
