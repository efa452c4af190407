"""The environment as a rollout loop sees it, every call a durable step."""

from __future__ import annotations

from typing import Any

import msgspec

from env_pool.environment import Observation, StepResult
from env_pool.errors import SystemFault
from experience.wire import decode, encode
from rollout_workers.episode_context import EpisodeContext, Lease
from rollout_workers.errors import EpisodeError
from rollout_workers.step_log import StepRecord


class EpisodeEnvironment:
    """The environment as a loop sees it: `reset`, `step`, `done`. Each call is a durable step."""

    def __init__(self, context: EpisodeContext, trajectory_id: str, payload: dict[str, Any] | None = None) -> None:
        self._context = context
        self._trajectory_id = trajectory_id
        task = context.task
        self._task = msgspec.structs.replace(task, payload={**task.payload, **payload}) if payload else task
        self._lease: Lease | None = None
        self._history: list[tuple[str, str | None, bytes]] = []
        """Calls answered from the record, to be done again on a fresh lease when the record ends."""
        self.done = False
        self.closed = False

    async def reset(self) -> Observation:
        """Begin; returns the opening messages and tools."""
        return decode(await self._call("reset", None), Observation)

    async def step(self, action: str) -> StepResult:
        """Act. ``done`` turns True when the environment says that it is over."""
        result = decode(await self._call("step", action), StepResult)
        self.done = self.done or result.done
        return result

    async def finish(self) -> None:
        """Fetch the evidence for the verifier."""
        self._context.outcome.update(decode(await self._call("outcome", None), dict[str, Any]))

    async def close(self) -> None:
        if self._lease is not None and not self.closed:
            self.closed = True
            await self._lease.close()

    async def _call(self, method: str, action: str | None) -> bytes:
        context = self._context
        recorded = context.replay.next_environment_call(self._trajectory_id)
        if recorded is not None:
            if (recorded.call, recorded.action) != (method, action):
                raise EpisodeError(
                    f"the loop called {method}({action!r}) where {recorded.call}({recorded.action!r}) was recorded: a "
                    "rollout loop must be a deterministic function of what generate and the environment return"
                )
            self._history.append((method, action, recorded.result))
            context.record(recorded)
            if method != "outcome":
                context.waited(recorded.ended_at - recorded.began_at)
            return recorded.result
        began_at = context.clock()
        result = await self._call_live(method, action)
        ended_at = context.clock()
        context.environment_s += ended_at - began_at
        if method != "outcome":
            context.waited(ended_at - began_at)
        context.record(
            StepRecord(
                episode_id=context.episode_id,
                attempt=context.attempt,
                trajectory_id=self._trajectory_id,
                call=method,
                action=action,
                result=result,
                began_at=began_at,
                ended_at=ended_at,
            )
        )
        return result

    async def _call_live(self, method: str, action: str | None) -> bytes:
        if self._lease is None:
            if self._history and not self._context.deterministic_environment:
                raise SystemFault(
                    f"the worker of episode {self._context.episode_id} died after {len(self._history)} environment calls, "
                    f"and environment {self._context.task.environment!r} is not deterministic: it cannot be replayed"
                )
            self._lease = await self._context.environments.lease(self._task, self._context.seed)
            for past_method, past_action, past_result in self._history:
                if await self._invoke(self._lease, past_method, past_action) != past_result:
                    raise EpisodeError(
                        f"environment {self._context.task.environment!r} did not repeat its {past_method}({past_action!r}) "
                        "when replayed: it must declare deterministic = False or be deterministic"
                    )
        return await self._invoke(self._lease, method, action)

    @staticmethod
    async def _invoke(lease: Lease, method: str, action: str | None) -> bytes:
        if method == "reset":
            return encode(await lease.reset())
        if method == "step":
            assert action is not None
            return encode(await lease.step(action))
        return encode(await lease.outcome())
