"""Asks the engines in service whether they are well, as `orchestrator.probes.ProbePolicy` says.

==========  ==============================  ===================================  =================================
loop        consumes                        produces                             waits for
==========  ==============================  ===================================  =================================
``run``     what the policy finds due       a task for each probe                the next probe that is due, or a
                                                                                 change (an engine, an answer)
``_ask``    an engine's health              answers and misses for the policy    the answer, the probe's time-out
==========  ==============================  ===================================  =================================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray

from experience.wire import decode
from orchestrator.probes import Condition, Probe, ProbePolicy
from orchestrator.supervisor import first_line
from rollout_workers.engines.protocol import EngineHealth

logger = logging.getLogger(__name__)


class Prober:
    """``held`` says which version an engine was given last; ``condemn`` is told whom to end, and why.

    An engine that reports an older version than it was given has lost its weights (a server that restarted behind our
    back): it is condemned at once.
    """

    def __init__(
        self, policy: ProbePolicy, held: Callable[[str], int | None], condemn: Callable[[str, str], None]
    ) -> None:
        self._policy = policy
        self._held = held
        self._condemn = condemn
        self._handles: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()

    def watch(self, name: str, handle: Any) -> None:
        """An engine serves from now on."""
        self._handles[name] = handle
        self._policy.joined(name, time.monotonic())
        self._changed.set()

    def forget(self, name: str) -> None:
        """An engine is gone or about to leave."""
        self._handles.pop(name, None)
        self._policy.left(name)

    async def run(self) -> None:
        """For ever."""
        try:
            while True:
                for probe in self._policy.due(time.monotonic()):
                    task = asyncio.create_task(self._ask(probe))
                    self._asking.add(task)
                    task.add_done_callback(self._asking.discard)
                await self._until(self._policy.next_at())
        finally:
            for task in self._asking:
                task.cancel()

    async def _until(self, at: float | None) -> None:
        """Until then, or until something has changed."""
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def _ask(self, probe: Probe) -> None:
        name, began_at = probe.name, time.monotonic()
        held = self._held(name)
        try:
            async with asyncio.timeout(probe.timeout_s):
                health = decode(await self._handles[name].health.remote(), EngineHealth)
        except ray.exceptions.RayActorError as error:
            logger.info("%s is gone: %s", name, first_line(error))  # the supervisor has seen it, too
            self.forget(name)
        except TimeoutError:
            self._missed(probe, f"no answer within {probe.timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 - an engine that cannot say how it is counts as one that does not
            self._missed(probe, first_line(error))
        else:
            if held is not None and health.version < held:
                self.forget(name)
                self._condemn(name, f"it serves version {health.version} although it was given version {held}")
            self._policy.answered(name, probe.number, time.monotonic() - began_at, time.monotonic())
        self._changed.set()

    def _missed(self, probe: Probe, why: str) -> None:
        condition = self._policy.missed(probe.name, probe.number, time.monotonic())
        if condition is None:
            return
        logger.warning("%s is %s: %s", probe.name, condition.value, why)
        if condition is Condition.CONDEMNED:
            self.forget(probe.name)
            self._condemn(probe.name, why)
