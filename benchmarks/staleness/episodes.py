"""Episodes of a real environment on an embedded engine, all in this process: nothing but what learning needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from env_pool.environment import Environment, Observation, StepResult
from env_pool.registry import load_environment
from experience.records import Group, GroupHeader, Status, Task, Trajectory
from experience.wire import encode
from rollout_workers.chat import ChatTokenizer
from rollout_workers.config import RolloutConfig
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.torch_engine.async_engine import AsyncTorchEngine
from rollout_workers.engines.torch_engine.engine import TorchEngine
from rollout_workers.engines.torch_engine.loader import load_model
from rollout_workers.episode import Episode
from rollout_workers.episode_context import EnvironmentProvider, EpisodeContext, Generator
from rollout_workers.errors import ContextFull, EngineFault
from rollout_workers.loops import load_loop
from rollout_workers.step_log import StepRecord


class LocalEngine:
    """The embedded engine as episodes see it (`rollout_workers.episode_context.Generator`)."""

    def __init__(self, model: Path, config: EnginesConfig) -> None:
        loaded, tokenizer = load_model(str(model), "float32", "cpu")
        self.engine = TorchEngine(loaded, tokenizer, config)
        self._front = AsyncTorchEngine(self.engine, self._take)
        self._waiting: dict[str, asyncio.Future[TokenChunk]] = {}

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        future: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self._front.submit_many([request])
        return await future

    def release(self, session_id: str) -> None:
        self.engine.release(session_id)

    def serve(self, version: int, named_tensors: Any) -> None:
        """Generate with these weights from now on; no request may be in flight."""
        self.engine.stage(version, named_tensors)
        self.engine.commit(version, KvPolicy.AUTO)

    async def close(self) -> None:
        """End the engine's task."""
        await self._front.close()

    def _take(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            if chunk.finish_reason is None:
                raise EngineFault("engines.stream_every must be at least rollout.max_tokens: a turn came in parts")
            self._waiting.pop(chunk.request_id).set_result(chunk)


class LocalLease:
    """One environment instance in this process (`rollout_workers.episode_context.Lease`)."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._environment: Environment = load_environment(task.environment)()

    async def reset(self) -> Observation:
        found = self._environment.reset(self._task)
        if not isinstance(found, Observation):
            raise TypeError(f"{self._task.environment}: this benchmark needs environments with a plain reset")
        return found

    async def step(self, action: str) -> StepResult:
        result = self._environment.step(action)
        if not isinstance(result, StepResult):
            raise TypeError(f"{self._task.environment}: this benchmark needs environments with a plain step")
        return result

    async def outcome(self) -> dict[str, Any]:
        evidence = self._environment.outcome()
        if not isinstance(evidence, dict):
            raise TypeError(f"{self._task.environment}: this benchmark needs environments with a plain outcome")
        return evidence

    async def close(self) -> None:
        self._environment.close()


class LocalEnvironments:
    """`rollout_workers.episode_context.EnvironmentProvider` in this process."""

    async def lease(self, task: Task, seed: int = 0) -> LocalLease:
        del seed
        return LocalLease(task)


class Episodes:
    """Runs episodes with the configured rollout loop and the environment's own verifier."""

    def __init__(
        self, model: Path, config: RolloutConfig, generator: Generator, environments: EnvironmentProvider
    ) -> None:
        self._config = config
        self._chat = ChatTokenizer.load(model)
        self._loop = load_loop(config.loop)
        self._generator = generator
        self._environments = environments

    async def run(self, header: GroupHeader, member: int, pinned_version: int | None = None) -> list[Trajectory]:
        """The trajectories of one member of a group, with their reward."""
        task = header.task
        context = EpisodeContext(
            task=task,
            group_id=header.group_id,
            episode_id=header.episode_id(member),
            attempt=0,
            seed=header.seed,
            config=self._config,
            chat=self._chat,
            generator=self._generator,
            environments=self._environments,
            clock=time.time,
            record=_forget,
            member=member,
            pinned_version=pinned_version,
        )
        status = Status.FINISHED
        try:
            await self._loop(Episode(context), **self._config.args)
        except ContextFull:
            status = Status.TRUNCATED
        finally:
            context.end()
        reward = load_environment(task.environment).verify(task, context.outcome).reward
        made = [
            builder.build(status, task.domain, task.difficulty, self._config.temperature, 0)
            for builder in context.builders
            if builder.sampled
        ]
        for trajectory in made:
            trajectory.reward = reward
        return made


class Rollouts:
    """Runs whole groups at once."""

    def __init__(self, model: Path, config: RolloutConfig, engine: LocalEngine) -> None:
        self._engine = engine
        self._episodes = Episodes(model, config, engine, LocalEnvironments())
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """End the event loop that episodes and engine share."""
        self._runner.run(self._engine.close())
        self._runner.close()

    def groups(self, headers: Sequence[GroupHeader]) -> list[bytes]:
        """The encoded groups, all run at the same time with the weights that the engine serves."""
        return [encode(group) for group in self._runner.run(self._groups(headers))]

    async def _groups(self, headers: Sequence[GroupHeader]) -> list[Group]:
        episodes = [self._episodes.run(header, member) for header in headers for member in range(header.size)]
        trajectories: dict[str, list[Trajectory]] = {header.group_id: [] for header in headers}
        for made in await asyncio.gather(*episodes):
            for trajectory in made:
                trajectories[trajectory.group_id].append(trajectory)
        return [Group(header=header, trajectories=trajectories[header.group_id]) for header in headers]


def _forget(record: StepRecord) -> None:
    """Nothing is journalled here."""
    del record
