"""What the queue writes to its journal, beside group headers (``open``) and episode entries (``add``, ``late``)."""

from __future__ import annotations

import msgspec


class FailRecord(msgspec.Struct, frozen=True):
    """Journal record ``fail``: an episode was given up."""

    group_id: str
    episode_id: str
    reason: str


class GroupRecord(msgspec.Struct, frozen=True):
    """Journal records ``ready`` and ``drop`` (the latter with a reason)."""

    group_id: str
    reason: str = ""


class AckRecord(msgspec.Struct, frozen=True):
    """Journal record ``ack``: groups were trained at ``step``."""

    step: int
    group_ids: list[str]
    trained_tokens: int
    masked_tokens: int


class RevertRecord(msgspec.Struct, frozen=True):
    """Journal record ``revert``: acks after ``committed_step`` are void from here on."""

    committed_step: int
