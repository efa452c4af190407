"""The engines of a run: started, given weights, announced to the workers, probed, drained, scaled.

==================  ==================================  ==================================  ===========================
what                consumes                            produces                            waits for
==================  ==================================  ==================================  ===========================
``ready``           the process of an engine            an engine that serves what is       loading, a transfer, a
                                                        current, known to all workers       commit
``lost``            the death of an engine              requests that go on elsewhere       nothing
``scale``           what a person asked for             engines that serve or have left     start-up; requests that end
``run_probes``      the health of engines               engines that are ended because      answers, `fleet.probe_*`
                                                        they give none
==================  ==================================  ==================================  ===========================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

from experience.wire import decode
from orchestrator.engine_roles import EngineRoles
from orchestrator.evaluations import Evaluations
from orchestrator.fleet import Fleet, FleetEvents
from orchestrator.fleet_log import FleetLog
from orchestrator.prober import Prober
from orchestrator.probes import ProbePolicy
from orchestrator.processes import Processes, engine_name
from orchestrator.pulses import Pulses
from orchestrator.run_plan import RunPlan
from orchestrator.scaling import ScaleError, parse_change, plan_scale
from orchestrator.stuck_actors import StuckActors
from orchestrator.supervisor import Actor, Role, Supervisor, first_line
from orchestrator.workforce import Workforce
from rollout_workers.disaggregation.roles import Flip
from rollout_workers.engines.protocol import EngineHealth, EngineRole
from rollout_workers.engines.servers.errors import ServerDied
from weight_sync.membership import MemberState

logger = logging.getLogger(__name__)

ROLE = "engine"
REROUTE_S = 120.0
"""How long the requests of a lost engine may be without a place before that is told as a failure."""


@dataclass(frozen=True)
class CrewEvents:
    """Whom the crew tells of the road of the weights (see `FleetEvents`), and in what it runs tasks of its own."""

    expire: Callable[[int], Awaitable[None]]
    served: Callable[[int], Awaitable[None]]
    committed: Callable[[int], Awaitable[None]]
    happened: Callable[[str], None]
    """Something that a person should notice."""
    keep: Callable[[Any], None]
    """Run a coroutine beside the rest; its error ends the run."""


class EngineCrew:
    """``engines`` are those that workers may send requests to, by name."""

    def __init__(
        self,
        plan: RunPlan,
        processes: Processes,
        supervisor: Supervisor,
        workforce: Workforce,
        evaluations: Evaluations,
        stuck: StuckActors,
        log: FleetLog,
        events: CrewEvents,
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._processes = processes
        self._supervisor = supervisor
        self._workforce = workforce
        self._evaluations = evaluations
        self._stuck = stuck
        self._log = log
        self._events = events
        self.engines: dict[str, Any] = {}
        self._since: dict[str, int] = {}
        """The version that each of them joined with."""
        self.fleet = Fleet(
            plan.config.weights,
            plan.version,
            self._transfer,
            FleetEvents(
                expire=events.expire,
                prepare=self._prepare,
                served=events.served,
                committed=events.committed,
                joined=self._joined,
                broken=self._broken,
                changed=self._changed,
            ),
        )
        self._prober = Prober(ProbePolicy(plan.config.fleet), self.fleet.held, self._condemn)
        self._next_index = plan.config.engines.count
        self._scaling = asyncio.Lock()
        self.role = Role(ROLE, self._spawn, self._ready, self._lost)

    async def run_probes(self) -> None:
        """For ever."""
        await self._prober.run()

    async def run_roles(self, pulses: Pulses) -> None:
        """Have engines prefill or decode as their load says; for ever."""
        await EngineRoles(self._config.engines, self.engines, self._workforce.tell, self._flipped).run(pulses)

    def _flipped(self, flip: Flip) -> None:
        self._log.note(flip.to.value, flip.name, self.fleet.held(flip.name), flip.reason)
        self._events.happened(f"{flip.name} does {flip.to.value} from now on")

    async def publish(self, version: int) -> None:
        """The learner holds ``version``: bring it to all engines. Returns when they serve it."""
        began_at = time.monotonic()
        await self.fleet.publish(version)
        self._log.published(time.monotonic() - began_at)

    async def first_token_at(self) -> float | None:
        """When the first token of the run was sampled (Unix seconds), as far as the engines that are there know."""
        times = []
        for handle in self._supervisor.handles(ROLE):
            try:
                async with asyncio.timeout(5):
                    times.append(await handle.first_token_at.remote())
            except Exception as error:  # noqa: BLE001 - an engine that is gone has no first token to tell
                logger.info("an engine did not answer: %s", first_line(error))
        return min((at for at in times if at is not None), default=None)

    async def nodes(self) -> list[str]:
        """Host names of the engines."""
        return [await handle.node.remote() for handle in self._supervisor.handles(ROLE)]

    # Coming and going

    def _spawn(self, index: int, attempt: int) -> Any:
        self.fleet.starting(engine_name(index, attempt))
        return self._processes.engine(index, attempt)

    async def _ready(self, index: int, attempt: int, handle: Any) -> None:
        name, plan = engine_name(index, attempt), self._plan
        path = plan.checkpoint or plan.model_path
        await handle.load.remote(path, self._config.model.dtype, plan.resources.engine_threads, plan.version)
        await self.fleet.join(name, handle, plan.version)
        await self._workforce.tell("add_engine", name, handle, self._since[name])
        self._prober.watch(name, handle)

    async def _joined(self, name: str, handle: Any) -> None:
        await self._evaluations.engine_joined(handle, self.fleet.membership.current_version)
        self.engines[name] = handle
        self._since[name] = self.fleet.membership.current_version

    async def announce(self, worker: Any) -> None:
        """Tell a new worker of all engines."""
        for name, handle in list(self.engines.items()):
            await worker.add_engine.remote(name, handle, self._since[name])

    async def _lost(self, index: int, attempt: int, cause: BaseException) -> None:
        self._take_out(engine_name(index, attempt), first_line(cause))

    def _take_out(self, name: str, why: str) -> None:
        """An engine is gone, or as good as gone: its requests go elsewhere without waiting for its process to end."""
        self._prober.forget(name)
        self.fleet.lost(name, why)
        if self.engines.pop(name, None) is not None:
            self._events.keep(self._move_requests(name))

    async def _move_requests(self, name: str) -> None:
        """Tell the workers, and write down when the requests have found another place."""
        await self._workforce.ask("remove_engine", name)
        answers = await self._workforce.ask("relocated", name, REROUTE_S)
        for worker, told in answers.items():
            if told is not None:
                requests, noticed_at, placed_at = told
                detail = f"{worker} has placed its {requests} requests elsewhere"
                self._log.note(
                    "rerouted", name, None, detail, requests=requests, noticed_at=noticed_at, placed_at=placed_at
                )

    def _changed(self, name: str, state: MemberState, version: int | None, why: str) -> None:
        self._log.note(state.value, name, version, why)

    def _condemn(self, name: str, reason: str) -> None:
        self._log.note("condemned", name, self.fleet.held(name), reason)
        self._stuck.engine_unwell(name, reason)
        self._take_out(name, f"it is not well ({reason})")

    def _broken(self, name: str, reason: str) -> None:
        self._stuck.engine_broken(name, reason)
        self._take_out(name, f"it did not take the weights ({reason})")

    # Scaling

    async def scale(self, text: str) -> dict[str, Any]:
        """Do what a person asked for (``engines=+1``, ``engines=-1``, ``engines=3``); returns when it is done.

        Raises:
            ScaleError: It cannot be done, or the new engines did not start; engines that serve are as before.
        """
        change = parse_change(text)
        self._check_mode(text)
        async with self._scaling:
            prefilling = await self._prefilling()
            actors = self._actors()
            names = {actor.index: engine_name(actor.index, actor.attempt) for actor in actors}
            serving = [index for index, name in names.items() if name in self.engines and name not in prefilling]
            others = [actor.index for actor in actors if actor.index not in serving]
            plan = plan_scale(change, serving, others, self._next_index)
            self._check_resources(text, len(plan.add))
            self._next_index += len(plan.add)
            self._log.note("scaled", detail=f"engines: {plan.before} -> {plan.after}")
            self._events.happened(f"engines: {plan.before} -> {plan.after} ({text})")
            jobs = [*(self._grow(index) for index in plan.add), *(self._shrink(index) for index in plan.remove)]
            results = await asyncio.gather(*jobs, return_exceptions=True)
            failures = [result for result in results if isinstance(result, BaseException)]
            if failures:
                raise ScaleError(
                    f"{text}: {len(failures)} of {len(jobs)} engines did not: {first_line(failures[0])}; "
                    f"there are {len(self._actors())} engines now"
                )
            return {"before": plan.before, "after": len(self._actors()), "members": self.members()}

    def members(self) -> list[dict[str, Any]]:
        """``engine``, ``state`` and ``version`` of every engine that is there."""
        found = [self.fleet.membership.get(name) for name in self.fleet.membership.alive()]
        return [{"engine": member.name, "state": member.state.value, "version": member.version} for member in found]

    def _actors(self) -> list[Actor]:
        return [actor for actor in self._supervisor.actors.values() if actor.role.name == ROLE]

    async def _prefilling(self) -> set[str]:
        """Engines that prefill at this moment: in a split those that decode come and go."""
        if not self._config.engines.split:
            return set()
        found = set()
        for name, handle in list(self.engines.items()):
            try:
                async with asyncio.timeout(self._config.fleet.probe_timeout_s):
                    health = decode(await handle.health.remote(), EngineHealth)
            except (TimeoutError, ray.exceptions.RayError) as error:
                raise ScaleError(f"{name} does not say whether it prefills: {first_line(error)}; try again") from None
            if health.role is EngineRole.PREFILL:
                found.add(name)
        return found

    def _check_mode(self, text: str) -> None:
        config = self._config
        if config.run.deterministic:
            raise ScaleError(f"{text}: run.deterministic=true needs engines.replicas=1")
        if config.mode == "sync" and config.engines.kind == "synthetic":
            raise ScaleError(
                f"{text}: in mode=sync modelled engines train in turns on as many accelerators as at the start"
            )

    def _check_resources(self, text: str, count: int) -> None:
        wanted = self._plan.resources.engine_gpus * count
        if wanted <= 0:
            return
        free = float(ray.available_resources().get("GPU", 0.0))
        if wanted > free:
            raise ScaleError(
                f"{text}: {wanted:g} GPUs are needed (each engine has {self._plan.resources.engine_gpus:g}) and the cluster "
                f"has {free:g} free"
            )

    async def _grow(self, index: int) -> None:
        await self._supervisor.add(self.role, index)
        self._events.happened(f"engine-{index} serves version {self.fleet.held(engine_name(index, 0))}")

    async def _shrink(self, index: int) -> None:
        actor = self._supervisor.retiring(f"{ROLE}-{index}")
        name = engine_name(actor.index, actor.attempt)
        self.engines.pop(name, None)
        if self.fleet.state(name) == MemberState.SERVING.value:
            self.fleet.drain(name, f"its requests may end within {self._config.fleet.drain_s:g} s")
        self._prober.forget(name)
        answers = await self._workforce.ask("drain_engine", name, self._config.fleet.drain_s)
        ended, moved = (sum(answer[place] for answer in answers.values()) for place in (0, 1))
        told = f"drained: {ended} requests ended there, {moved} went on elsewhere"
        await self.fleet.leave(name, told)
        await self._supervisor.retire(actor)
        self._events.happened(f"engine-{index} has left ({told})")

    # The road of the weights

    async def _prepare(self, version: int) -> None:
        await self._learner().prepare.remote(version)

    async def _transfer(self, version: int, members: list[tuple[str, Any]]) -> list[str]:
        """Move the learner's prepared version to ``members``; returns who has it."""
        if not members:
            return []
        learner = self._learner()
        limit = self._config.weights.timeout_s
        try:
            async with asyncio.timeout(limit):
                offer = await learner.offer.remote(version, [name for name, _ in members])
                stages = [self.fleet.while_there(name, handle.stage.remote(offer)) for name, handle in members]
                results = await asyncio.gather(_resolve(learner.send.remote()), *stages, return_exceptions=True)
        except TimeoutError:
            logger.error("version %d: no transfer to %s within %s s", version, [n for n, _ in members], limit)
            return []
        for result in results:
            if isinstance(result, BaseException):
                logger.error("version %d: transfer: %s", version, first_line(result))
        for (name, _), result in zip(members, results[1:], strict=True):
            if isinstance(result, (ray.exceptions.RayActorError, ServerDied)):
                self._take_out(name, f"it was gone when version {version} came")
        return [name for (name, _), result in zip(members, results[1:], strict=True) if result == version]

    def _learner(self) -> Any:
        return self._supervisor.actors["learner-0"].handle


async def _resolve(reference: Any) -> Any:
    """An object reference as a coroutine (asyncio.gather takes only awaitables of its own kind)."""
    return await reference
