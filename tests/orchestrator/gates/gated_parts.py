"""An environment and a reward with gates, see `gate`."""

from __future__ import annotations

from coin_environment import CoinEnvironment
from gate import wait_at

from env_pool.environment import StepResult
from env_pool.rewards.records import RewardSample
from experience.records import Task


class GatedEnvironment(CoinEnvironment):
    """Its steps wait at ``environment``, those of held-out tasks at ``evaluation``."""

    name = "gated"

    def reset(self, task: Task) -> str:
        self.gate = "evaluation" if task.task_id.startswith("held_out") else "environment"
        return super().reset(task)

    def step(self, action: str) -> StepResult:
        wait_at(self.gate)
        return super().step(action)


def reward(sample: RewardSample) -> float:
    wait_at("reward")
    return float(len(sample.final_text) % 2)
