"""Millrace's side of the comparison with TRL: its prompts as tasks, and the loop that completes and rewards them.

The task has nothing to act on, so the loop asks no environment and gives the reward itself, as TRL's reward function is
called in its trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.peers.trl_task import prompt, vowel_share
from env_pool.environment import Environment, Split
from experience.records import Task
from rollout_workers.episode import Episode


class PromptEnvironment(Environment):
    """Only the source of the prompts."""

    name = "benchmarks.peers.trl_environment:PromptEnvironment"
    deterministic: ClassVar[bool] = True

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        cls.resolve_options(options)
        return Task(task_id=f"{split}/{index}", environment=cls.name, payload={"prompt": prompt(index)})


async def complete(episode: Episode) -> None:
    """One completion of `rollout.max_tokens` tokens, rewarded by its share of vowels."""
    episode.observe_text(episode.task.payload["prompt"])
    completion = await episode.generate()
    episode.reward(vowel_share(completion.tokens), "vowels")
