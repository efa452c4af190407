"""What the pool and an environment actor say to each other."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from env_pool.environment import Observation
from experience.records import Task


class Method(StrEnum):
    """What is asked of an environment."""

    RESET = "reset"
    RESTORE = "restore"
    STEP = "step"
    OUTCOME = "outcome"
    SNAPSHOT = "snapshot"
    CLOSE = "close"


class Call(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One call on the environment that ``lease`` stands for; ``reset`` and ``restore`` create it."""

    lease: str
    method: Method
    timeout_s: float
    task: Task | None = None
    action: str = ""
    state: bytes = b""
    seed: int = 0
    """Of the episode; decides its noise."""
    step: int = 0
    """How many steps came before this one, or before the snapshot."""


class FaultRecord(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """An :class:`~env_pool.errors.EnvironmentFault` as data."""

    environment: str
    method: str
    reason: str
    detail: str = ""


class CallResult(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """``value`` is the encoded result; exactly one of ``fault`` and ``missing`` may be set instead."""

    value: bytes = b""
    fault: FaultRecord | None = None
    missing: bool = False
    """The actor holds no such lease (it was restarted): the environment has to be rebuilt."""


class Started(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Result of ``reset``."""

    observation: Observation
    deterministic: bool
