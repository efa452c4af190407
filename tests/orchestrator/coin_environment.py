"""A task with a learning signal for an untrained model: two words, and the parity of their lengths decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from env_pool.environment import Environment, Split, StepResult, VerifierResult
from experience.records import Task


class CoinEnvironment(Environment):
    """Two turns; the reward is 1 when both texts have as many characters modulo two."""

    name = "coin"
    deterministic = True

    def __init__(self) -> None:
        self.texts: list[str] = []

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        return Task(task_id=f"{split}/{index}", environment=cls.name, payload={"index": index}, domain="coin")

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        first, *rest = outcome["lengths"]
        return VerifierResult(reward=float(all(length % 2 == first % 2 for length in rest)))

    def reset(self, task: Task) -> str:
        return "refund order"

    def step(self, action: str) -> StepResult:
        self.texts.append(action)
        return StepResult(observation="ok", done=len(self.texts) == 2)

    def outcome(self) -> dict[str, Any]:
        return {"lengths": [len(text) for text in self.texts]}
