"""A worker's door to the environments: leases on the environment actors.

========  =====================================================  =================================================
consumes  tasks; actions of hundreds of episodes                 batched by :class:`~env_pool.batches.Channel`
produces  observations, evidence, faults by whose fault it was   never a reward
waits     for answers (call time-out + ``ANSWER_GRACE_S``),      named in the error
          for an actor while none is alive
========  =====================================================  =================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from env_pool.calls import Call, CallResult
from env_pool.config import EnvironmentsConfig
from env_pool.fleet import Fleet, OnLost
from env_pool.lease import Lease
from experience.records import Task
from experience.wire import decode, encode

ANSWER_GRACE_S = 60.0
"""How much longer than a call's own time-out the pool waits before it calls the actor lost. The actor reports hung
environments itself; this is for an actor that is stuck as a whole (native code that never releases the interpreter)."""


class EnvironmentPool:
    """Leases environments on the given actors; one instance a worker, used on one event loop."""

    def __init__(
        self, handles: Sequence[Any], config: EnvironmentsConfig, client: str, on_lost: OnLost | None = None
    ) -> None:
        """``handles`` are Ray handles of :class:`~env_pool.actor.EnvironmentActor`; ``client`` is unique in the run.

        ``on_lost(index, reason)`` is called when an actor is found dead; whoever hears it should send a replacement
        through :meth:`replace`.
        """
        self.config = config
        self._client = client
        self._fleet = Fleet(handles, client, "environment actor", config.recovery_timeout_s, on_lost)
        self._counter = 0
        self._open: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def leases(self) -> int:
        """Environments held now."""
        return len(self._open)

    @property
    def alive(self) -> list[int]:
        """Indices of the actors that answer."""
        return self._fleet.alive

    def lease(self, task: Task, seed: int = 0) -> Lease:
        """An environment for one episode: ``async with pool.lease(task) as env``, or ``env = await pool.lease(task)``.

        ``seed`` is the episode's; it decides which of its steps noise disturbs.
        """
        self._counter += 1
        return Lease(self, f"{self._client}/{self._counter}", task, seed)

    def replace(self, index: int, handle: Any) -> None:
        """A new actor takes place ``index``; environments that were there are rebuilt at their next call."""
        self._fleet.replace(index, handle)

    async def aclose(self) -> None:
        """Give back what is being given back and close the channels."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=self.config.step_timeout_s)
        self._fleet.close()

    async def acquire(self, key: str) -> None:
        """Bind a lease to an actor (for :class:`Lease`)."""
        await self._fleet.acquire(key)
        self._open.add(key)

    def release(self, key: str) -> None:
        """End a lease's binding (for :class:`Lease`)."""
        self._fleet.release(key)
        self._open.discard(key)

    async def call(self, key: str, call: Call) -> CallResult:
        """One call (for :class:`Lease`). Raises :class:`~env_pool.batches.ActorLost`."""
        return decode(await self._fleet.call(key, encode(call), call.timeout_s + ANSWER_GRACE_S), CallResult)

    def close_later(self, lease: Lease) -> None:
        """Close a lease without making its episode wait."""
        closing = asyncio.ensure_future(lease.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
