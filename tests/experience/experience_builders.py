"""Small records for the tests of experience/."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experience.config import OnViolation, QueueConfig, StalenessConfig
from experience.entries import EpisodeEntry, make_entry
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.records import GroupHeader, Status, Task, Trajectory
from experience.staleness import make_policy

PROMPT = 2


def trajectory(group_id: str, episode_id: str, versions: Sequence[int], padding: int = 0) -> Trajectory:
    """A trajectory with a prompt of two tokens and one sampled token for each version given."""
    length = PROMPT + len(versions) + padding
    stamped = np.full(length, -1, np.int32)
    stamped[PROMPT : PROMPT + len(versions)] = versions
    return Trajectory(
        trajectory_id=f"{episode_id}.0",
        episode_id=episode_id,
        group_id=group_id,
        task_id="task",
        tokens=np.arange(length, dtype=np.int32),
        trainable=stamped >= 0,
        logprobs=np.where(stamped >= 0, -0.5, 0.0).astype(np.float32),
        versions=stamped,
        reward=1.0,
    )


def entry(
    group_id: str,
    episode_id: str,
    versions: Sequence[int] = (0,),
    padding: int = 0,
    status: Status = Status.FINISHED,
    reward: float | None = 1.0,
) -> EpisodeEntry:
    """A finished episode of one trajectory."""
    record = trajectory(group_id, episode_id, versions, padding)
    record.reward = reward
    record.status = status
    return make_entry([record])


def header(index: int, size: int = 2, version_floor: int = 0) -> GroupHeader:
    """A group ``g<index>``."""
    task = Task(task_id="task", environment="shop", payload={"index": index})
    return GroupHeader(group_id=f"g{index}", index=index, task=task, size=size, version_floor=version_floor, seed=index)


def make_queue(
    groups_per_update: int = 2,
    target_lag: float = 1.0,
    max_lag: int = 2,
    on_violation: OnViolation = OnViolation.mask_tokens,
    config: QueueConfig | None = None,
    journal: Journal | None = None,
) -> ExperienceQueue:
    """A queue with its policy."""
    staleness = StalenessConfig(target_lag=target_lag, max_lag=max_lag, on_violation=on_violation)
    return ExperienceQueue(config or QueueConfig(), make_policy(staleness, groups_per_update), journal=journal)


def fill(queue: ExperienceQueue, index: int, size: int = 2, versions: Sequence[int] = (0,), floor: int = 0) -> str:
    """Opens group ``index`` and adds all its episodes; returns its id."""
    group = header(index, size, floor)
    queue.open(group, 0.0)
    for episode_id in group.episode_ids:
        queue.add(entry(group.group_id, episode_id, versions), 0.0)
    return group.group_id
