"""The shop with tools that take as long as those of coding agents: the tool times of suite `swe`, scaled down."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from env_pool.environment import Observation, Split, StepResult
from env_pool.shop.environment import ShopEnvironment
from env_pool.workloads.scripts import SWE_TOOL_S
from experience.records import Task

DELAY_SCALE = "delay_scale"


class SlowShopEnvironment(ShopEnvironment):
    """The shop, each of whose steps waits for a time drawn by the `swe` law, divided by ``delay_scale``.

    The draw depends on the task and the actions so far: the same attempt takes as long in every mode.
    """

    name = "slow_shop"
    default_options: ClassVar[Mapping[str, Any]] = {**ShopEnvironment.default_options, DELAY_SCALE: 1.0}

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        scale = cls.resolve_options(options)[DELAY_SCALE]
        if not (isinstance(scale, int | float) and scale > 0):
            raise ValueError(f"tasks.options.{DELAY_SCALE} must be a positive number, got {scale!r}")
        task = super().make_task(index, seed, split, {k: v for k, v in options.items() if k != DELAY_SCALE})
        payload = {**task.payload, DELAY_SCALE: float(scale)}
        return Task(
            task_id=task.task_id,
            environment=task.environment,
            payload=payload,
            domain=task.domain,
            difficulty=task.difficulty,
        )

    def reset(self, task: Task) -> Observation:
        self._scale: float = task.payload[DELAY_SCALE]
        self._history = task.task_id
        return super().reset(task)

    async def step(self, action: str) -> StepResult:  # type: ignore[override]  # the base class allows both
        self._history += f"\n{action}"
        result = super().step(action)
        if not isinstance(result, StepResult):
            result = await result
        await asyncio.sleep(tool_seconds(self._history) / self._scale)
        return result


def tool_seconds(key: str) -> float:
    """A tool time of suite `swe` (seconds, at most 600): the same for the same key."""
    digest = blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return float(SWE_TOOL_S.sample(generator, 1)[0])
