"""One simulated run: the production decision classes, wired as the controller wires the actors."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from env_pool.registry import TaskSource
from experience.entries import Added, EventKind, LeasedGroup
from experience.queue import ExperienceQueue
from experience.staleness import make_policy
from orchestrator.config import Config
from orchestrator.dispatcher import Dispatcher
from orchestrator.processes import worker_name
from orchestrator.simulator.accounts import Accounts
from orchestrator.simulator.cluster import Cluster
from orchestrator.simulator.engines import Engines
from orchestrator.simulator.entries import SimulatedEntry
from orchestrator.simulator.events import EventLoop
from orchestrator.simulator.idle import IdleAccount, Situation
from orchestrator.simulator.learner import Learner, LearnerSettings, Phase
from orchestrator.simulator.mean_field import MeanFieldRollout
from orchestrator.simulator.publishing import Publisher
from orchestrator.simulator.rollout import RolloutLimits, RolloutWorkers
from orchestrator.simulator.split_engines import SplitEngines
from rollout_workers.engines.synthetic.recorder import Recorder

CONSUMER = "learner"


@dataclass(frozen=True)
class SimulationOptions:
    """What a run's configuration does not say."""

    open_ended: bool = True
    """Go on dispatching to the last step (a steady state); a real run stops when it has dispatched what it will train."""
    call_s: float = 0.0
    """Modelled seconds that the control plane adds to each generation and each environment call."""
    engine_kill_every_s: float | None = None
    """Modelled seconds between losses of an engine (in turn); None: no engine is lost."""
    engine_restart_s: float = 60.0
    """Modelled seconds until a lost engine is replaced."""
    mean_field: bool = False
    """Aggregate accelerators and turns (see `mean_field`): for tens of thousands of episodes."""
    record: bool = False
    """Keep times to tokens and KV in use, as they stand after each step, in `Simulation.recorded`."""


class Simulation:
    """Run it once with `run`; the results are in its attributes. Time is in modelled seconds, tokens are carried ones."""

    def __init__(self, config: Config, options: SimulationOptions | None = None) -> None:
        self.config = config
        self.options = options or SimulationOptions()
        self.cluster = cluster = Cluster.of(config)
        self.loop = loop = EventLoop()
        self.accounts = Accounts()
        rollout = config.rollout
        self.queue = ExperienceQueue(config.queue, make_policy(config.staleness, rollout.groups_per_update))
        ahead = math.ceil(config.staleness.target_lag) + 1 if self.options.open_ended else 0
        self.dispatcher = Dispatcher(
            make_policy(config.staleness, rollout.groups_per_update),
            TaskSource.from_config(config.tasks, "train", config.seed).task,
            rollout.group_size,
            (config.run.steps + ahead) * rollout.groups_per_update,
            config.seed,
        )
        self.idle = IdleAccount(cluster.rollout_accelerators, self._situation, loop)
        workers = [worker_name(index, 0) for index in range(rollout.workers)]
        self.engines: Engines | MeanFieldRollout
        self.workers: RolloutWorkers | MeanFieldRollout
        self.engines, self.workers = self._rollout(workers)
        for worker in workers:
            self.dispatcher.worker_joined(worker)
        self.publisher = Publisher(config.weights, cluster.cost.stage_s, loop, self.engines, self)
        self.learner = Learner(
            LearnerSettings(rollout.groups_per_update, config.staleness.max_lag, config.run.steps),
            cluster,
            loop,
            self,
            self.accounts,
            self.idle.settle,
        )
        self._refused: deque[tuple[SimulatedEntry, Callable[[], None]]] = deque()
        self._dispatched_at = 0.0
        self._draining = False
        self._offering = False
        self.states: list[Accounts] = []
        """The accounts at the beginning and after each step."""
        self.recorded: list[tuple[Recorder, ...]] = []
        """What the engines felt until the same moments (in a split: those that decode, those that prefill), with ``record``."""

    def run(self) -> None:
        """To the last step. Raises SimulationStalled when nothing more can happen before that."""
        for index in range(self.cluster.replicas):
            self.publisher.join(f"engine-{index}.0", 0)
        self._plan_losses()
        self._keep_state()
        self.pump()
        self.learner.start()
        self.loop.run(lambda: self.learner.phase is Phase.FINISHED, self._waits_for)

    def snapshot(self) -> Accounts:
        """The accounts now."""
        self.idle.settle()
        accounts, ledger = self.accounts, self.queue.ledger
        accounts.at = self.loop.now
        accounts.generated = ledger.generated_tokens
        accounts.trained, accounts.masked = ledger.trained_tokens, ledger.masked_tokens
        accounts.wasted = ledger.wasted_tokens
        accounts.prompt, accounts.cached = self.engines.prompt_tokens, self.engines.cached_tokens
        accounts.rollout = self.idle.by_cause(self.engines.seconds())
        learners = 0 if self.cluster.time_shared else self.cluster.learner_accelerators
        accounts.learner = {cause: seconds * learners for cause, seconds in self.idle.learner.items()}
        return copy.deepcopy(accounts)

    def _keep_state(self) -> None:
        self.states.append(self.snapshot())
        if self.options.record and isinstance(self.engines, Engines):
            self.recorded.append(self.engines.recorders())

    # Dispatch

    def pump(self) -> None:
        """Start what pacing allows."""
        started = self.dispatcher.due()
        if started:
            self._dispatched_at = self.loop.now
        for _, header in started:
            self.queue.open(header, self.loop.now)
        for worker, header in started:
            self.workers.start(worker, header)

    def served(self, oldest: int) -> None:
        """The oldest version that any engine serves."""
        self.dispatcher.version_served(oldest)
        self.pump()

    def published(self, version: int) -> None:
        if self.cluster.time_shared and self.learner.step_ended:
            waited = self.loop.now - self.learner.step_ended[-1]
            self.accounts.overheads[-1] += waited
        self.learner.published(version)

    def expire(self, version: int) -> None:
        self.queue.expire(version)
        self._changed()

    # What the workers tell

    def deliver(self, entry: SimulatedEntry, delivered: Callable[[], None]) -> None:
        if self.queue.add(entry, self.loop.now) is Added.FULL:
            self._refused.append((entry, delivered))
        else:
            delivered()
        self._changed()

    def give_up(self, group_id: str, episode_id: str, reason: str) -> None:
        self.queue.fail(group_id, episode_id, reason, self.loop.now)
        self._changed()

    def _changed(self) -> None:
        """Carry out what the queue's events ask for; nested calls leave it to the outermost."""
        if self._draining:
            return
        self._draining = True
        changed = False
        while events := self.queue.events():
            for event in events:
                if event.kind is EventKind.SPACE:
                    self._offer_again()
                elif event.kind is EventKind.RETURNED:
                    self.dispatcher.returned(event.group_id)
                elif event.kind in (EventKind.READY, EventKind.CLOSED):
                    self.dispatcher.finished(event.group_id)
                if event.episodes:
                    self.workers.cancel(event.group_id)
            changed = True
        self._draining = False
        if changed:
            self.pump()
            self._offer()

    def _offer(self) -> None:
        """Tell the learner of finished groups; in mean field once for all that end together."""
        if not self.options.mean_field:
            self.learner.offered()
        elif not self._offering:
            self._offering = True
            self.loop.at(self.loop.now, self._offer_now)

    def _offer_now(self) -> None:
        self._offering = False
        self.learner.offered()

    def _offer_again(self) -> None:
        waiting, self._refused = self._refused, deque()
        while waiting:
            entry, delivered = waiting.popleft()
            if self.queue.add(entry, self.loop.now) is Added.FULL:
                self._refused = deque([(entry, delivered), *waiting])
                return
            delivered()

    # What the learner asks

    def lease(self, limit: int, version: int) -> list[LeasedGroup]:
        leased = self.queue.lease(CONSUMER, limit, version, self.loop.now)
        if leased and self.cluster.time_shared and len(leased) == limit:
            self.accounts.makespans.append(self.loop.now - self._dispatched_at)
            self.accounts.overheads.append(self.cluster.switch_s + self.cluster.step_overhead_s)
        return leased

    def ack(self, group_ids: list[str], step: int, trained: int, masked: int) -> None:
        self.queue.ack(group_ids, step=step, trained_tokens=trained, masked_tokens=masked)
        self.queue.commit(step)
        self._keep_state()
        self._changed()

    def publish(self, version: int) -> None:
        self.publisher.publish(version)

    # Engines that are lost

    def _plan_losses(self) -> None:
        every = self.options.engine_kill_every_s
        if every is not None:
            self.loop.after(every, lambda: self._lose(0))

    def _lose(self, count: int) -> None:
        every = self.options.engine_kill_every_s
        assert every is not None
        names = self.engines.names
        if names:
            lost = names[count % len(names)]
            index = lost.removeprefix("engine-").split(".")[0]
            self.publisher.lost(lost)
            fresh = f"engine-{index}.{count + 1}"
            self.loop.after(self.options.engine_restart_s, lambda: self.publisher.join(fresh, 0))
        self.loop.after(every, lambda: self._lose(count + 1))

    # What is known

    def _situation(self, idle_share: float) -> Situation:
        return Situation(
            learner=self.learner.phase,
            time_shared=self.cluster.time_shared,
            publishing=self.publisher.busy,
            missing_engines=self.cluster.replicas - len(self.engines.names),
            running=self.workers.running,
            in_environment=self.workers.in_environment,
            refused=len(self._refused),
            queued=self.workers.queued,
            idle_share=idle_share,
        )

    def _rollout(
        self, workers: list[str]
    ) -> tuple[Engines, RolloutWorkers] | tuple[MeanFieldRollout, MeanFieldRollout]:
        cluster, loop, idle = self.cluster, self.loop, self.idle
        if self.options.mean_field:
            pool = MeanFieldRollout(cluster, self._limits(), len(workers), loop, self, idle.busy, idle.settle)
            return pool, pool
        kind = SplitEngines if cluster.roles else Engines
        engines = kind(cluster, loop, idle.busy, Recorder() if self.options.record else None)
        scale = cluster.token_scale
        return engines, RolloutWorkers(workers, self._limits(), scale, engines, loop, self, idle.settle)

    def _limits(self) -> RolloutLimits:
        rollout = self.config.rollout
        return RolloutLimits(
            concurrency=math.ceil(rollout.concurrency / rollout.workers),
            max_episode_tokens=rollout.max_episode_tokens,
            max_attempts=rollout.max_attempts,
            call_s=self.options.call_s,
        )

    def _waits_for(self) -> str:
        oldest = ", ".join(self.dispatcher.oldest_in_flight(3)) or "no group"
        return f"the learner is {self.learner.phase.value} in step {self.learner.version}; oldest in flight: {oldest}"
