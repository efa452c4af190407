"""Environments that behave well or badly, branches likewise, and actors served without Ray."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from env_pool.environment import Environment, Observation, Split, StepResult, ToolEnvironment, VerifierResult
from env_pool.errors import AgentFault
from env_pool.rewards.records import RewardSample
from experience.records import Task

HERE = "pool_fixtures"


def make_task(kind: type[Environment], target: int = 3) -> Task:
    return Task(task_id="t", environment=f"{HERE}:{kind.__name__}", payload={"target": target})


def make_sample(value: int = 3, target: int = 3) -> RewardSample:
    return RewardSample(episode_id="e", task=make_task(Counter, target), outcome={"answer": str(value), "value": value})


class Counter(ToolEnvironment):
    """Deterministic and well-behaved."""

    name = "counter"
    deterministic = True
    default_options: ClassVar[Mapping[str, Any]] = {"most": 9}

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        most = cls.resolve_options(options)["most"]
        target = random.Random(f"{seed}/{split}/{index}").randint(1, most)
        return Task(task_id=f"{split}/{index}", environment=cls.name, payload={"target": target})

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        right = outcome["value"] == task.payload["target"]
        return VerifierResult(reward=float(right), parts={"value": float(outcome["value"])})

    def reset(self, task: Task) -> str:
        self.value = 0
        return f"Count up to {task.payload['target']}."

    def add(self, amount: int) -> str:
        """Add to the counter.

        Args:
            amount: how much.
        """
        if amount > 100:
            raise AgentFault("at most 100 at a time")
        self.value += amount
        return str(self.value)

    def whoami(self) -> str:
        """Number of the process."""
        return str(os.getpid())

    def outcome(self) -> dict[str, Any]:
        return {**super().outcome(), "value": self.value}


class AsyncCounter(Counter):
    name = "async_counter"

    async def add(self, amount: int) -> str:  # type: ignore[override]
        """Add after a moment."""
        await asyncio.sleep(0.001)
        return super().add(amount)

    async def outcome(self) -> dict[str, Any]:  # type: ignore[override]
        return {"value": self.value}


class Forgetful(Counter):
    """Not deterministic by its own word, but makes snapshots."""

    name = "forgetful"
    deterministic = False

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode(self.value)

    def restore(self, task: Task, state: bytes) -> None:
        self.value = msgspec.msgpack.decode(state)


class Liar(Counter):
    """Says it is deterministic; its observations depend on the process."""

    name = "liar"

    def add(self, amount: int) -> str:
        """Add."""
        return self.whoami()


class Broken(Environment):
    """Goes wrong as the action says."""

    name = "broken"

    def reset(self, task: Task) -> Observation:
        if task.payload["target"] == 0:
            raise RuntimeError("no database")
        return Observation(messages=[{"role": "user", "content": "go"}])

    def step(self, action: str) -> StepResult:
        if action == "raise":
            raise KeyError("row 7")
        if action == "own time-out":
            raise TimeoutError("the shop did not answer")
        if action == "hang":
            threading.Event().wait()
        if action == "nonsense":
            return "text"  # type: ignore[return-value]
        if action.startswith("wait"):
            time.sleep(float(action.split()[1]))
        return StepResult(observation=action)


class LocalActor:
    """Shaped like a Ray handle, around an actor's object in this process."""

    class _Method:
        def __init__(self, owner: LocalActor, name: str) -> None:
            self._owner, self._name = owner, name

        async def remote(self, *args: Any) -> Any:
            return await self._owner.invoke(self._name, *args)

    def __init__(self, target: Any) -> None:
        self.target = target
        self.round_trips = 0
        self.dead = asyncio.Event()

    def __getattr__(self, name: str) -> _Method:
        return self._Method(self, name)

    async def invoke(self, name: str, *args: Any) -> Any:
        from env_pool.batches import ActorLost

        self.round_trips += name == "call_many"
        answer = asyncio.ensure_future(getattr(self.target, name)(*args))
        death = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([answer, death], return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            answer.cancel()
            raise ActorLost("killed")
        death.cancel()
        return await answer


class Flaky:
    """A branch that fails a number of times first."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    def score(self, sample: RewardSample) -> float:
        if self.left:
            self.left -= 1
            raise ConnectionError("judge is away")
        return 0.5


class Judge:
    """A slow asynchronous branch that knows whether it was cancelled."""

    cancelled = 0
    started: asyncio.Queue[str] | None = None

    async def score(self, sample: RewardSample) -> float:
        if Judge.started is not None:
            Judge.started.put_nowait(sample.episode_id)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            Judge.cancelled += 1
            raise
        return 1.0


def hanging(sample: RewardSample) -> float:
    threading.Event().wait()
    return 1.0


def quick_length(sample: RewardSample, scale: float = 1.0) -> float:
    return scale * len(sample.outcome["answer"])


def not_a_number(sample: RewardSample) -> float:
    return float("nan")


def slow_process_id(sample: RewardSample, until: str = "") -> float:
    """The process, after half a second, or after a minute while the file ``until`` is not there."""
    time.sleep(60 if until and not os.path.exists(until) else 0.5)
    return float(os.getpid())
