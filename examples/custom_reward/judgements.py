"""Two reward branches: a function, and a class that takes arguments."""

from __future__ import annotations

from env_pool.environment import VerifierResult
from env_pool.rewards.records import RewardSample


def asked(sample: RewardSample) -> float:
    """1 when the agent tried a tool at all, rightly or wrongly."""
    return float(sample.outcome["calls"] + sample.outcome["faults"] > 0)


class Brevity:
    """1 for at most ``free`` sampled tokens a turn, falling to 0 at ``limit``."""

    def __init__(self, free: float, limit: float) -> None:
        if not 0 <= free < limit:
            raise ValueError(f"brevity needs 0 <= free < limit, got free={free} and limit={limit}")
        self.free, self.limit = free, limit

    async def score(self, sample: RewardSample) -> VerifierResult:
        """May be async: a branch that asks a server waits beside generation, not in front of it."""
        per_turn = sample.sampled_tokens / max(1, sample.turns)
        value = (self.limit - per_turn) / (self.limit - self.free)
        return VerifierResult(reward=min(1.0, max(0.0, value)), parts={"tokens_per_turn": per_turn})
