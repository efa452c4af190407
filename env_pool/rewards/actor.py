"""The reward actor: scores episodes beside generation. A plain class; the orchestrator makes it a Ray actor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from env_pool.batches import BatchServer, batch_lane
from env_pool.config import RewardConfig
from env_pool.rewards.branches import Branch, BranchFailed, combine, load_branches
from env_pool.rewards.records import RewardCall, RewardResult, RewardSample
from env_pool.runner import Runner
from experience.accounting import Cause
from experience.books import clock, process_books
from experience.wire import decode, encode

logger = logging.getLogger(__name__)

EXIT_EXHAUSTED = 70
_REPLIES_LEAVE_S = 1.0


class RewardActor:
    """Runs all branches of a sample beside each other; one that fails cancels the others of that sample."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        index: int = 0,
        max_hung: int = 16,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        """Raises ValueError when a branch cannot be built. ``max_hung`` threads lost to branches end the process."""
        self._branches = load_branches(configs)
        self._index = index
        self._max_hung = max_hung
        self._exit_process = exit_process
        self._retiring = False
        self._runner = Runner(f"rewards-{index}")
        self._server = BatchServer(self._handle)
        self._lane = batch_lane(self, f"reward actor {index}")
        self._running: dict[str, asyncio.Task[RewardResult]] = {}
        self._scored = 0
        self._failed = 0
        self._cancelled = 0
        self._account = process_books().account()
        self._account.switch(Cause.IDLE, clock())

    async def endpoint(self) -> bytes:
        """Where calls can be made over a socket (see :mod:`experience.transport.lane`)."""
        return await self._lane.endpoint()

    async def call_many(self, payload: bytes) -> bytes:
        """A batch of :class:`~env_pool.rewards.records.RewardCall`; see :mod:`env_pool.batches`."""
        return await self._server.call_many(payload)

    async def collect(self, client: str) -> bytes:
        """Late results of a client; see :mod:`env_pool.batches`."""
        return await self._server.collect(client)

    async def forget_client(self, client: str) -> int:
        """Cancel what a dead worker asked for; returns how many scorings that were."""
        self._server.forget(client)
        return sum(self._cancel(key) for key in list(self._running) if key.startswith(f"{client}/"))

    async def health(self) -> dict[str, Any]:
        """``pending`` scorings, and those ``scored``, ``failed`` and ``cancelled`` so far; ``healthy``; ``pid``."""
        return {
            "index": self._index,
            "pending": len(self._running),
            "scored": self._scored,
            "failed": self._failed,
            "cancelled": self._cancelled,
            "hung": self._runner.hung,
            "healthy": not self._retiring,
            "pid": os.getpid(),
        }

    async def _handle(self, client: str, body: bytes) -> bytes:
        call = decode(body, RewardCall)
        if call.sample is None:
            self._cancel(call.key)
            return encode(RewardResult(reward=None, error="cancelled"))
        task = asyncio.create_task(self._score(call.sample))
        self._running[call.key] = task
        self._account.switch(Cause.REWARD, clock())
        await asyncio.wait([task])
        del self._running[call.key]
        if not self._running:
            self._account.switch(Cause.IDLE, clock())
        self._retire_if_exhausted()
        if task.cancelled():
            self._cancelled += 1
            return encode(RewardResult(reward=None, error="cancelled"))
        result = task.result()
        self._scored += result.error is None
        self._failed += result.error is not None
        return encode(result)

    async def _score(self, sample: RewardSample) -> RewardResult:
        began_at, failure = monotonic(), None
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(self._evaluate(branch, sample)) for branch in self._branches]
        except* BranchFailed as failures:
            failure = str(failures.exceptions[0])
        seconds = monotonic() - began_at
        if failure is not None:
            return RewardResult(reward=None, error=failure, seconds=seconds)
        reward, parts = combine(self._branches, [task.result() for task in running])
        return RewardResult(reward=reward, parts=parts, seconds=seconds)

    async def _evaluate(self, branch: Branch, sample: RewardSample) -> Any:
        return await branch.evaluate(sample, self._runner)

    def _cancel(self, key: str) -> bool:
        task = self._running.get(key)
        return task is not None and task.cancel()

    def _retire_if_exhausted(self) -> None:
        if self._runner.hung >= self._max_hung and not self._retiring:
            self._retiring = True
            logger.error("reward actor %d: %d threads hang in branches, it ends itself", self._index, self._runner.hung)
            asyncio.get_running_loop().call_later(_REPLIES_LEAVE_S, self._exit_process, EXIT_EXHAUSTED)
