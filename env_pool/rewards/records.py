"""What a reward branch judges, and what comes of it."""

from __future__ import annotations

from typing import Any

import msgspec

from experience.records import Status, Task


class RewardSample(msgspec.Struct, frozen=True, kw_only=True):
    """One finished episode, as a branch sees it: plain data."""

    episode_id: str
    task: Task
    outcome: dict[str, Any]
    """What the environment's ``outcome()`` returned."""
    final_text: str = ""
    """The last text that the model wrote."""
    text: str = ""
    """The whole conversation as text."""
    status: Status = Status.FINISHED
    turns: int = 0
    """Generations of the model."""
    sampled_tokens: int = 0


class RewardResult(msgspec.Struct, frozen=True, kw_only=True):
    """``reward`` is the weighted sum of the branches; None, with the reason in ``error``, when there is no reward."""

    reward: float | None
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    """Value of each branch under its label, unweighted, and of its own parts under ``label/part``."""
    error: str | None = None
    seconds: float = 0.0


class RewardCall(msgspec.Struct, frozen=True, kw_only=True):
    """From client to actor: score ``sample``; without one, cancel the scoring called ``key``."""

    key: str
    sample: RewardSample | None = None
