"""The rollout workers that take assignments, and how they are spoken to. One that has just died is the supervisor's business."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray

from experience.wire import encode
from orchestrator.supervisor import first_line
from rollout_workers.assignments import Assignment

logger = logging.getLogger(__name__)


class Workforce:
    """``handles`` are the workers by name."""

    def __init__(self) -> None:
        self.handles: dict[str, Any] = {}

    async def tell(self, method: str, *arguments: Any) -> None:
        """Call every worker."""
        for name, handle in list(self.handles.items()):
            try:
                await getattr(handle, method).remote(*arguments)
            except ray.exceptions.RayError as error:
                logger.warning("%s did not hear of %s: %s", name, method, first_line(error))

    async def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call all workers at the same time; returns the answers, without those that gave none."""
        names = list(self.handles)
        calls = [_answer(getattr(self.handles[name], method).remote(*arguments)) for name in names]
        answers = {}
        for name, answer in zip(names, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, Exception):
                logger.warning("%s did not answer %s: %s", name, method, first_line(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers[name] = answer
        return answers

    async def send(self, by_worker: dict[str, list[Assignment]]) -> None:
        """Give out assignments."""
        for worker, assignments in by_worker.items():
            handle = self.handles.get(worker)
            if handle is None:
                continue
            try:
                await handle.run.remote(encode(assignments))
            except ray.exceptions.RayError as error:
                logger.warning("%s did not take its assignments: %s", worker, first_line(error))


async def _answer(reference: Any) -> Any:
    return await reference
