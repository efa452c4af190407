"""Keeps the actors of a run alive: starts them, notices their death at once, replaces them.

A death is an event, not a poll: every actor has a call `alive` that never returns, and Ray ends that call when the
process is gone. What a role does on arrival and loss of an actor is the role's own; how often one may be replaced is
`orchestrator.failures.RestartBudget`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.failures import RestartBudget

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""How long an actor may take to let go of what it holds before it is killed."""


@dataclass(frozen=True)
class Role:
    """How actors of one kind are made and unmade.

    ``spawn(index, attempt)`` creates the actor (its process starts in the background), ``ready`` brings it into
    service, ``lost`` takes it out again. A role without ``replace`` is vital: its death ends the run.
    """

    name: str
    spawn: Callable[[int, int], Any]
    ready: Callable[[int, int, Any], Awaitable[None]]
    lost: Callable[[int, int, BaseException], Awaitable[None]]
    replace: bool = True


@dataclass
class Actor:
    """One living actor."""

    role: Role
    index: int
    attempt: int
    handle: Any
    state: str = "starting"
    watch: asyncio.Task[None] | None = None
    retiring: bool = False
    """It is being taken out of the run: its death is no failure."""

    @property
    def name(self) -> str:
        return f"{self.role.name}-{self.index}"


@dataclass
class Supervisor:
    """Starts and replaces actors. ``on_event`` hears of replacements, ``on_fatal`` of what ends the run."""

    on_event: Callable[[str], None]
    on_fatal: Callable[[str], None]
    startup_timeout_s: float
    budget: RestartBudget = field(default_factory=RestartBudget)
    actors: dict[str, Actor] = field(default_factory=dict)
    replaced: int = 0
    _stopping: bool = False

    async def start(self, role: Role, count: int) -> None:
        """Start ``count`` actors of a role together; returns when all are in service. Raises what the first one raised."""
        await asyncio.gather(*(self._launch(role, index, 0) for index in range(count)))

    def spawn(self, role: Role, count: int) -> None:
        """Begin to start processes without waiting, so that slow imports overlap; `start` picks them up."""
        for index in range(count):
            actor = Actor(role, index, 0, role.spawn(index, 0))
            self.actors[actor.name] = actor

    async def add(self, role: Role, index: int) -> None:
        """Start one more actor of a role; returns when it is in service.

        Raises what kept it from that; the actor is ended, the others go on, and nothing is tried again.
        """
        try:
            await self._launch(role, index, 0)
        except Exception as error:
            actor = self.actors.pop(f"{role.name}-{index}", None)
            if actor is not None:
                ray.kill(actor.handle)
            await role.lost(index, 0, error)
            raise

    def retiring(self, name: str) -> Actor:
        """An actor is about to be taken out: it is not replaced any more. Raises KeyError if there is none of that name."""
        actor = self.actors[name]
        actor.retiring, actor.state = True, "draining"
        return actor

    async def retire(self, actor: Actor) -> None:
        """End an actor that was announced by `retiring`."""
        if actor.watch is not None:
            actor.watch.cancel()
        if self.actors.get(actor.name) is actor:
            del self.actors[actor.name]
        try:
            async with asyncio.timeout(STOP_S):
                await actor.handle.stop.remote()
        except TimeoutError:
            logger.warning("%s did not stop within %g s; it is killed", actor.name, STOP_S)
        except ray.exceptions.RayError as error:
            logger.info("%s is gone already: %s", actor.name, first_line(error))
        ray.kill(actor.handle)

    def handles(self, role_name: str) -> list[Any]:
        """Handles of a role's actors by index."""
        chosen = [actor for actor in self.actors.values() if actor.role.name == role_name]
        return [actor.handle for actor in sorted(chosen, key=lambda actor: actor.index)]

    async def stop(self) -> None:
        """End all actors; none is replaced any more."""
        self._stopping = True
        for actor in self.actors.values():
            if actor.watch is not None:
                actor.watch.cancel()
        stops = [asyncio.wrap_future(actor.handle.stop.remote().future()) for actor in self.actors.values()]
        if stops:
            await asyncio.wait(stops, timeout=STOP_S)
        for actor in self.actors.values():
            ray.kill(actor.handle)

    async def _launch(self, role: Role, index: int, attempt: int) -> None:
        name = f"{role.name}-{index}"
        actor = self.actors.get(name)
        if actor is None or actor.attempt != attempt:
            actor = Actor(role, index, attempt, role.spawn(index, attempt))
            self.actors[name] = actor
        try:
            async with asyncio.timeout(self.startup_timeout_s):
                await role.ready(index, attempt, actor.handle)
        except TimeoutError:
            raise TimeoutError(
                f"{name} was not ready within run.startup_timeout_s={self.startup_timeout_s:g} s; see its log "
                f"{name}-{attempt}.log in the run's logs directory"
            ) from None
        actor.state = "serving"
        actor.watch = asyncio.create_task(self._watch(actor))

    async def _watch(self, actor: Actor) -> None:
        cause: BaseException = RuntimeError("it ended by itself")
        try:
            await actor.handle.alive.remote()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - an actor can die of anything; all of it is handled the same way
            cause = error
        if not self._stopping:
            await self._recover(actor, cause)

    async def _recover(self, actor: Actor, cause: BaseException) -> None:
        actor.state = "dead"
        if actor.retiring:
            logger.warning("%s died while it was being taken out (%s)", actor.name, first_line(cause))
            await actor.role.lost(actor.index, actor.attempt, cause)
            return
        summary = f"{actor.name} died ({first_line(cause)})"
        logger.error("%s", summary)
        if not actor.role.replace:
            self.on_fatal(f"{summary}; the run continues from its last checkpoint with `millrace resume`")
            return
        if not self.budget.allow(actor.role.name, time.monotonic()):
            self.on_fatal(f"{summary}: more than {self.budget.limit} {actor.role.name} actors died within two minutes")
            return
        self.replaced += 1
        self.on_event(f"{summary}; replacing it")
        ray.kill(actor.handle)
        try:
            await actor.role.lost(actor.index, actor.attempt, cause)
            await self._launch(actor.role, actor.index, actor.attempt + 1)
        except Exception as error:
            if self._stopping:
                logger.info("%s was not replaced: the run is over", actor.name)
                return
            logger.exception("replacing %s failed", actor.name)
            replacement = self.actors[actor.name]
            if replacement is actor:
                self.on_fatal(f"{actor.name} could not be replaced: {first_line(error)}")
            else:
                await self._recover(replacement, error)
            return
        self.on_event(f"{actor.name} is back (attempt {actor.attempt + 1})")


def first_line(error: BaseException) -> str:
    """Type and first telling line of an error; Ray wraps the original one, which is what a person wants to see."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return first_line(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "error raised in its creation task" in str(error):  # Ray gives the traceback as text; its last line is the cause
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
