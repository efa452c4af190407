"""``engines.roles: auto`` in a run: what `RoleController` decides from the engines' pulses, carried out.

==========  ==================================  ====================================  ==============================
loop        consumes                            produces                              waits for
==========  ==================================  ====================================  ==============================
``run``     the health of all engines           other roles, told to the engine and   a round of pulses
                                                then to all workers
==========  ==================================  ====================================  ==============================

An engine with another role ends what it has; from the moment the workers know, requests go where the roles say.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray

from experience.books import clock
from orchestrator.pulses import Pulses
from orchestrator.supervisor import first_line
from rollout_workers.disaggregation.roles import Decision, Flip, RoleController, RoleLoad
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth
from rollout_workers.engines.synthetic.cost_model import CostModel

logger = logging.getLogger(__name__)

Tell = Callable[..., Awaitable[None]]
"""Calls a method of every worker."""


class EngineRoles:
    """``engines`` are those in service, by name; ``flipped`` hears of roles that have changed."""

    def __init__(
        self, config: EnginesConfig, engines: Mapping[str, Any], tell: Tell, flipped: Callable[[Flip], None]
    ) -> None:
        self._config, self._engines, self._tell, self._flipped = config, engines, tell, flipped
        modelled = config.kind == "synthetic"
        policy = config.role_policy.scaled(1.0 / config.synthetic.time_scale) if modelled else config.role_policy
        self._controller = RoleController(policy)
        self._refused = ""

    async def run(self, pulses: Pulses) -> None:
        """For ever."""
        while True:
            await pulses.next_round()
            await self.look(pulses.health, clock())

    async def look(self, health: Mapping[str, EngineHealth], now: float) -> Decision:
        """Decide by what the engines in service told, and carry it out."""
        loads = [load_of(name, health[name], self._config) for name in self._engines if name in health]
        decision = self._controller.observe(loads, now)
        for flip in decision.flips:
            handle = self._engines[flip.name]
            try:
                await handle.set_role.remote(flip.to.value)
            except ray.exceptions.RayError as error:  # it has just died; whoever replaces it has its first role
                logger.warning("%s did not take the role to %s: %s", flip.name, flip.to.value, first_line(error))
                continue
            await self._tell("set_engine_role", flip.name, flip.to.value)
            self._flipped(flip)
        if decision.refused and decision.refused != self._refused:
            logger.info("no flip: %s", decision.refused)
        self._refused = decision.refused
        return decision


def load_of(name: str, health: EngineHealth, config: EnginesConfig) -> RoleLoad:
    """An engine's health in the words of the role controller. KV that was evicted is not told, so it counts as none."""
    modelled = config.synthetic if config.kind == "synthetic" else None
    return RoleLoad(
        name=name,
        role=health.role,
        queued=health.queued,
        backlog_tokens=health.backlog_tokens,
        prefilled_tokens=health.prefill_tokens,
        prefill_s=health.prefill_s,
        decoding=health.decoding,
        slots=modelled.slots * modelled.accelerators if modelled else config.slots,
        half_concurrency=modelled.half_concurrency * modelled.accelerators
        if modelled
        else config.role_policy.half_concurrency,
        local_cost=CostModel.from_config(modelled).local_prefill_cost if modelled else 1.0,
        generated_tokens=health.generated_tokens,
        finished=health.finished,
        suspended=max(0, health.sessions - health.running) + health.parked_sessions,
        kv_capacity=health.kv_capacity_tokens or float("inf"),
        kv_running=health.kv_running_tokens,
        kv_suspended=health.kv_suspended_tokens,
    )
