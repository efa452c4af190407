"""Evaluations of a run: when one begins, with which pinned version, and what becomes of its result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from env_pool.registry import TaskSource
from orchestrator.config import Config
from orchestrator.evaluation import Evaluation
from orchestrator.run_directory import RunDirectory
from rollout_workers.assignments import Assignment, EpisodeReport, Purpose

logger = logging.getLogger(__name__)

Send = Callable[[dict[str, list[Assignment]]], Awaitable[None]]
Done = Callable[[dict[str, Any]], Awaitable[None]]


class Evaluations:
    """At most one evaluation at a time, beside the training. Engines and workers are given by name at each call."""

    def __init__(self, config: Config, run: RunDirectory, send: Send, done: Done) -> None:
        self._config = config
        self._run = run
        self._send = send
        self._done = done
        self._current: Evaluation | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> bool:
        return not self._idle.is_set()

    async def finished(self) -> None:
        """Until no evaluation is running; the stall watchdog bounds the wait."""
        await self._idle.wait()

    async def consider(self, version: int, engines: Mapping[str, Any], workers: Mapping[str, Any]) -> str | None:
        """All engines serve ``version`` and nothing newer is on its way: begin an evaluation if one is due.

        Returns why one that was due is left out, if so. The last version is always evaluated: if another evaluation is
        running, ask again when it is `finished`. This never waits for it, because an engine may have to join first.
        """
        every, last = self._config.run.eval_every, self._config.run.steps
        # Where not every version is published, the first one at or after the due one is evaluated.
        before = version - self._config.weights.every
        due = version in (0, last) or (every > 0 and version // every > before // every)
        if not due or self._config.tasks.held_out == 0 or self._run.evaluation_file(version).exists():
            return None
        if self.running:
            return (
                None if version == last else f"evaluation at step {version} left out: the one before is still running"
            )
        source = TaskSource.from_config(self._config.tasks, "held_out", self._config.seed)
        tasks = [source.task(index) for index in range(self._config.tasks.held_out)]
        self._idle.clear()
        self._current = Evaluation(version, version, tasks, self._config.seed)
        for handle in list(engines.values()):
            await self._tell(handle.pin, version)
        await self.assign(workers)
        return None

    async def engine_joined(self, handle: Any, version: int) -> None:
        """An engine that serves ``version`` is about to take requests."""
        if self._current is not None and self._current.version == version:
            await self._tell(handle.pin, version)

    def worker_lost(self, name: str) -> None:
        if self._current is not None:
            self._current.worker_lost(name)

    async def assign(self, workers: Mapping[str, Any]) -> None:
        """Give out the tasks that nobody has."""
        if self._current is not None:
            await self._send(self._current.assign(workers))

    def report(self, report: EpisodeReport) -> None:
        if self._current is not None and report.purpose is Purpose.EVALUATE:
            self._current.report(report)

    async def complete(self, engines: Mapping[str, Any]) -> None:
        """When every task has its report: keep the result and go on."""
        evaluation = self._current
        if evaluation is None or not evaluation.complete:
            return
        self._current = None
        result = evaluation.result()
        self._run.write_evaluation(evaluation.step, result)
        for handle in list(engines.values()):
            await self._tell(handle.unpin, evaluation.version)
        self._idle.set()
        await self._done(result)

    async def _tell(self, method: Any, version: int) -> None:
        """Pin or unpin; an engine that has just died is the supervisor's business."""
        import ray

        try:
            await method.remote(version)
        except ray.exceptions.RayError as error:
            logger.warning("an engine did not hear of version %d: %s", version, error)
