"""Configuration of tasks, environments and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict  # noqa: UP035 - OmegaConf 2.3 reads typing.Dict

BUNDLED_REWARDS = ("rule", "overlong")
NOISE_KINDS = ("timeout", "error", "missing_field")


@dataclass
class TasksConfig:
    """Which tasks to train and evaluate on."""

    environment: str = "shop"
    """A registered name, or ``package.module:Class``."""
    held_out: int = 200
    """How many held-out tasks an evaluation runs."""
    sampler: str = "uniform"
    """How the next task is chosen: ``uniform`` takes indices 0, 1, 2, ..."""
    options: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Passed to the environment's ``make_task``."""

    def validate(self) -> None:
        """Raises ValueError naming the key and what would be right."""
        if not self.environment:
            raise ValueError("tasks.environment is empty; give a registered name or package.module:Class")
        if self.held_out < 0:
            raise ValueError(f"tasks.held_out must be at least 0, got {self.held_out}")
        if self.sampler != "uniform":
            raise ValueError(f"tasks.sampler must be 'uniform', got {self.sampler!r}")


@dataclass
class EnvironmentsConfig:
    """The environment pool."""

    actors: int = 1
    """Processes that host environments; each hosts any number of them."""
    step_timeout_s: float = 30.0
    """Longest time one ``step`` (or ``outcome``, ``snapshot``) may take before the environment counts as hung."""
    reset_timeout_s: float = 60.0
    """The same for ``reset`` and ``restore``."""
    recovery_timeout_s: float = 120.0
    """How long an episode waits for an actor while none is alive."""
    max_recoveries: int = 2
    """How many actors one episode may lose before it ends as ``system_error``."""
    max_hung: int = 16
    """An actor with this many hung environments ends itself and is replaced."""
    idle_lease_s: float = 3600.0
    """An environment that nobody has called for this long is closed: its worker is gone."""
    noise: Dict[str, float] = field(default_factory=dict)  # noqa: UP006
    """Share of steps disturbed, by kind: ``timeout``, ``error``, ``missing_field``."""

    def validate(self) -> None:
        """Raises ValueError naming the key and what would be right."""
        for name in ("actors", "max_hung"):
            if getattr(self, name) < 1:
                raise ValueError(f"environments.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("step_timeout_s", "reset_timeout_s", "recovery_timeout_s", "idle_lease_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"environments.{name} must be positive, got {getattr(self, name)}")
        if self.max_recoveries < 0:
            raise ValueError(f"environments.max_recoveries must be at least 0, got {self.max_recoveries}")
        for kind, share in self.noise.items():
            if kind not in NOISE_KINDS:
                raise ValueError(f"environments.noise.{kind}: valid kinds are {', '.join(NOISE_KINDS)}")
            if not 0 <= share <= 1:
                raise ValueError(f"environments.noise.{kind} must lie between 0 and 1, got {share}")
        if sum(self.noise.values()) > 1:
            raise ValueError(f"environments.noise: the shares add up to {sum(self.noise.values()):g}, at most 1 can be")


@dataclass
class RewardConfig:
    """One reward branch."""

    kind: str = "rule"
    """``rule`` (the environment's own verifier), ``overlong`` (soft punishment of length), or ``package.module:function_or_Class`` of the user's."""
    weight: float = 1.0
    """Its factor in the sum that is the reward."""
    name: str = ""
    """Name of its part in records and metrics; default: the last word of ``kind``."""
    timeout_s: float = 30.0
    """Longest time of one attempt."""
    retries: int = 2
    """Further attempts after a failure or time-out. When all fail there is no reward, never 0."""
    args: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Keyword arguments of the function, or of the class's constructor."""

    @property
    def label(self) -> str:
        """``name``, or the last word of ``kind``."""
        return self.name or self.kind.replace(":", ".").rsplit(".", 1)[-1]

    def validate(self) -> None:
        """Raises ValueError naming the key and what would be right."""
        if self.kind not in BUNDLED_REWARDS and ":" not in self.kind:
            raise ValueError(f"rewards: kind must be 'rule', 'overlong' or 'package.module:name', got {self.kind!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"rewards ({self.kind}): timeout_s must be positive, got {self.timeout_s}")
        if self.retries < 0:
            raise ValueError(f"rewards ({self.kind}): retries must be at least 0, got {self.retries}")
