"""Rollout loops and an environment with the faults that users' code has."""

from __future__ import annotations

import asyncio
import time

from coin_environment import CoinEnvironment

from env_pool.environment import StepResult
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
