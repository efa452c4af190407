"""Asks every actor how it is, twice a second: for the view, for the accounts, and to notice who does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from experience.books import Books, clock
from experience.wire import decode
from orchestrator.accounting.accountant import Accountant
from orchestrator.actor_shell import Pulse
from orchestrator.processes import engine_name
from orchestrator.supervisor import Actor, Supervisor, first_line
from rollout_workers.assignments import WorkerStats
from rollout_workers.engines.protocol import EngineHealth

logger = logging.getLogger(__name__)

EVERY_S = 0.5
ANSWER_S = 1.0
"""How long an actor has to answer before the round goes on without it."""
KV_COUNTS = (
    "kv_received_mb",
    "handoffs",
    "handoffs_failed",
    "handoff_s",
    "parked_sessions",
    "parked_mb",
    "parks",
    "park_hits",
    "park_evictions",
)
"""What an engine's health tells of KV that was handed over or parked."""


class Pulses:
    """``own`` are the controller's books; ``situation()`` says whether the run trains and how many seconds were spent
    publishing so far."""

    def __init__(
        self, supervisor: Supervisor, accountant: Accountant, own: Books, situation: Callable[[], tuple[bool, float]]
    ) -> None:
        self._supervisor = supervisor
        self._accountant = accountant
        self._own = own
        self._situation = situation
        self._published_s = 0.0
        self._round = asyncio.Lock()
        self._asked_in_vain: dict[str, float] = {}
        self.live: dict[str, dict[str, Any]] = {}
        """The last answer of each actor, in the words of the view."""
        self.health: dict[str, EngineHealth] = {}
        """The last health of each engine, by the name of its life."""
        self._round_over = asyncio.Event()

    async def watch(self) -> None:
        """For ever: ask, and account for what was told."""
        while True:
            await self.ask_all()
            await asyncio.sleep(EVERY_S)

    async def ask_all(self) -> None:
        """One round; an actor that does not answer in time is left out of it."""
        async with self._round:
            await self._ask_all()

    async def _ask_all(self) -> None:
        actors = list(self._supervisor.actors.values())
        answers = await asyncio.gather(*(self._ask(actor) for actor in actors))
        for actor, pulse in zip(actors, answers, strict=True):
            if pulse is not None:
                self._accountant.pulse(actor.name, actor.attempt, pulse.accounts, pulse.slots, pulse.cpu_s)
        names = {actor.name for actor in actors}
        self.live = {name: answer for name, answer in self.live.items() if name in names}
        self._asked_in_vain = {name: at for name, at in self._asked_in_vain.items() if name in names}
        self._accountant.pulse(self._own.actor, 0, self._own.totals(clock()), {}, time.process_time())
        training, published_s = self._situation()
        workers = [actor for actor in actors if actor.role.name == "worker"]
        missing = sum(actor.state != "serving" for actor in workers) / len(workers) if workers else 0.0
        self._accountant.close_window(clock(), training, published_s - self._published_s, missing)
        self._published_s = published_s
        engines = {engine_name(actor.index, actor.attempt) for actor in actors}
        self.health = {name: health for name, health in self.health.items() if name in engines}
        self._round_over.set()
        self._round_over = asyncio.Event()

    async def next_round(self) -> None:
        """Until the next round of answers is complete."""
        await self._round_over.wait()

    def silent(self, least_s: float) -> dict[str, float]:
        """Actors that have not answered for that long at least, with the seconds."""
        now = time.monotonic()
        return {name: now - at for name, at in self._asked_in_vain.items() if now - at >= least_s}

    def prefix_hit(self) -> float | None:
        """Share of the prompt tokens of all living engines whose KV was there already; None when there were none."""
        cached = sum(answer.get("cached_tokens", 0) for answer in self.live.values())
        computed = sum(answer.get("prefill_tokens", 0) for answer in self.live.values())
        return cached / (cached + computed) if cached + computed else None

    def kv(self) -> dict[str, float]:
        """What all living engines handed over and parked so far; nothing where neither is in use."""
        totals = {name: sum(answer.get(name, 0) for answer in self.live.values()) for name in KV_COUNTS}
        return {name: round(float(total), 3) for name, total in totals.items()} if any(totals.values()) else {}

    async def _ask(self, actor: Actor) -> Pulse | None:
        name = actor.name
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                pulse: Pulse = await actor.handle.pulse.remote()
        except TimeoutError:
            if actor.state == "serving":
                self._asked_in_vain.setdefault(name, asked_at)
            return None
        except Exception as error:  # noqa: BLE001 - a dead actor is the supervisor's business
            logger.debug("%s did not say how it is: %s", name, first_line(error))
            self.live.pop(name, None)
            self._asked_in_vain.pop(name, None)
            return None
        self._asked_in_vain.pop(name, None)
        self.live[name] = _described(actor.role.name, pulse.answer)
        if actor.role.name == "engine":
            self.health[engine_name(actor.index, actor.attempt)] = decode(pulse.answer, EngineHealth)
        return pulse


def _described(role: str, answer: Any) -> dict[str, Any]:
    """An actor's answer in the words of the view."""
    if role == "engine":
        health = decode(answer, EngineHealth)
        return {
            "version": health.version,
            "running": health.running,
            "waiting": health.waiting,
            "kv_used": health.kv_used,
            "generated_tokens": health.generated_tokens,
            "cached_tokens": health.cached_tokens,
            "prefill_tokens": health.prefill_tokens,
            "role": health.role.value,
            **{name: getattr(health, name) for name in KV_COUNTS},
        }
    if role == "worker":
        stats = decode(answer, WorkerStats)
        return {
            "episodes": stats.running,
            "limit": stats.limit,
            "queued": stats.queued,
            "generating": stats.generating,
            "in_environment": stats.in_environment,
            "in_reward": stats.in_reward,
            "finished": stats.finished,
            "failed": stats.failed,
        }
    return dict(answer)
