"""One environment, on whichever actor holds it, for the length of one episode."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from env_pool.batches import ActorLost
from env_pool.calls import Call, Method, Started
from env_pool.environment import Observation, StepResult
from env_pool.errors import EnvironmentFault, SystemFault
from experience.records import Task
from experience.wire import decode

if TYPE_CHECKING:
    from env_pool.pool import EnvironmentPool

logger = logging.getLogger(__name__)


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An action and what came of it."""

    action: str
    result: StepResult


class Lease:
    """What a rollout loop calls ``env``.

    When its actor dies, the next call brings the environment back on another one: from its last snapshot, or by
    repeating the recorded actions when the environment is deterministic, every repeated observation being compared
    with the recorded one. Otherwise :class:`SystemFault` is raised. Faults of environment code raise
    :class:`EnvironmentFault`; mistakes of the agent raise nothing (see ``StepResult.fault``).

    One call at a time. Use ``async with pool.lease(task) as env``, or ``env = await pool.lease(task)`` and ``close``.
    """

    def __init__(self, pool: EnvironmentPool, key: str, task: Task, seed: int) -> None:
        self.task = task
        self.observation: Observation | None = None
        """What ``reset`` returned."""
        self.steps: list[Step] = []
        """All steps so far."""
        self.done = False
        self.deterministic = False
        """Whether a lost environment can be rebuilt by replay; known after ``reset``."""
        self.recoveries = 0
        self._pool = pool
        self._key = key
        self._seed = seed
        self._snapshot: tuple[int, bytes] | None = None
        self._built = True
        self._closed = False

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._open().__await__()

    async def __aenter__(self) -> Lease:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close_later(self)

    async def reset(self) -> Observation:
        """Begin the episode: opening messages and tools."""
        if self.observation is not None:
            raise RuntimeError(f"task {self.task.task_id}: the environment was reset before; lease another one")
        started = decode(await self._call(Method.RESET), Started)
        self.observation, self.deterministic = started.observation, started.deterministic
        return started.observation

    async def step(self, action: str) -> StepResult:
        """Carry out what the agent wrote."""
        if self.observation is None or self.done:
            state = "is over" if self.done else "has not been reset"
            raise RuntimeError(f"task {self.task.task_id}: step({action!r}) on an environment that {state}")
        result = decode(await self._call(Method.STEP, action=action), StepResult)
        self.steps.append(Step(action, result))
        self.done = result.done
        return result

    async def outcome(self) -> dict[str, Any]:
        """Evidence for the verifier."""
        return decode(await self._call(Method.OUTCOME), dict[str, Any])

    async def snapshot(self) -> bool:
        """Keep a snapshot to restore from; False when the environment makes none."""
        state = decode(await self._call(Method.SNAPSHOT), bytes | None)  # type: ignore[arg-type]
        if state is None:
            return False
        self._snapshot = (len(self.steps), state)
        return True

    async def replay(self, observation: Observation, steps: Sequence[Step]) -> None:
        """Instead of ``reset``: bring the environment to where a recorded episode had come.

        Raises :class:`SystemFault` when it is not deterministic, :class:`EnvironmentFault` when it diverges.
        """
        await self.reset()
        if not self.deterministic:
            raise SystemFault(f"environment {self.task.environment!r} is not deterministic: it cannot be replayed")
        self._compare(observation, self.observation, "reset")
        for recorded in steps:
            self._compare(recorded.result, await self.step(recorded.action), f"step({recorded.action!r})")

    async def close(self) -> None:
        """Give the environment back; never raises because of its state."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._send(Method.CLOSE)
        except (ActorLost, EnvironmentFault) as fault:
            logger.debug("task %s: closing its environment: %s", self.task.task_id, fault)
        finally:
            self._pool.release(self._key)

    async def _open(self) -> Lease:
        await self._pool.acquire(self._key)
        return self

    async def _call(self, method: Method, action: str = "") -> bytes:
        if self._closed:
            raise RuntimeError(f"task {self.task.task_id}: {method} on an environment that was given back")
        while True:
            try:
                if not self._built:
                    await self._rebuild()
                return await self._send(method, action)
            except ActorLost as lost:
                self._count_loss(lost)

    def _count_loss(self, lost: ActorLost) -> None:
        self._built = False
        self._pool.release(self._key)
        self.recoveries += 1
        if self.recoveries > self._pool.config.max_recoveries:
            raise SystemFault(
                f"task {self.task.task_id} lost its environment {self.recoveries} times: {lost}"
            ) from lost
        restorable = self.observation is None or self.deterministic
        if not restorable and (self._snapshot is None or self._snapshot[0] < len(self.steps)):
            raise SystemFault(
                f"environment {self.task.environment!r} of task {self.task.task_id} is lost: it is not deterministic "
                f"and has no snapshot of step {len(self.steps)} ({lost})"
            ) from lost

    async def _rebuild(self) -> None:
        await self._pool.acquire(self._key)
        if self.observation is not None:
            done = 0
            if self._snapshot is not None:
                done, state = self._snapshot
                await self._send(Method.RESTORE, state=state, step=done)
            else:
                started = decode(await self._send(Method.RESET), Started)
                self._compare(self.observation, started.observation, "reset")
            for position, recorded in enumerate(self.steps[done:], start=done):
                result = decode(await self._send(Method.STEP, recorded.action, step=position), StepResult)
                self._compare(recorded.result, result, f"step({recorded.action!r})")
        self._built = True

    def _compare(self, recorded: Any, repeated: Any, method: str) -> None:
        if recorded != repeated:
            raise EnvironmentFault(
                self.task.environment, method, f"did not repeat itself: it returned {recorded}, now {repeated}"
            )

    async def _send(self, method: Method, action: str = "", state: bytes = b"", step: int | None = None) -> bytes:
        begins = method in (Method.RESET, Method.RESTORE)
        config = self._pool.config
        call = Call(
            lease=self._key,
            method=method,
            timeout_s=config.reset_timeout_s if begins else config.step_timeout_s,
            task=self.task if begins else None,
            action=action,
            state=state,
            seed=self._seed,
            step=len(self.steps) if step is None else step,
        )
        result = await self._pool.call(self._key, call)
        if result.missing:
            raise ActorLost(f"the environment actor does not know lease {self._key}: it was restarted")
        if result.fault is not None:
            fault = result.fault
            raise EnvironmentFault(fault.environment, fault.method, fault.reason, fault.detail)
        return result.value
