"""Watches that the run trains: warns with the name of whom it waits for, and ends a run in which nothing finishes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from experience.books import clock
from experience.slots import Wait
from orchestrator.config import RunConfig
from orchestrator.dispatcher import Dispatcher
from orchestrator.fleet import Fleet
from orchestrator.pulses import Pulses
from orchestrator.stall import Evidence, StallWatch, judge
from orchestrator.stuck_actors import PROBE_S
from orchestrator.supervisor import Supervisor, first_line

logger = logging.getLogger(__name__)

SILENT_S = 2.0
"""An actor counts as silent in a stall when it has not answered for this long."""
GROUPS_ASKED = 8
"""Groups, the oldest ones, whose episodes the workers are asked about."""


@dataclass(frozen=True)
class Parts:
    """What the watchdog looks at when the run stands still."""

    supervisor: Supervisor
    pulses: Pulses
    dispatcher: Dispatcher
    fleet: Fleet
    workers: Mapping[str, Any]
    groups_per_update: int
    publishing: Callable[[], tuple[int, float] | None]
    """The version on its way to the engines and when that began (`time.monotonic`)."""
    situation: Callable[[], tuple[str, bool]]
    """The run's phase, and whether an evaluation is under way."""


class Watchdog:
    """`run` warns through ``on_event`` and returns the reason when the run must end."""

    def __init__(self, config: RunConfig, parts: Parts, on_event: Callable[[str], None]) -> None:
        self._config = config
        self._parts = parts
        self._on_event = on_event
        self._touched_at = time.monotonic()
        self._learner_phase = ("", self._touched_at)
        self._watch = StallWatch(
            config.stall_warn_factor, config.stall_warn_floor_s, config.stall_timeout_s / 2, self._touched_at
        )
        self.stalls: list[dict[str, Any]] = []
        """One entry a stall: ``began_at`` (Unix seconds), ``seconds``, ``stage, group, episode, actor, detail``."""

    def touch(self) -> None:
        """Something finished: an episode, a step, an evaluation."""
        self._touched_at = time.monotonic()

    def trained(self) -> None:
        """A step is done."""
        self.touch()
        if self._watch.warned:
            seconds = time.monotonic() - self._watch.since
            self.stalls[-1]["seconds"] = round(seconds, 2)
            self._on_event(f"training goes on after {seconds:.0f} s")
        self._watch.trained(time.monotonic())

    def episode(self, seconds: float) -> None:
        """An episode took that long."""
        self.touch()
        if seconds > 0:
            self._watch.episode(seconds)

    async def run(self) -> str:
        """Until nothing has finished for ``run.stall_timeout_s``; says what it was waiting for."""
        limit = self._config.stall_timeout_s
        self._watch.since = self._touched_at = time.monotonic()
        while True:
            await asyncio.sleep(min(0.5, limit / 8))
            now = time.monotonic()
            self._follow_learner(now)
            idle = now - self._touched_at
            if idle >= limit:
                return f"nothing finished for {idle:.0f} s (run.stall_timeout_s={limit:g}). {await self._name(idle)}"
            phase, evaluating = self._parts.situation()
            resting = evaluating or phase != "training"
            if (not resting or idle > self._watch.expected_s()) and self._watch.overdue(now):
                self._on_event(await self._name(now - self._watch.since))

    async def _name(self, idle: float) -> str:
        """Judge, keep the verdict among the `stalls`, and put it in words."""
        stall = judge(await self._evidence())
        entry = {
            "began_at": round(time.time() - idle, 3),
            "seconds": round(idle, 2),
            "stage": stall.stage,
            "group": stall.group,
            "episode": stall.episode,
            "actor": stall.actor,
            "detail": stall.detail,
        }
        if self.stalls and abs(self.stalls[-1]["began_at"] - entry["began_at"]) < 1.0:
            self.stalls[-1] = entry
        else:
            self.stalls.append(entry)
        return (
            f"nothing was trained for {idle:.0f} s (expected: a step within {self._watch.expected_s():.0f} s). "
            f"Everybody waits for {stall}"
        )

    def _follow_learner(self, now: float) -> None:
        phase = self._parts.pulses.live.get("learner-0", {}).get("phase", "")
        if phase != self._learner_phase[0]:
            self._learner_phase = (phase, now)

    async def _evidence(self) -> Evidence:
        parts, now = self._parts, time.monotonic()
        oldest = parts.dispatcher.oldest(GROUPS_ASKED)
        queue = parts.pulses.live.get("queue-0", {})
        publishing = parts.publishing()
        phase, evaluating = parts.situation()
        actors = parts.supervisor.actors.values()
        roles = Counter(actor.role.name for actor in actors)
        return Evidence(
            phase=phase,
            silent=parts.pulses.silent(SILENT_S),
            away=[actor.name for actor in actors if actor.state in ("starting", "dead")],
            learner_phase=self._learner_phase[0] or "waiting",
            learner_phase_s=now - self._learner_phase[1],
            publishing=None if publishing is None else publishing[0],
            publishing_s=0.0 if publishing is None else now - publishing[1],
            publication_awaits=parts.fleet.awaited,
            evaluating=evaluating,
            in_flight=parts.dispatcher.in_flight,
            oldest=oldest,
            waits=await self._waits([group for group, _ in oldest]),
            now=clock(),
            ready=int(queue.get("ready", 0)),
            needed=parts.groups_per_update,
            paced=parts.dispatcher.paced,
            phases={
                name: answer["role"]
                for name, answer in parts.pulses.live.items()
                if answer.get("role", "mixed") != "mixed"
            },
            alone={actor.role.name: actor.name for actor in actors if roles[actor.role.name] == 1},
        )

    async def _waits(self, groups: list[str]) -> list[Wait]:
        """What the episodes of ``groups`` wait for, of the oldest group first; a worker that does not answer is left out."""
        found: list[Wait] = []
        for name, handle in list(self._parts.workers.items()):
            try:
                async with asyncio.timeout(PROBE_S):
                    found += await handle.waits.remote(groups, GROUPS_ASKED)
            except TimeoutError:
                logger.warning("%s did not say what its episodes wait for within %g s", name, PROBE_S)
            except ray.exceptions.RayError as error:
                logger.info("%s is gone: %s", name, first_line(error))
        order = {group: place for place, group in enumerate(groups)}
        return sorted(found, key=lambda wait: (order.get(wait.group_id, len(order)), wait.since))
