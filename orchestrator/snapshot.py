"""What the terminal view shows of a run at one moment: plain data that crosses processes as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Snapshot:
    """One moment of a run. Times are in seconds, sizes in bytes, rates and rewards in 0..1 unless named otherwise.

    The dictionaries carry the keys named at each field; a missing key is shown as nothing.
    """

    run_dir: str = ""
    mode: str = "async"
    phase: str = "starting"
    """``starting``, ``warm-up``, ``evaluating``, ``training``, ``saving``, ``finished`` or ``failed``."""
    step: int = 0
    steps: int = 0
    version: int = 0
    wall_s: float = 0.0
    eta_s: float | None = None

    reward_mean: float | None = None
    success_rate: float | None = None
    reward_history: list[float] = field(default_factory=list)
    success_history: list[float] = field(default_factory=list)
    """One number a step, oldest first."""

    lag_mean: float | None = None
    lag_max: int | None = None
    max_lag: int = 0
    tokens_per_s: float | None = None
    step_s: float | None = None

    engines: list[dict[str, Any]] = field(default_factory=list)
    """``name, state, version, running, waiting, kv_used, tokens_per_s``."""
    workers: list[dict[str, Any]] = field(default_factory=list)
    """``name, state, episodes, finished, failed``; ``generating, in_environment, in_reward`` say where they are."""
    environments: list[dict[str, Any]] = field(default_factory=list)
    """``name, state, leases``."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """``name, state, pending, scored``."""
    queue: dict[str, Any] = field(default_factory=dict)
    """``in_flight, ready, leased, dropped`` (groups) and ``bytes``."""
    learner: dict[str, Any] = field(default_factory=dict)
    """``phase`` (``waiting``, ``training``, ``publishing``, ``saving``), ``state``; ``groups, groups_per_update`` of
    the present step; the shares ``masked`` and ``busy``."""

    evals: list[dict[str, Any]] = field(default_factory=list)
    """``step, success, reward, tasks``, oldest first."""
    events: list[str] = field(default_factory=list)
    """What a person should notice (an actor replaced, tokens masked, ...), newest last."""
    error: str | None = None
    """The first cause when ``phase`` is ``failed``."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Snapshot:
        """The reverse of :meth:`to_dict`; keys that this version does not know are left out."""
        names = {item.name for item in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})
