"""Settings of the critic, and of data that is trained on beside the step's groups."""

from __future__ import annotations

from dataclasses import dataclass

REPLAY_CORRECTIONS = ("tis", "masked_is", "double_sided", "unweighted")


@dataclass
class CriticConfig:
    """The value model of ``learner.advantage=gae``."""

    path: str | None = None
    """Directory of the model that it starts from; null: the policy's."""
    lr: float = 1e-3
    clip: float | None = 0.2
    """Values move at most so far in a step before their loss is bounded; null: no bound."""
    clip_grad: float = 1.0
    """Largest norm of its gradient; 0 turns clipping off."""
    pretrain_steps: int = 0
    """In so many steps at the beginning only the critic learns, while the policy stays as it is."""

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.lr <= 0:
            raise ValueError(f"learner.critic.lr={self.lr} must be greater than 0")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"learner.critic.clip={self.clip} must be greater than 0, or null")
        for name in ("clip_grad", "pretrain_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"learner.critic.{name}={getattr(self, name)} must not be negative")


@dataclass
class SftConfig:
    """Demonstrations whose likelihood is raised in every update."""

    dataset: str | None = None
    """A .jsonl file, a conversation a line: ``{"messages": [...]}``, or ``{"tokens": [...], "trained": [...]}``; null: none."""
    coef: float = 0.1
    """Weight of the mean loss of their tokens, beside the step's own."""
    batch_size: int = 16
    """Demonstrations drawn for an update."""

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.coef <= 0:
            raise ValueError(
                f"learner.sft.coef={self.coef} must be greater than 0; for none set learner.sft.dataset=null"
            )
        if self.batch_size < 1:
            raise ValueError(f"learner.sft.batch_size={self.batch_size} must be at least 1")


@dataclass
class ReplayConfig:
    """Groups that an earlier run (or an earlier stage) recorded, trained on beside the step's own."""

    run: str | None = None
    """Directory of the recorded run, or of its journal; null: none."""
    groups: int = 4
    """Groups drawn for an update."""
    correction: str = "double_sided"
    """As `learner.correction`, for these groups alone: their behaviour policy is another run's, and no `max_lag` holds."""
    correction_level: str = "token"

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.groups < 1:
            raise ValueError(
                f"learner.replay.groups={self.groups} must be at least 1; for none set learner.replay.run=null"
            )
        if self.correction not in REPLAY_CORRECTIONS:
            raise ValueError(
                f"learner.replay.correction={self.correction!r} is unknown: use one of {', '.join(REPLAY_CORRECTIONS)}"
            )
        if self.correction_level not in ("token", "sequence"):
            raise ValueError(
                f"learner.replay.correction_level={self.correction_level!r} is unknown: use token or sequence"
            )
