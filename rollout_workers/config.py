"""Settings of rollout generation (`rollout:` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict  # noqa: UP035 - OmegaConf 2.3 reads typing.Dict


@dataclass
class RolloutConfig:
    """How episodes are run. Lengths are in tokens, times in seconds."""

    loop: str = "tool_agent"
    """A bundled loop (`tool_agent`, `single_turn`) or `package.module:function`."""
    workers: int = 1
    concurrency: int = 128
    """Episodes in flight over all workers."""
    adaptive_concurrency: bool = False
    """Let each worker find by itself how many episodes the engines' KV carries; `concurrency` is then the most. Without
    effect in deterministic runs."""
    groups_per_update: int = 16
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_turns: int = 8
    max_tokens: int = 32
    """Sampled tokens per turn, unless the loop says otherwise."""
    max_episode_tokens: int = 512
    """Length of one trajectory, prompt and observations included; a longer one ends as `truncated`."""
    episode_timeout_s: float = 600.0
    on_rewrite: str = "fail"
    """When the chat template rewrites history: `fail` the episode or `fork` a new trajectory."""
    max_attempts: int = 3
    """How often an episode is started again after an environment, reward or system fault."""
    args: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Passed to the loop as keyword arguments."""

    def validate(self) -> None:
        """Raise ValueError naming the first setting that cannot work."""
        positive = (
            "workers",
            "concurrency",
            "groups_per_update",
            "group_size",
            "max_turns",
            "max_tokens",
            "max_attempts",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        if self.concurrency < self.group_size:
            raise ValueError(
                f"rollout.concurrency ({self.concurrency}) must be at least rollout.group_size ({self.group_size}): "
                "a group is dispatched whole"
            )
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k must not be negative (0 switches it off), got {self.top_k}")
        if self.max_episode_tokens <= self.max_tokens:
            raise ValueError(
                f"rollout.max_episode_tokens ({self.max_episode_tokens}) must exceed rollout.max_tokens ({self.max_tokens})"
            )
        if self.episode_timeout_s <= 0:
            raise ValueError(f"rollout.episode_timeout_s must be positive, got {self.episode_timeout_s}")
        if self.on_rewrite not in ("fail", "fork"):
            raise ValueError(f"rollout.on_rewrite must be 'fail' or 'fork', got {self.on_rewrite!r}")
