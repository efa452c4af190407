"""What a simulated run has spent and made so far, and the difference between two moments of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from experience.accounting import Cause


@dataclass
class Accounts:
    """Running totals. Seconds are accelerator-seconds of the modelled cluster, tokens are carried tokens."""

    at: float = 0.0
    """The moment."""
    steps: int = 0
    rollout: dict[Cause, float] = field(default_factory=dict)
    """Of the accelerators that roll out, by what they did; standing still is broken down by its reason."""
    learner: dict[Cause, float] = field(default_factory=dict)
    """Of the accelerators that train, by what they did."""
    lags: Counter[int] = field(default_factory=Counter)
    """Lag -> trained tokens."""
    generated: int = 0
    trained: int = 0
    masked: int = 0
    wasted: int = 0
    context: int = 0
    """Tokens of the trained trajectories, prompts and observations included."""
    episodes: int = 0
    """Trajectories that were trained."""
    prompt: int = 0
    """Prompt tokens that requests brought."""
    cached: int = 0
    """Those of them that were in the KV cache."""
    makespans: list[float] = field(default_factory=list)
    """Seconds of each step from its first dispatch to its last finished group."""
    overheads: list[float] = field(default_factory=list)
    """Seconds of each step in which the accelerators changed roles or waited for weights (time-shared runs)."""

    def since(self, earlier: Accounts) -> Accounts:
        """What was added since ``earlier``, an older state of the same run."""
        return Accounts(
            at=self.at - earlier.at,
            steps=self.steps - earlier.steps,
            rollout=_less(self.rollout, earlier.rollout),
            learner=_less(self.learner, earlier.learner),
            lags=Counter({lag: self.lags[lag] - earlier.lags[lag] for lag in self.lags}),
            **{
                name: getattr(self, name) - getattr(earlier, name)
                for name in ("generated", "trained", "masked", "wasted", "context", "episodes", "prompt", "cached")
            },
            makespans=self.makespans[len(earlier.makespans) :],
            overheads=self.overheads[len(earlier.overheads) :],
        )


def _less(later: dict[Cause, float], earlier: dict[Cause, float]) -> dict[Cause, float]:
    return {cause: seconds - earlier.get(cause, 0.0) for cause, seconds in later.items()}
