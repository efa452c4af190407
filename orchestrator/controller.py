"""The controller: one actor that holds metadata only and makes a run out of the others.

==================  ===================================  ====================================  =======================
loop                consumes                             produces                              waits for
==================  ===================================  ====================================  =======================
``_queue_events``   ready, returned, closed groups       pacing slots, cancellations           the queue actor
``publish``         a version that the learner holds     engines that serve it, slots          staging and commits
``EngineCrew``      engines coming and going             engines in service, probed            see there
``_pump``           pacing room, free workers            groups opened and assigned            nothing
``episodes_ended``  reports of the workers               failure verdicts, evaluations         nothing
``_watch_stall``    signs of progress                    warnings, and an error, that name     ``run.stall_timeout_s``
                                                         what everybody waits for
``Pulses``          how every actor is                   accounts, the view                    an answer, a second
==================  ===================================  ====================================  =======================

Tokens, weights and KV never pass through here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from env_pool.registry import TaskSource
from experience.accounting import Cause
from experience.books import clock, open_books
from experience.entries import EventKind, InFlight, QueueEvent
from experience.queue import NO_SIGNAL
from experience.records import GroupHeader
from experience.transport.lane import LaneLostError, LaneServer, OverLane
from experience.wire import decode, encode
from orchestrator.accounting.accountant import accountant_of
from orchestrator.commands import Commands
from orchestrator.control import ControlServer
from orchestrator.crew import CrewEvents, EngineCrew
from orchestrator.dispatcher import Dispatcher
from orchestrator.evaluations import Evaluations
from orchestrator.failures import FailureMonitor, SignalMonitor
from orchestrator.fleet_log import FleetLog
from orchestrator.pacer import Pacer
from orchestrator.processes import Processes, worker_name
from orchestrator.progress import Progress
from orchestrator.pulses import Pulses
from orchestrator.run_directory import RunDirectory, RunDirectoryError
from orchestrator.run_plan import RunFailed, RunInterrupted, RunPlan, cause_of, members_of
from orchestrator.stuck_actors import StuckActors
from orchestrator.supervisor import Role, Supervisor
from orchestrator.telemetry import setup_actor_logging
from orchestrator.vitals_taker import vitals_taken
from orchestrator.watchdog import Parts, Watchdog
from orchestrator.workforce import Workforce
from rollout_workers.assignments import Assignment, EpisodeReport

logger = logging.getLogger(__name__)

EVENTS_S = 5.0
"""How long one call for queue events stays open."""


class Controller:
    """One run. `run` returns its summary or raises `RunFailed`; the other calls come from the run's actors."""

    def __init__(self, plan: RunPlan) -> None:
        setup_actor_logging(plan.run_directory, "controller-0", plan.run_attempt * 1000, secrets=plan.secrets)
        self._plan = plan
        self._config = config = plan.config
        self._run = RunDirectory(Path(plan.run_directory))
        self._processes = Processes(
            config, self._run, plan.resources, Path(plan.model_path), plan.run_attempt * 1000, plan.secrets
        )
        self._fatal: asyncio.Future[None] | None = None
        self.progress = Progress(config, self._run, plan.version, plan.started_at)
        self._supervisor = Supervisor(self.progress.event, self._fail, config.run.startup_timeout_s)
        self._pacer = Pacer(config.staleness, config.rollout.groups_per_update)
        self._dispatcher = Dispatcher(
            self._pacer.policy,
            TaskSource.from_config(config.tasks, "train", config.seed).task,
            config.rollout.group_size,
            config.run.steps * config.rollout.groups_per_update,
            config.seed,
        )
        self._failures = FailureMonitor()
        self._signal = SignalMonitor(config.queue.max_without_signal)
        self._workforce = Workforce()
        self._workers = self._workforce.handles
        """Workers that take assignments, by name."""
        self._stuck = StuckActors(config, self._supervisor, self._workers, self.progress.event, self._fail)
        self._missing: dict[str, list[int]] = {}
        self._evaluations = Evaluations(config, self._run, self._workforce.send, self._evaluation_done)
        self._fleet_log = FleetLog(self._run.fleet_events)
        self._crew = EngineCrew(
            plan,
            self._processes,
            self._supervisor,
            self._workforce,
            self._evaluations,
            self._stuck,
            self._fleet_log,
            CrewEvents(self._expire, self._served, self._committed, self.progress.event, self._keep),
        )
        self._pump_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._began_training = False
        books = open_books("controller-0", self._run.timeline, replaces=False)
        self._account = books.account()
        self._publishing: tuple[int, float] | None = None
        self._accountant = accountant_of(config, clock())
        self._pulses = Pulses(self._supervisor, self._accountant, books, self._situation)
        parts = Parts(
            supervisor=self._supervisor,
            pulses=self._pulses,
            dispatcher=self._dispatcher,
            fleet=self._crew.fleet,
            workers=self._workers,
            groups_per_update=config.rollout.groups_per_update,
            publishing=lambda: self._publishing,
            situation=lambda: (self.progress.phase, self._evaluations.running),
        )
        self._watchdog = Watchdog(config.run, parts, self.progress.event)
        self._lane = LaneServer("controller", {"episodes_ended": self.episodes_ended})

    # The course of a run

    async def run(self, controller: Any) -> dict[str, Any]:
        """Start everything, train, evaluate, stop. ``controller`` is this actor's own handle, for the others."""
        self._controller = controller
        self._fatal = asyncio.get_running_loop().create_future()
        work = asyncio.create_task(self._course())
        try:
            commands = Commands(self._crew, self._fleet_log, lambda: self.progress.phase)
            async with vitals_taken(self._run.vitals, "controller"), ControlServer(self._run.control, commands):
                await asyncio.wait({work, self._fatal}, return_when=asyncio.FIRST_COMPLETED)
            if self._fatal.done():
                self._fatal.result()
            await work
            return await self._finish("finished", None)
        except Exception as error:
            interrupted = isinstance(error, RunInterrupted)
            cause = cause_of(error)
            logger.exception("the run ended early")
            try:
                await self._finish("interrupted" if interrupted else "failed", cause)
            except RunDirectoryError:  # the first cause counts, which may be the same full disk
                logger.exception("no summary")
            raise (RunInterrupted if interrupted else RunFailed)(cause) from None
        finally:
            work.cancel()
            for task in self._tasks:
                task.cancel()
            await self._crew.stop()
            await self._supervisor.stop()
            self._lane.close()
            self.progress.close()

    async def snapshot(self) -> dict[str, Any]:
        """What the terminal view shows (a `Snapshot` as a dictionary)."""
        return self.progress.snapshot(self._supervisor, self._pulses.live, self._dispatcher)

    async def interrupt(self) -> None:
        """Ctrl-C: end the run, keep what can be resumed."""
        self._fail(
            f"interrupted; `millrace resume {self._config.run.dir}` goes on from the last checkpoint", RunInterrupted
        )

    async def _course(self) -> None:
        self.progress.phase = "starting"
        self._keep(self._pulses.watch())
        await self._start_actors()
        self._keep(self._queue_events())
        self._keep(self._watch_stall())
        self._keep(self._crew.run_probes())
        if self._config.engines.roles == "auto":
            self._keep(self._crew.run_roles(self._pulses))
        await self._committed(self._plan.version)
        await self._pulses.ask_all()  # what was spent until here is not the training's
        self.progress.phase = "training"
        self._account.switch(Cause.IDLE, clock())
        self._began_training = True
        await self._pump()
        nodes = await self._crew.nodes()
        learner, queue = self._one("learner"), self._one("queue")
        await learner.run.remote(queue, self._controller, nodes)
        self.progress.phase = "evaluating"
        await self._evaluations.finished()
        await self._committed(self._config.run.steps)
        await self._evaluations.finished()

    async def _start_actors(self) -> None:
        config, supervisor = self._config, self._supervisor
        counts = [
            (self._role("learner", self._learner_ready, replace=False), 1),
            (self._crew.role, config.engines.count),
            (self._role("queue", self._queue_ready, replace=False), 1),
            (self._role("environment", partial(self._helper_ready, "environment")), config.environments.actors),
            (self._role("reward", partial(self._helper_ready, "reward")), 1 if config.rewards else 0),
            (self._role("worker", self._worker_ready, self._worker_lost), config.rollout.workers),
        ]
        for role, count in counts:
            supervisor.spawn(role, count)
        await asyncio.gather(*(supervisor.start(role, count) for role, count in counts))

    def _role(self, name: str, ready: Any, lost: Any = None, replace: bool = True) -> Role:
        async def nothing(index: int, attempt: int, cause: BaseException) -> None:
            del index, attempt, cause

        return Role(name, getattr(self._processes, name), ready, lost or nothing, replace)

    async def _finish(self, status: str, error: str | None) -> dict[str, Any]:
        ledger: dict[str, Any] = {}
        if "queue-0" in self._supervisor.actors:
            try:
                async with asyncio.timeout(10):
                    ledger = await self._one("queue").ledger.remote()
            except Exception:
                logger.exception("the queue did not give its ledger")
        first = await self._crew.first_token_at()
        await self._pulses.ask_all()
        return self.progress.finish(
            status,
            error,
            ledger,
            first,
            self._supervisor.replaced,
            self._accountant,
            self._watchdog.stalls,
            self._pulses.prefix_hit(),
            self._fleet_log.summary(),
            self._pulses.kv(),
        )

    def _fail(self, cause: str, kind: type[RunFailed] = RunFailed) -> None:
        """End the run; the first cause wins."""
        if self._fatal is not None and not self._fatal.done():
            self._fatal.set_exception(kind(cause))

    def _keep(self, coroutine: Any) -> None:
        """Run a loop beside the rest; its error ends the run."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                self._fail(cause_of(error))

        task.add_done_callback(ended)

    def _one(self, role: str) -> Any:
        return self._supervisor.actors[f"{role}-0"].handle

    # Actors coming and going

    async def _queue_ready(self, index: int, attempt: int, handle: Any) -> None:
        del index, attempt
        resuming = self._plan.checkpoint is not None
        in_flight = decode(await handle.begin.remote(self._plan.version - 1 if resuming else None), list[InFlight])
        if not resuming:
            return
        counts = await handle.ledger.remote()
        dispatched = counts["next_index"]
        returned = sum(counts["groups"]["dropped"].values())
        if not self._config.queue.journal:
            dispatched = self._plan.dispatched
            returned = dispatched - self._plan.version * self._config.rollout.groups_per_update
        self._missing = {group.header.group_id: members_of(group) for group in in_flight}
        self._dispatcher.restore(dispatched, returned, self._plan.version, [group.header for group in in_flight])

    async def _learner_ready(self, index: int, attempt: int, handle: Any) -> None:
        del index, attempt
        version = await handle.load.remote(self._plan.checkpoint)
        if version != self._plan.version:
            raise RunFailed(f"the learner loaded version {version}, the run expected {self._plan.version}")

    async def _helper_ready(self, role: str, index: int, attempt: int, handle: Any) -> None:
        """An environment or reward actor."""
        await handle.health.remote()
        if attempt:
            await self._workforce.tell(f"replace_{role}", index, handle)

    async def _worker_ready(self, index: int, attempt: int, handle: Any) -> None:
        supervisor = self._supervisor
        await handle.connect.remote(
            self._one("queue"), self._controller, supervisor.handles("environment"), supervisor.handles("reward")
        )
        name = worker_name(index, attempt)
        self._workers[name] = handle
        await self._crew.announce(handle)
        if attempt or self._plan.checkpoint is not None:
            alive = {
                self._processes.step_log_directory(actor.index, actor.attempt)
                for actor in supervisor.actors.values()
                if actor.role.name == "worker"
            }
            await handle.recover.remote(self._processes.past_step_logs(alive))
        self._dispatcher.worker_joined(name)
        if attempt:
            await self._pump()
            await self._evaluations.assign(self._workers)

    async def _worker_lost(self, index: int, attempt: int, cause: BaseException) -> None:
        del cause
        name = worker_name(index, attempt)
        self._workers.pop(name, None)
        self._evaluations.worker_lost(name)
        self._keep(self._stuck.forget_client(name))
        in_flight = decode(await self._one("queue").in_flight.remote(), list[InFlight])
        self._missing.update({group.header.group_id: members_of(group) for group in in_flight})
        self._dispatcher.worker_lost(name)

    async def actor_stuck(self, worker: str, role: str, index: int, reason: str) -> None:
        """``worker`` has given up ``role``-``index``: see `StuckActors.given_up`."""
        await self._stuck.given_up(worker, role, index, reason)

    async def worker_blocked(self, worker: str, cause: str) -> None:
        """The event loop of ``worker`` stands still: see `StuckActors.blocked`."""
        self._stuck.blocked(worker, cause)

    # Dispatch

    async def _pump(self) -> None:
        """Start what pacing allows, and give orphaned groups to workers."""
        async with self._pump_lock:
            if not self._began_training or (self._config.mode == "sync" and self._evaluations.running):
                return
            orphans = self._dispatcher.adopt()
            started = self._dispatcher.due()
            if started:
                await self._one("queue").open.remote(encode([header for _, header in started]))
            await self._assign(orphans + started)

    async def _assign(self, groups: list[tuple[str, GroupHeader]]) -> None:
        by_worker: dict[str, list[Assignment]] = {}
        opened_at = time.time()
        for worker, header in groups:
            members = self._missing.pop(header.group_id, list(range(header.size)))
            by_worker.setdefault(worker, []).append(Assignment(header=header, members=members, opened_at=opened_at))
        await self._workforce.send(by_worker)

    async def _queue_events(self) -> None:
        queue = OverLane(self._one("queue"), "queue (events)", ("next_events",), endpoint="lane")
        while True:
            try:
                events = decode(await queue.next_events.remote(str(EVENTS_S)), list[QueueEvent])
            except LaneLostError as error:
                async with asyncio.timeout(EVENTS_S):
                    await self._one("queue").stats.remote()  # raises when the queue is dead: that is the cause then
                raise RunFailed(f"{error}, and events may be lost; `millrace resume` goes on") from error
            cancelled: list[str] = []
            for event in events:
                if event.kind is EventKind.RETURNED:
                    self._dispatcher.returned(event.group_id)
                    self.progress.dropped(event.reason)
                    if event.reason == NO_SIGNAL:
                        self._signal.dropped()
                    cancelled += [event.group_id] if event.episodes else []
                elif event.kind in (EventKind.READY, EventKind.CLOSED):
                    self._dispatcher.finished(event.group_id)
                    self._signal.ready()
                    cancelled += [event.group_id] if event.episodes else []
            if cancelled:
                await self._workforce.tell("cancel", cancelled)
            verdict = self._signal.verdict()
            if verdict is not None:
                raise RunFailed(verdict)
            if events:
                self._watchdog.touch()
                await self._pump()

    # Calls from the workers

    async def endpoint(self) -> bytes:
        """Where `episodes_ended` can be called over a socket (see `experience.transport.lane`)."""
        return await self._lane.endpoint()

    async def episodes_ended(self, reports: bytes) -> None:
        """Reports of finished and failed episodes."""
        for report in decode(reports, list[EpisodeReport]):
            self.progress.episode(report)
            self._watchdog.episode(report.seconds)
            if report.reason is not None:
                self._failures.episode_failed(report.reason, report.cause or report.reason)
            else:
                self._failures.episode_ended()
            self._evaluations.report(report)
        verdict = self._failures.verdict()
        if verdict is not None:
            self._fail(verdict)
        await self._evaluations.complete(self._crew.engines)

    # Calls from the learner, and the road of the weights

    async def publish(self, version: int) -> None:
        """The learner holds ``version``: bring it to the engines. Returns when they serve it."""
        self._publishing = (version, time.monotonic())
        self._account.switch(Cause.WEIGHT_STALL, clock())
        try:
            await self._crew.publish(version)
        finally:
            self._publishing = None
            self._account.switch(Cause.IDLE, clock())

    def _situation(self) -> tuple[bool, float]:
        """Whether the run trains, and seconds spent publishing so far."""
        return self.progress.phase == "training", self._account.seconds(clock()).get(Cause.WEIGHT_STALL, 0.0)

    async def step_done(self, version: int, metrics: dict[str, float]) -> None:
        """A step is trained; ``metrics`` are the learner's."""
        ledger = await self._one("queue").ledger.remote()
        self._watchdog.trained()
        metrics = metrics | self._pacer.trained(metrics)
        self._dispatcher.pace(self._pacer.policy)
        if version % self._config.weights.every:
            self._dispatcher.trained(version)
            await self._pump()
        metrics = metrics | {f"kv/{name}": value for name, value in self._pulses.kv().items()}
        self.progress.step(version, metrics, ledger, self._dispatcher, self._accountant)

    async def checkpoint_extra(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the learner's state."""
        return {"dispatched": self._dispatcher.dispatched, "seed": self._config.seed, "mode": self._config.mode}

    async def _expire(self, version: int) -> None:
        await self._one("queue").expire.remote(version)

    async def _served(self, oldest: int) -> None:
        self._dispatcher.version_served(oldest)
        await self._pump()

    async def _committed(self, version: int) -> None:
        """All engines serve ``version`` and nothing newer is on its way: the moment to pin it for an evaluation."""
        skipped = await self._evaluations.consider(version, self._crew.engines, self._workers)
        if skipped:
            self.progress.event(skipped)

    async def _evaluation_done(self, result: dict[str, Any]) -> None:
        self._watchdog.touch()
        self.progress.evaluation(result)
        await self._pump()

    async def _watch_stall(self) -> None:
        raise RunFailed(await self._watchdog.run())
