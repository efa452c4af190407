"""Settings of the staleness contract and of the experience queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from experience.lag_controller import AdaptiveLagConfig


class OnViolation(Enum):
    """What happens to tokens that became too old (member names are what a YAML file says)."""

    mask_tokens = "mask_tokens"
    """Old tokens stay as context and carry no loss; young ones train."""
    drop_group = "drop_group"
    """A group with any token that is too old is dropped."""
    wait = "wait"
    """The learner waits for the group that would otherwise become too old."""


class LagControl(Enum):
    """Who sets ``target_lag`` during a run."""

    fixed = "fixed"
    adaptive = "adaptive"


class QueueOrder(Enum):
    """Which of the finished groups is delivered first."""

    oldest_first = "oldest_first"
    """The one dispatched first."""
    ready_first = "ready_first"
    """The one finished first."""
    windowed = "windowed"
    """The one dispatched first, but none ``window`` or more positions after the oldest not yet delivered."""


class QueueTransport(Enum):
    """How episodes and groups travel to and from the queue's process."""

    socket = "socket"
    """Over a socket of the queue's own (Unix on its machine, TCP from others); where it is not reached, as Ray calls."""
    ray = "ray"
    """As Ray calls."""


@dataclass
class StalenessConfig:
    """Three separate knobs: where the lag settles, how old a trained token may be, and what happens beyond that."""

    target_lag: float = 1.0
    """Policy versions that dispatching runs ahead of the learner; fractions are allowed."""
    max_lag: int = 4
    """No token with a larger lag carries loss."""
    on_violation: OnViolation = OnViolation.mask_tokens
    controller: LagControl = LagControl.fixed
    """``adaptive`` moves ``target_lag`` between ``adaptive.min_lag`` and ``max_lag`` during the run."""
    adaptive: AdaptiveLagConfig = field(default_factory=AdaptiveLagConfig)

    def validate(self) -> None:
        """Raises ``ValueError`` with what is wrong and what would be right."""
        if not 0 <= self.target_lag < float("inf"):
            raise ValueError(f"staleness.target_lag must be a number of versions >= 0, got {self.target_lag}")
        if self.max_lag < 0:
            raise ValueError(f"staleness.max_lag must be >= 0, got {self.max_lag}")
        if self.controller is LagControl.adaptive:
            self.adaptive.validate(self.max_lag)
            if self.max_lag == 0:
                raise ValueError(
                    "staleness.controller=adaptive needs staleness.max_lag >= 1: there is nothing to choose from"
                )
        if self.on_violation is OnViolation.wait and self.target_lag > self.max_lag:
            raise ValueError(
                f"staleness.on_violation=wait needs staleness.target_lag <= staleness.max_lag, got {self.target_lag} > "
                f"{self.max_lag}: more groups would be in flight than can be consumed before they are too old"
            )


@dataclass
class QueueConfig:
    """The experience queue."""

    order: QueueOrder = QueueOrder.oldest_first
    window: int = 64
    """Width of the window in groups; used by ``order: windowed`` only."""
    budget_mb: float = 1024.0
    """Finished and partly finished groups held in memory, in MiB, before producers have to wait."""
    transport: QueueTransport = QueueTransport.socket
    journal: bool = True
    """Keep every trajectory on disk, for ``resume`` and ``show``."""
    min_size: int = 2
    """Episodes that a group needs to be trained when others failed or are late."""
    close_after_s: Optional[float] = None  # noqa: UP045 (the configuration library reads this form)
    """Seconds after dispatch at which a group with ``min_size`` episodes is closed without the rest; null: never."""

    require_signal: bool = False
    """Drop finished groups whose rewards are all equal (reason ``no_signal``); others are dispatched in their place."""
    max_without_signal: int = 512
    """So many groups without signal in a row, with no other between them, end the run."""

    def validate(self) -> None:
        """Raises ``ValueError`` with what is wrong and what would be right."""
        if self.max_without_signal < 1:
            raise ValueError(f"queue.max_without_signal must be >= 1 group, got {self.max_without_signal}")
        if self.window < 1:
            raise ValueError(f"queue.window must be >= 1 group, got {self.window}")
        if not self.budget_mb > 0:
            raise ValueError(f"queue.budget_mb must be > 0 MiB, got {self.budget_mb}")
        if self.min_size < 1:
            raise ValueError(f"queue.min_size must be >= 1 episode, got {self.min_size}")
        if self.close_after_s is not None and not self.close_after_s > 0:
            raise ValueError(f"queue.close_after_s must be > 0 seconds, or null for none, got {self.close_after_s}")
