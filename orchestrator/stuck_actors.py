"""Actors that are not dead and yet of no use: stuck, blocked, or refusing weights. They are ended; the supervisor does the rest."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from orchestrator.config import Config
from orchestrator.failures import RestartBudget
from orchestrator.processes import engine_name, worker_name
from orchestrator.supervisor import Actor, Supervisor, first_line

logger = logging.getLogger(__name__)

PROBE_S = 5.0
"""How long an actor that somebody found stuck has to show that it is not."""


class StuckActors:
    """``workers`` is the controller's own mapping of those that take assignments, by name."""

    def __init__(
        self,
        config: Config,
        supervisor: Supervisor,
        workers: Mapping[str, Any],
        on_event: Callable[[str], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._config = config
        self._supervisor = supervisor
        self._workers = workers
        self._on_event = on_event
        self._on_fatal = on_fatal
        self._blocked = RestartBudget(limit=2, window_s=3600.0)

    async def given_up(self, worker: str, role: str, index: int, reason: str) -> None:
        """``worker`` has given up ``role``-``index``. If the actor answers it is given back to that worker; if not, it is
        ended, and the supervisor replaces it."""
        actor = self._supervisor.actors.get(f"{role}-{index}")
        if actor is None or actor.state != "serving":
            return
        try:
            async with asyncio.timeout(PROBE_S):
                await actor.handle.health.remote()
        except TimeoutError:
            self._end(actor, f"{actor.name} is stuck ({reason})")
            return
        except ray.exceptions.RayError as error:
            logger.info("%s is gone already: %s", actor.name, first_line(error))
            return
        if worker in self._workers and self._supervisor.actors.get(actor.name) is actor:
            await getattr(self._workers[worker], f"replace_{role}").remote(index, actor.handle)

    def blocked(self, worker: str, cause: str) -> None:
        """The event loop of ``worker`` stands still: none of its episodes goes on. It is replaced, but not for ever."""
        if not self._blocked.allow("worker", time.monotonic()):
            self._on_fatal(cause)
        for actor in list(self._supervisor.actors.values()):
            if actor.role.name == "worker" and worker_name(actor.index, actor.attempt) == worker:
                self._end(actor, cause)

    def engine_broken(self, name: str, reason: str) -> None:
        """An engine does not take weights."""
        self._end_engine(name, f"{name} did not take the weights ({reason})")

    def engine_unwell(self, name: str, reason: str) -> None:
        """An engine is not dead, but does not say that it is well."""
        self._end_engine(name, f"{name} is not well ({reason})")

    def _end_engine(self, name: str, why: str) -> None:
        for actor in list(self._supervisor.actors.values()):
            if actor.role.name == "engine" and engine_name(actor.index, actor.attempt) == name:
                self._end(actor, why)

    async def forget_client(self, name: str) -> None:
        """Environments, scorings, requests and sessions that a dead worker left behind end."""
        for handle in [h for role in ("environment", "reward", "engine") for h in self._supervisor.handles(role)]:
            try:
                async with asyncio.timeout(self._config.environments.step_timeout_s):
                    await handle.forget_client.remote(name)
            except (ray.exceptions.RayError, TimeoutError) as error:
                logger.warning("what %s left behind was not closed: %s", name, first_line(error))

    def _end(self, actor: Actor, why: str) -> None:
        self._on_event(why)
        ray.kill(actor.handle)
