"""A whole asynchronous run in one process whose clock is the engine's forward passes: the same seed gives the same run.

Dispatcher, staleness policies, queue, lag controller, engine, environment and learner are those of every run. What is
modelled is time: a forward pass is one *tick*, a tool takes a drawn number of ticks with a heavy tail, an update takes
`Timing.update_ticks`, after which the engine serves the new weights with its requests in flight.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.staleness.episodes import Episodes, LocalEngine, LocalEnvironments, LocalLease
from env_pool.environment import StepResult
from env_pool.registry import TaskSource
from experience.entries import EventKind, make_entry
from experience.ledger import Ledger
from experience.queue import ExperienceQueue
from experience.records import GroupHeader, Task
from experience.staleness import loss_mask
from experience.wire import decode_trajectory, pack_group
from learner.learner import Learner
from orchestrator.config import Config
from orchestrator.dispatcher import Dispatcher, seed_of
from orchestrator.pacer import Pacer
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.torch_engine.engine import TorchEngine
from rollout_workers.engines.torch_engine.loader import load_model

SETTLE = 3
"""Rounds of the event loop after which every episode waits again: woken, run, and its end told."""


@dataclass(frozen=True)
class Timing:
    """Ticks. A tool call takes ``exp(N(ln tool_median, tool_sigma))``, at most ``tool_longest``."""

    tool_median: float = 4.0
    tool_sigma: float = 1.2
    tool_longest: int = 120
    update_ticks: int = 20


class Clock:
    """Ticks that others wait for."""

    def __init__(self) -> None:
        self.now = 0
        self._sleeping: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0

    async def wait(self, ticks: int) -> None:
        """Until so many ticks have passed."""
        if ticks <= 0:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleeping, (self.now + ticks, self._count, future))
        await future

    @property
    def next_due(self) -> int | None:
        """When somebody wakes next; None: nobody sleeps."""
        while self._sleeping and self._sleeping[0][2].done():
            heapq.heappop(self._sleeping)
        return self._sleeping[0][0] if self._sleeping else None

    def move_to(self, now: int) -> None:
        """Let time pass; wakes whom it is due for."""
        self.now = now
        while (due := self.next_due) is not None and due <= now:
            heapq.heappop(self._sleeping)[2].set_result(None)


class TickingEngine:
    """The embedded engine, stepped by the clock."""

    def __init__(self, model: Path, config: Any) -> None:
        loaded, tokenizer = load_model(str(model), "float32", "cpu")
        self.engine = TorchEngine(loaded, tokenizer, config)
        self._waiting: dict[str, asyncio.Future[TokenChunk]] = {}

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        future: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self.engine.submit(request)
        return await future

    def release(self, session_id: str) -> None:
        self.engine.release(session_id)

    def step(self) -> bool:
        """One forward pass; False when there is nothing to do."""
        if not self.engine.has_work:
            return False
        for chunk in self.engine.step():
            future = self._waiting.pop(chunk.request_id, None)
            if future is not None and not future.done() and chunk.finish_reason is not FinishReason.ABORT:
                future.set_result(chunk)
        return True


class SlowLease(LocalLease):
    """Its steps take time."""

    def __init__(self, task: Task, clock: Clock, timing: Timing, seed: int) -> None:
        super().__init__(task)
        self._clock, self._timing, self._random = clock, timing, random.Random(seed)

    async def step(self, action: str) -> StepResult:
        timing = self._timing
        drawn = math.exp(self._random.gauss(math.log(timing.tool_median), timing.tool_sigma))
        await self._clock.wait(min(timing.tool_longest, round(drawn)))
        return await super().step(action)


class SlowEnvironments:
    """Hands out `SlowLease`; no two draw the same times."""

    def __init__(self, clock: Clock, timing: Timing) -> None:
        self._clock, self._timing, self._count = clock, timing, 0

    async def lease(self, task: Task, seed: int = 0) -> SlowLease:
        self._count += 1
        return SlowLease(task, self._clock, self._timing, seed * 1_000_003 + self._count)


@dataclass
class TickedOutcome:
    """What a run came to. A point of ``curve``: update, ticks, episodes generated for training, held-out success."""

    curve: list[tuple[int, int, int, float]] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    target_lags: list[float] = field(default_factory=list)
    generated_lengths: list[int] = field(default_factory=list)
    """Sampled tokens of every finished episode."""
    trained_lengths: list[int] = field(default_factory=list)
    """Tokens that carried loss, of every episode that was trained on."""
    ledger: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    waited_ticks: int = 0
    """Ticks in which the learner waited for groups."""


class TickedRun:
    """One run. The same arguments give the same outcome."""

    def __init__(
        self, config: Config, model: Path, timing: Timing, *, seed: int, steps: int, eval_every: int, held_out: int
    ) -> None:
        rollout = config.rollout
        self._config, self._timing, self._seed = config, timing, seed
        self._steps, self._eval_every, self._held_out = steps, eval_every, held_out
        self._clock = Clock()
        engines = replace(config.engines, stream_every=max(16, rollout.max_tokens))
        self._engine = TickingEngine(model, engines)
        self._learner = Learner(
            config.learner, config.model, max_lag=config.staleness.max_lag, threads=1, seed=seed, initial=model
        )
        self._learner.load(model)
        self._pacer = Pacer(config.staleness, rollout.groups_per_update)
        self._dispatcher = Dispatcher(
            self._pacer.policy,
            TaskSource.from_config(config.tasks, "train", seed).task,
            rollout.group_size,
            steps * rollout.groups_per_update,
            seed,
        )
        self._dispatcher.worker_joined("here")
        self._queue = ExperienceQueue(replace(config.queue, journal=False), self._pacer.policy)
        self._episodes = Episodes(model, rollout, self._engine, SlowEnvironments(self._clock, timing))
        self._aside = LocalEngine(model, replace(engines, slots=held_out))
        self._evaluations = Episodes(model, rollout, self._aside, LocalEnvironments())
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self.outcome = TickedOutcome()

    def run(self) -> TickedOutcome:
        """Train to the last update. Raises RuntimeError when nothing can go on."""
        asyncio.run(self._run())
        ledger: Ledger = self._queue.ledger
        self.outcome.ledger, self.outcome.tokens = ledger.snapshot(), ledger.token_snapshot()
        return self.outcome

    async def _run(self) -> None:
        await self._evaluate()
        while self._learner.version < self._steps:
            began_at = self._clock.now
            await self._step()
            self.outcome.waited_ticks += max(0, self._clock.now - began_at - self._timing.update_ticks)
            version = self._learner.version
            if version % self._eval_every == 0 or version == self._steps:
                await self._evaluate()
        for task in [task for tasks in self._tasks.values() for task in tasks]:
            task.cancel()
        await self._settle()
        await self._aside.close()

    async def _step(self) -> None:
        """Lease the groups of a step as they become ready, train, and serve the weights when the update's time is over."""
        wanted, version = self._config.rollout.groups_per_update, self._learner.version
        self._learner.begin_step()
        taken: list[str] = []
        while len(taken) < wanted:
            for leased in self._queue.lease("learner", wanted - len(taken), version, float(self._clock.now)):
                trajectories = [data for episode in leased.episodes for data in episode.trajectories]
                self._learner.add([pack_group(leased.header, trajectories)])
                self.outcome.trained_lengths += [
                    sum(
                        int(loss_mask(decode_trajectory(data), version, self._config.staleness.max_lag).sum())
                        for data in episode.trajectories
                    )
                    for episode in leased.episodes
                ]
                taken.append(leased.header.group_id)
            await self._react()
            if len(taken) < wanted:
                await self._tick()
        metrics = self._learner.finish_step()
        self._queue.ack(
            taken,
            step=version,
            trained_tokens=int(metrics["tokens/trained"]),
            masked_tokens=int(metrics["tokens/masked"]),
        )
        self.outcome.lags.append(metrics.get("lag/mean", 0.0))
        told = self._pacer.trained(metrics)
        self.outcome.target_lags.append(told.get("staleness/target_lag", self._config.staleness.target_lag))
        self._dispatcher.pace(self._pacer.policy)
        due = self._clock.now + self._timing.update_ticks
        while self._clock.now < due:
            await self._react()
            await self._tick(due)
        self._queue.expire(self._learner.version)
        self._engine.engine.stage(self._learner.version, self._learner.named_tensors())
        self._engine.engine.commit(self._learner.version, KvPolicy.KEEP)
        self._dispatcher.version_served(self._learner.version)
        await self._react()

    async def _react(self) -> None:
        """Carry out what the queue tells of, and start what pacing allows."""
        for event in self._queue.events():
            if event.kind is EventKind.RETURNED:
                self._dispatcher.returned(event.group_id)
                for task in self._tasks.pop(event.group_id, []):
                    task.cancel()
            elif event.kind in (EventKind.READY, EventKind.CLOSED):
                self._dispatcher.finished(event.group_id)
                self._tasks.pop(event.group_id, None)
        for _, header in self._dispatcher.due():
            self._queue.open(header, float(self._clock.now))
            self._tasks[header.group_id] = [
                asyncio.create_task(self._episode(header, member)) for member in range(header.size)
            ]
        await self._settle()

    async def _episode(self, header: GroupHeader, member: int) -> None:
        trajectories = await self._episodes.run(header, member)
        self.outcome.generated_lengths.append(sum(trajectory.sampled_tokens for trajectory in trajectories))
        self._queue.add(make_entry(trajectories), float(self._clock.now))

    async def _tick(self, until: int | None = None) -> None:
        """One forward pass; with none to do, straight on to whatever is due next (``until`` at the latest)."""
        if self._engine.step():
            self._clock.move_to(self._clock.now + 1)
        else:
            ends = [end for end in (self._clock.next_due, until) if end is not None]
            if not ends:
                raise RuntimeError(
                    f"nothing can go on at update {self._learner.version}: {self._dispatcher.in_flight} groups in flight, "
                    f"{self._queue.ready_groups} ready, and nobody waits for time to pass"
                )
            self._clock.move_to(min(ends))
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(SETTLE):
            await asyncio.sleep(0)

    async def _evaluate(self) -> None:
        """Success on held-out tasks with the newest weights, on another engine and outside the run's time."""
        held_out = TaskSource.from_config(self._config.tasks, "held_out", self._seed)
        version = self._learner.version
        headers = [
            GroupHeader(
                group_id=f"held_out-{version}-{index}",
                index=index,
                task=held_out.task(index),
                size=1,
                version_floor=version,
                seed=seed_of(self._seed, f"held_out{version}", index),
            )
            for index in range(self._held_out)
        ]
        self._aside.serve(version, self._learner.named_tensors())
        made = await asyncio.gather(*(self._evaluations.run(header, 0) for header in headers))
        rewards = [trajectories[0].reward or 0.0 for trajectories in made]
        success = sum(reward >= 1.0 for reward in rewards) / len(rewards)
        episodes = len(self.outcome.generated_lengths)
        self.outcome.curve.append((version, self._clock.now, episodes, success))
