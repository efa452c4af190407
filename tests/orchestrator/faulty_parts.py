"""Rollout loops and an environment with the faults that users' code has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from coin_environment import CoinEnvironment

from env_pool.environment import Environment, StepResult, VerifierResult
from experience.records import Task
from rollout_workers import Episode


async def raising(episode: Episode) -> None:
    """Raises for every task."""
    raise KeyError("the field that is missing")


async def mostly_sound(episode: Episode) -> None:
    """Gives its own reward; one episode in some raises, returns nothing, or never ends."""
    index = episode.task.payload["index"] % 9
    if index == 3:
        raise RuntimeError("only sometimes")
    if index == 5:
        return
    if index == 7:
        await asyncio.Event().wait()
    async with episode.environment() as environment:
        episode.observe(await environment.reset())
        answer = await episode.generate()
    episode.reward(float(len(answer.tokens) % 2), part="parity")


class HungEnvironment(CoinEnvironment):
    """Its first step never returns."""

    name = "hung"

    def step(self, action: str) -> StepResult:
        time.sleep(3600)
        return super().step(action)


class ConstantEnvironment(CoinEnvironment):
    """Every episode has the same reward."""

    name = "constant"

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        return VerifierResult(reward=1.0)


class UnfinishedEnvironment(Environment):
    """Makes tasks and snapshots, and nothing else."""

    name = "unfinished"
    make_task = CoinEnvironment.make_task

    def snapshot(self) -> bytes:
        return b""
