"""Scripted ports for episodes: an engine that says what it is told to, an environment that counts.

They stand at the ports of `Episode` (protocols of this package), not in place of a named component.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np

from env_pool.environment import Observation, StepResult
from experience.records import Task
from rollout_workers.chat import ChatTokenizer
from rollout_workers.config import RolloutConfig
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.episode_context import EpisodeContext, Lease
from rollout_workers.step_log import Replay, StepRecord


class ScriptedGenerator:
    """Answers each request with the next line of a script, one token a word."""

    def __init__(self, chat: ChatTokenizer, script: list[str], version: int = 0) -> None:
        self._chat = chat
        self._script = list(script)
        self.version = version
        self.requests: list[GenerateRequest] = []
        self.released: list[str] = []

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        self.requests.append(request)
        tokens = list(self._chat.encode(self._script.pop(0)))[: request.max_tokens]
        ended = tokens and tokens[-1] == self._chat.encode(";")[0]
        return TokenChunk(
            request_id=request.request_id,
            tokens=np.asarray(tokens, np.int32),
            logprobs=np.full(len(tokens), -0.5, np.float32),
            versions=np.full(len(tokens), self.version, np.int32),
            finish_reason=FinishReason.STOP if ended else FinishReason.LENGTH,
        )

    def release(self, session_id: str) -> None:
        self.released.append(session_id)


class CountingLease:
    """Says `red` to everything, and is done after ``turns`` steps."""

    def __init__(self, turns: int) -> None:
        self._left = turns
        self.actions: list[str] = []
        self.closed = False

    async def reset(self) -> Observation:
        return Observation(messages=[{"role": "user", "content": "look"}])

    async def step(self, action: str) -> StepResult:
        self.actions.append(action)
        self._left -= 1
        return StepResult(observation="" if self._left == 0 else "red", done=self._left == 0)

    async def outcome(self) -> dict[str, Any]:
        return {"actions": list(self.actions)}

    async def close(self) -> None:
        self.closed = True


class CountingProvider:
    def __init__(self, turns: int = 2) -> None:
        self._turns = turns
        self.leases: list[CountingLease] = []

    def lease(self, task: Task, seed: int = 0) -> Awaitable[Lease]:
        async def make() -> Lease:
            self.leases.append(CountingLease(self._turns))
            return self.leases[-1]

        return make()


TASK = Task(task_id="t", environment="counting", payload={})


def make_context(
    directory: Path,
    script: list[str],
    *,
    turns: int = 2,
    replay: Replay | None = None,
    deterministic: bool = True,
    **settings: Any,
) -> tuple[EpisodeContext, ScriptedGenerator, CountingProvider, list[StepRecord]]:
    """An episode context over the scripted ports, and what it records."""
    chat = ChatTokenizer.load(directory)
    generator, provider = ScriptedGenerator(chat, script), CountingProvider(turns)
    records: list[StepRecord] = []
    context = EpisodeContext(
        task=TASK,
        group_id="g",
        episode_id="g/0",
        attempt=0,
        seed=1,
        config=RolloutConfig(**settings),
        chat=chat,
        generator=generator,
        environments=provider,
        clock=lambda: 0.0,
        record=records.append,
        replay=replay or Replay(),
        deterministic_environment=deterministic,
    )
    return context, generator, provider, records
