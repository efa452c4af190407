"""What the tests of the worker plug in: an environment, a judge, rollout loops, and the real actors without Ray."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from pool_fixtures import LocalActor

from env_pool.actor import EnvironmentActor
from env_pool.config import EnvironmentsConfig, RewardConfig
from env_pool.environment import Environment, Split, StepResult, VerifierResult
from env_pool.pool import EnvironmentPool
from env_pool.rewards.actor import RewardActor
from env_pool.rewards.client import RewardClient
from env_pool.rewards.records import RewardSample
from experience.entries import EpisodeEntry
from experience.records import GroupHeader, Task, Trajectory
from experience.wire import decode, decode_trajectory, encode
from rollout_workers import Episode
from rollout_workers.assignments import Assignment, EpisodeReport
from rollout_workers.config import RolloutConfig
from rollout_workers.engine_client import SubmitBatch
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineLoad, GenerateRequest, TokenChunk
from rollout_workers.ports import WorkerPorts
from rollout_workers.worker import RolloutWorker

TURNS = 3


class Rounds(Environment):
    """Three turns; the reward is the share of them in which the agent said anything."""

    name = "rounds"
    deterministic = True

    def __init__(self) -> None:
        self.said: list[str] = []

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        return Task(task_id=f"{split}/{index}", environment="worker_fixtures:Rounds", payload={})

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        return VerifierResult(reward=sum(bool(text) for text in outcome["said"]) / TURNS)

    def reset(self, task: Task) -> str:
        return "look red"

    def step(self, action: str) -> StepResult:
        self.said.append(action)
        return StepResult(observation=f"blue {'yes' if action else 'no'}", done=len(self.said) == TURNS)

    def outcome(self) -> dict[str, Any]:
        return {"said": self.said}


def broken_judge(sample: RewardSample) -> float:
    raise ConnectionError(f"the judge of {sample.episode_id} is away")


def content_judge(sample: RewardSample) -> float:
    """For loops without an environment: there is no outcome to look at."""
    return 1.0


async def raises(episode: Episode) -> None:
    episode.observe("look")
    await episode.generate()
    raise KeyError("price")


async def never_generates(episode: Episode) -> None:
    episode.observe("look")


async def never_ends(episode: Episode) -> None:
    await asyncio.Event().wait()


async def talks_for_ever(episode: Episode) -> None:
    async with episode.environment() as env:
        episode.observe(await env.reset())
        while True:
            await episode.generate(max_tokens=4)
            episode.observe("red")


_LEFT_RUNNING: set[asyncio.Task[Any]] = set()


async def wanders(episode: Episode) -> None:
    """Does what loops do, well or badly: branches, sub-agents, errors, tasks that nobody awaits, waits without end."""
    chance = random.Random(f"{episode.task.task_id} {episode.member} {episode.attempt}")
    episode.observe("look red")
    await episode.generate()
    for _ in range(chance.randrange(4)):
        match chance.choice(["turn", "fork", "subagent", "leave", "raise", "hang"]):
            case "turn":
                episode.observe("blue")
                await episode.generate()
            case "fork":
                branches = episode.fork(2)
                for branch in branches:
                    branch.observe("red")
                await asyncio.gather(*(branch.generate() for branch in branches))
            case "subagent":
                await episode.subagent({"role": "user", "content": "look blue"}).generate()
            case "leave":
                task = asyncio.create_task(_talks_on(episode.fork(1)[0]))
                _LEFT_RUNNING.add(task)
                task.add_done_callback(_LEFT_RUNNING.discard)
            case "raise":
                raise KeyError("price")
            case "hang":
                await asyncio.Event().wait()


async def _talks_on(episode: Episode) -> None:
    while True:
        episode.observe("red")
        await episode.generate(max_tokens=2)


class Engine(EngineActor):
    """The real engine actor, which notes what it was asked and can be told to go silent."""

    def __init__(self, config: EnginesConfig, name: str = "engine") -> None:
        super().__init__(name, config)
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.submissions = 0
        self.silent_from: int | None = None
        """Requests whose context is at least this long get no answer."""
        self.held = 0
        self.changed = asyncio.Condition()

    async def submit(self, batch_bytes: bytes) -> bytes:
        batch = decode(batch_bytes, SubmitBatch)
        self.submissions += 1
        self.requests += batch.requests
        self.aborted += batch.aborts
        answered = [r for r in batch.requests if self.silent_from is None or len(r.prompt) < self.silent_from]
        self.held += len(batch.requests) - len(answered)
        load = await super().submit(encode(msgspec.structs.replace(batch, requests=answered)))
        await self._tell()
        return load

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        super()._deliver(chunks)
        if any(chunk.finish_reason is not None for chunk in chunks):
            telling = asyncio.create_task(self._tell())
            _LEFT_RUNNING.add(telling)
            telling.add_done_callback(_LEFT_RUNNING.discard)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def told(self) -> EngineLoad:
        """What it would tell a client."""
        return self._clients.load("w")

    async def until(self, what: str, condition: Any) -> None:
        """Wait until ``condition()``; at most 20 s."""
        try:
            async with asyncio.timeout(20), self.changed:
                await self.changed.wait_for(condition)
        except TimeoutError:
            raise AssertionError(f"not within 20 s: {what}") from None


@dataclass
class Delivered:
    """The end of the line: what the queue and the controller are told."""

    entries: list[EpisodeEntry] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    reports: list[EpisodeReport] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def add(self, entries: list[EpisodeEntry]) -> None:
        self.entries += entries

    async def fail(self, failures: list[tuple[str, str, str]]) -> None:
        self.failures += failures

    async def report(self, reports: list[EpisodeReport]) -> None:
        async with self.changed:
            self.reports += reports
            self.changed.notify_all()

    async def until(self, reports: int) -> None:
        """Wait for that many reports; at most 20 s."""
        try:
            async with asyncio.timeout(20), self.changed:
                await self.changed.wait_for(lambda: len(self.reports) >= reports)
        except TimeoutError:
            raise AssertionError(f"{len(self.reports)} of {reports} reports within 20 s") from None

    def trajectories(self) -> dict[str, Trajectory]:
        """By episode; every episode of these tests has one."""
        return {entry.episode_id: decode_trajectory(data) for entry in self.entries for data in entry.trajectories}


@dataclass
class Bench:
    """A worker and all that it talks to."""

    worker: RolloutWorker
    engine: Engine
    delivered: Delivered
    step_log: Path


@asynccontextmanager
async def serve(
    model: Path,
    directory: Path,
    *,
    rewards: list[RewardConfig] | None = None,
    concurrency: int = 64,
    silent_from: int | None = None,
    lock_step: bool = False,
    **settings: Any,
) -> AsyncIterator[Bench]:
    """A worker with a real engine, environment actor and reward actor, all on this event loop."""
    rewards = rewards or [RewardConfig()]
    engine = Engine(EnginesConfig(slots=64, max_len=128, threads=1))
    await engine.load(str(model), "float32", 1, 0)
    engine.silent_from = silent_from
    environments = EnvironmentsConfig()
    pool = EnvironmentPool([LocalActor(EnvironmentActor(environments))], environments, "w")
    scorer = RewardClient([LocalActor(RewardActor(rewards))], rewards, "w")
    delivered = Delivered()
    worker = RolloutWorker(
        "w",
        RolloutConfig(**{"max_tokens": 6, "max_episode_tokens": 120, **settings}),
        model,
        directory / "steps",
        directory / "evaluation",
        WorkerPorts(pool, scorer, delivered),
        concurrency,
        lock_step,
    )
    worker.add_engine("engine", engine)
    try:
        yield Bench(worker, engine, delivered, directory / "steps")
    finally:
        await worker.close()
        await scorer.aclose()
        await pool.aclose()
        await engine.stop()


def assignment(index: int = 0, size: int = 4) -> Assignment:
    task = Rounds.make_task(index, 0, "train", {})
    header = GroupHeader(group_id=f"g{index}", index=index, task=task, size=size, version_floor=0, seed=index)
    return Assignment(header=header, members=list(range(size)))
