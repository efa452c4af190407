"""What the trajectories of one episode share, and the ports through which they reach engines and environments."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from env_pool.environment import Observation, StepResult
from experience.records import Task
from rollout_workers.chat import ChatTokenizer
from rollout_workers.config import RolloutConfig
from rollout_workers.engines.protocol import GenerateRequest, TokenChunk
from rollout_workers.step_log import Replay, StepRecord
from rollout_workers.trajectory_builder import TrajectoryBuilder


class Generator(Protocol):
    """Whatever turns a request into its tokens; the worker's engine client in a run."""

    async def generate(self, request: GenerateRequest) -> TokenChunk: ...

    def release(self, session_id: str) -> None: ...


class Lease(Protocol):
    """One environment instance on lease from the pool."""

    async def reset(self) -> Observation: ...

    async def step(self, action: str) -> StepResult: ...

    async def outcome(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class EnvironmentProvider(Protocol):
    def lease(self, task: Task, seed: int = 0) -> Awaitable[Lease]: ...


@dataclass
class EpisodeContext:
    """What all trajectories of one episode share: identity, settings and the ports to the outside."""

    task: Task
    group_id: str
    episode_id: str
    attempt: int
    seed: int
    config: RolloutConfig
    chat: ChatTokenizer
    generator: Generator
    environments: EnvironmentProvider
    clock: Callable[[], float]
    record: Callable[[StepRecord], None]
    replay: Replay = field(default_factory=Replay)
    deterministic_environment: bool = False
    """Whether recorded environment calls may be repeated on a fresh instance."""
    pinned_version: int | None = None
    member: int = 0
    opened_at: float | None = None
    """When the group was opened, by ``clock``."""
    builders: list[TrajectoryBuilder] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    final_text: str = ""
    reward_parts: dict[str, float] = field(default_factory=dict)
    rewrites: int = 0
    environment_s: float = 0.0
    generate_s: float = 0.0
    ended: bool = False
    """Nobody waits for the loop any more. What it left running (a task of its own) gets no more generations."""
    waits: dict[int, float] = field(default_factory=dict)
    """Seconds in `reset` and `step` of environments, by the number of generations that came before."""

    def new_builder(self, parent: TrajectoryBuilder | None = None) -> TrajectoryBuilder:
        trajectory_id = f"{self.episode_id}/{len(self.builders)}"
        if parent is None:
            builder = TrajectoryBuilder(trajectory_id, self.episode_id, self.group_id, self.task.task_id)
        else:
            builder = parent.branch(trajectory_id)
        self.builders.append(builder)
        return builder

    def waited(self, seconds: float) -> None:
        """An environment took ``seconds`` to answer."""
        turn = sum(builder.generations for builder in self.builders)
        self.waits[turn] = self.waits.get(turn, 0.0) + seconds

    def end(self) -> None:
        """The loop is over, however that came: none of its sessions stays on an engine."""
        self.ended = True
        for builder in self.builders:
            self.generator.release(self.session_of(builder))

    def session_of(self, builder: TrajectoryBuilder) -> str:
        return f"{builder.trajectory_id}#{self.attempt}"

    def seed_of(self, builder: TrajectoryBuilder) -> int:
        """A seed of 63 bits that depends on the group's seed and the place in it, and on nothing else."""
        text = f"{self.seed}:{builder.trajectory_id}:{self.attempt}".encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1
