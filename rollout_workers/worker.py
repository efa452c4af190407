"""The rollout worker: an asyncio actor that runs hundreds of episodes at once.

==================  ==============================  ====================================  ============================
task                consumes                        produces                              waits for
==================  ==============================  ====================================  ============================
``_run_episode``    an assignment's member          trajectories to the queue, a report   a concurrency slot, then
                                                    to the controller                     engine, environment, reward
``EngineClient``    requests of all episodes        batches to engines                    engines
pool, rewards       calls of all episodes           batches to their actors               those actors
==================  ==============================  ====================================  ============================

Everything that leaves the process travels in batches. Each completed step of an episode is journalled
(`rollout_workers.step_log`), so that another worker can take it up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path

from env_pool.coalesce import Coalescer
from env_pool.errors import Fault
from env_pool.pacing import Pacer
from env_pool.registry import load_environment
from env_pool.rewards.records import RewardResult, RewardSample
from experience.books import clock, process_books
from experience.entries import EpisodeEntry, make_entry
from experience.journal import Journal, JournalError
from experience.records import Status
from experience.slots import Doing, Slots, Wait
from experience.workload_trace import WorkloadTraceWriter
from rollout_workers.assignments import Assignment, EpisodeReport, Purpose, WorkerStats
from rollout_workers.chat import ChatTokenizer
from rollout_workers.concurrency import AdaptiveGate, Gate
from rollout_workers.config import RolloutConfig
from rollout_workers.disaggregation.client import make_client
from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.engine_client import EngineHandle
from rollout_workers.engines.protocol import EngineLoad
from rollout_workers.episode import Episode
from rollout_workers.episode_context import EpisodeContext
from rollout_workers.errors import ContextFull, EpisodeError, EpisodeFailed, LoopFault, LoopTimeout, user_error
from rollout_workers.loops import RolloutLoop, load_loop
from rollout_workers.ports import WorkerPorts, with_loop_parts
from rollout_workers.slot_generator import SlotGenerator
from rollout_workers.step_log import RecordedSteps, StepLog, StepRecord
from rollout_workers.workload_writer import trace_episode

logger = logging.getLogger(__name__)

TRAJECTORY_KIND = "trajectory"
"""Kind of a record in an evaluation's journal: one encoded trajectory."""


class RolloutWorker:
    """Runs assignments. ``lock_step`` (deterministic runs) makes generation wait until all episodes want it."""

    def __init__(
        self,
        name: str,
        config: RolloutConfig,
        model_path: Path,
        step_log_directory: Path,
        evaluation_directory: Path,
        ports: WorkerPorts,
        concurrency: int,
        lock_step: bool = False,
        workload: WorkloadTraceWriter | None = None,
        handoff: HandoffConfig | None = None,
        engine_timeout_s: float = 120.0,
    ) -> None:
        """``engine_timeout_s``: how long requests wait for an engine while there is none."""
        self.name = name
        self._config = config
        self._chat = ChatTokenizer.load(model_path)
        self._loop: RolloutLoop = load_loop(config.loop)
        self._ports = ports
        self._step_log = StepLog(step_log_directory)
        self._evaluation_directory = evaluation_directory
        self._evaluation: Journal | None = None
        self._workload = workload
        self._recorded = RecordedSteps()
        self._slots = {purpose: Gate(concurrency) for purpose in Purpose}
        if config.adaptive_concurrency:
            self._slots[Purpose.TRAIN] = AdaptiveGate(concurrency)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group_of: dict[str, str] = {}
        self._live = 0
        self._pacer = None if lock_step else Pacer()
        self._counts: Counter[str] = Counter()
        books, now = process_books(), clock()
        self.slots = Slots(books.actor, concurrency, now)
        books.adopt(self.slots, now)
        barrier = (lambda held: held >= self._live) if lock_step else None
        self.engines = make_client(name, handoff, barrier, self._heard, engine_timeout_s)
        self._adder: Coalescer[EpisodeEntry, None] = Coalescer(self._add)
        self._reporter: Coalescer[EpisodeReport, None] = Coalescer(self._report)

    def add_engine(self, name: str, handle: EngineHandle, since: int = 0) -> None:
        """An engine joins that has no older version than ``since``."""
        self.engines.add_engine(name, handle, since)

    def _heard(self, engine: str, load: EngineLoad) -> None:
        gate = self._slots[Purpose.TRAIN]
        if isinstance(gate, AdaptiveGate):
            gate.heard(engine, load, self.engines.serving)

    def recover(self, directories: list[Path]) -> None:
        """Read what dead workers had recorded; their episodes go on from there when they are assigned."""
        for directory in directories:
            self._recorded.read(directory)

    def run(self, assignments: list[Assignment]) -> None:
        """Start the episodes of ``assignments``; returns at once."""
        for assignment in assignments:
            for member in assignment.members:
                episode_id = assignment.header.episode_id(member)
                if episode_id in self._tasks:
                    continue
                task = asyncio.create_task(self._run_episode(assignment, member, episode_id))
                self._tasks[episode_id] = task
                self._group_of[episode_id] = assignment.header.group_id
                task.add_done_callback(partial(self._forget_task, episode_id))

    def cancel(self, group_ids: list[str]) -> None:
        """Stop the episodes of groups that can no longer be used."""
        wanted = set(group_ids)
        for episode_id, task in list(self._tasks.items()):
            if self._group_of[episode_id] in wanted:
                task.cancel()

    def stats(self) -> WorkerStats:
        counts = self._counts
        return WorkerStats(
            running=self._live,
            limit=self._slots[Purpose.TRAIN].limit,
            queued=len(self._tasks) - self._live,
            generating=self.engines.in_flight,
            in_reward=counts["in_reward"],
            delivering=counts["delivering"],
            in_environment=max(0, self._live - self.engines.in_flight - counts["in_reward"] - counts["delivering"]),
            finished=counts["finished"],
            failed=counts["failed"],
            retried=counts["retried"],
            replayed_steps=counts["replayed_steps"],
            continued_requests=self.engines.continued,
            rewrites=counts["rewrites"],
        )

    def waits(self, groups: set[str], limit: int) -> list[Wait]:
        """What has lasted longest (`Slots.waits`), with the engine that it waits for."""
        found = self.slots.waits(groups, limit)
        return [wait._replace(actor=self.engines.engine_of(wait.episode_id)) for wait in found]

    async def close(self) -> None:
        """Stop everything that is running."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.engines.close()
        self._step_log.close()
        if self._evaluation is not None:
            self._evaluation.close()
        if self._workload is not None:
            self._workload.close()

    def _forget_task(self, episode_id: str, task: asyncio.Task[None]) -> None:
        del task
        self._tasks.pop(episode_id, None)
        self._group_of.pop(episode_id, None)

    async def _run_episode(self, assignment: Assignment, member: int, episode_id: str) -> None:
        async with self._slots[assignment.purpose]:
            if self._pacer is not None:
                await self._pacer.turn()
            self._live += 1
            evaluation = assignment.purpose is Purpose.EVALUATE
            self.slots.begin(episode_id, assignment.header.group_id, clock(), evaluation)
            try:
                await self._attempts(assignment, member, episode_id)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("episode %s could not be delivered", episode_id)
                await self._undelivered(assignment, episode_id, error)
            finally:
                self._live -= 1
                self.slots.end(episode_id, clock())
                self.engines.check_barrier()

    async def _undelivered(self, assignment: Assignment, episode_id: str, error: Exception) -> None:
        """The queue or the controller refused an episode: say so, that nobody waits for it."""
        try:
            await self._give_up(assignment, episode_id, EpisodeFailed.undelivered(error), 1)
        except Exception:
            logger.exception("nobody could be told that episode %s is lost", episode_id)

    async def _attempts(self, assignment: Assignment, member: int, episode_id: str) -> None:
        """Run the episode until it ends as an episode can, at most `rollout.max_attempts` times."""
        replay = self._recorded.take(episode_id)
        self._counts["replayed_steps"] += len(replay)
        attempt = replay.attempt
        began_at = time.time()
        while True:
            context = self._context(assignment, member, episode_id, attempt)
            context.replay = replay
            try:
                status = await self._run_loop(context)
                reward = await self._score(context, status)
            except EpisodeFailed as failure:
                attempt += 1
                if failure.reason == "reward_fault" or attempt >= self._config.max_attempts:
                    await self._give_up(assignment, episode_id, failure, attempt)
                    return
                logger.warning("episode %s, attempt %d: %s", episode_id, attempt, failure)
                self._counts["retried"] += 1
                replay = type(replay)()
                continue
            finally:
                context.end()
            await self._deliver(assignment, context, status, reward, began_at)
            return

    def _context(self, assignment: Assignment, member: int, episode_id: str, attempt: int) -> EpisodeContext:
        header = assignment.header
        return EpisodeContext(
            task=header.task,
            group_id=header.group_id,
            episode_id=episode_id,
            attempt=attempt,
            seed=header.seed,
            config=self._config,
            chat=self._chat,
            generator=SlotGenerator(self.engines, self.slots, episode_id),
            environments=self._ports.environments,
            clock=time.time,
            record=self._record if assignment.purpose is Purpose.TRAIN else _forget,
            deterministic_environment=load_environment(header.task.environment).deterministic,
            pinned_version=assignment.pinned_version,
            member=member,
            opened_at=assignment.opened_at if attempt == 0 else None,
        )

    def _record(self, record: StepRecord) -> None:
        self._step_log.append(record)

    async def _run_loop(self, context: EpisodeContext) -> Status:
        """Run the user's loop; translate whatever comes of it into a status or an EpisodeFailed."""
        limit = self._config.episode_timeout_s
        status = Status.FINISHED
        try:
            async with asyncio.timeout(limit) as deadline:
                await self._loop(Episode(context), **self._config.args)
        except ContextFull:
            status = Status.TRUNCATED
        except TimeoutError as error:
            if not deadline.expired():
                raise EpisodeFailed(LoopFault.reason, user_error(self._config.loop, error)) from error
            raise EpisodeFailed(
                LoopTimeout.reason,
                f"rollout loop {self._config.loop!r} did not end within rollout.episode_timeout_s={limit:g} s on task "
                f"{context.task.task_id}",
            ) from None
        except Fault as fault:
            raise EpisodeFailed(f"{fault.blame.value}_fault", str(fault)) from fault
        except EpisodeError as error:
            raise EpisodeFailed(error.reason, str(error)) from error
        except JournalError as error:  # it comes through the loop, but is not the loop's
            raise EpisodeFailed("journal_fault", str(error)) from error
        except Exception as error:
            raise EpisodeFailed(LoopFault.reason, user_error(self._config.loop, error)) from error
        if not any(builder.sampled for builder in context.builders):
            raise EpisodeFailed(
                LoopFault.reason,
                f"rollout loop {self._config.loop!r} ended without a single `await episode.generate()`: there is "
                "nothing to train on",
            )
        return status

    async def _score(self, context: EpisodeContext, status: Status) -> RewardResult:
        sample = RewardSample(
            episode_id=context.episode_id,
            task=context.task,
            outcome=context.outcome,
            final_text=context.final_text,
            status=status,
            turns=sum(builder.generations for builder in context.builders),
            sampled_tokens=sum(builder.sampled for builder in context.builders),
        )
        self._counts["in_reward"] += 1
        self.slots.move(context.episode_id, Doing.REWARD, clock())
        try:
            result = await self._ports.rewards.score(sample)
        except Fault as fault:
            raise EpisodeFailed("reward_fault", str(fault)) from fault
        finally:
            self._counts["in_reward"] -= 1
            self.slots.move(context.episode_id, Doing.ENVIRONMENT, clock())
        total = with_loop_parts(result, context.reward_parts)
        if total.reward is None:
            raise EpisodeFailed("reward_fault", total.error or "no reason was given")
        return total

    async def _deliver(
        self, assignment: Assignment, context: EpisodeContext, status: Status, reward: RewardResult, began_at: float
    ) -> None:
        task, seconds = context.task, time.time() - began_at
        trajectories = [
            builder.build(status, task.domain, task.difficulty, self._config.temperature, context.attempt)
            for builder in context.builders
            if builder.sampled
        ]
        timings = {"total": seconds, "generate": context.generate_s, "environment": context.environment_s}
        for trajectory in trajectories:
            trajectory.reward = reward.reward
            trajectory.reward_parts = dict(reward.parts)
            trajectory.timings = timings
        entry = make_entry(trajectories)
        self._counts["delivering"] += 1
        self.slots.move(context.episode_id, Doing.DELIVERING, clock())
        try:
            if assignment.purpose is Purpose.TRAIN:
                await self._adder.call(entry)
                self._step_log.ended(context.episode_id)
                if self._workload is not None:
                    self._workload.write(trace_episode(context, assignment.header.index, entry, began_at))
            else:
                self._keep_evaluation(assignment, entry)
        finally:
            self._counts["delivering"] -= 1
        self._counts["finished"] += 1
        self._counts["rewrites"] += context.rewrites
        report = EpisodeReport(
            group_id=context.group_id,
            episode_id=context.episode_id,
            purpose=assignment.purpose,
            status=status,
            reward=reward.reward,
            domain=task.domain,
            difficulty=task.difficulty,
            turns=sum(builder.generations for builder in context.builders),
            sampled_tokens=sum(trajectory.sampled_tokens for trajectory in trajectories),
            seconds=seconds,
            attempts=context.attempt + 1,
            rewrites=context.rewrites,
        )
        await self._reporter.call(report)

    def _keep_evaluation(self, assignment: Assignment, entry: EpisodeEntry) -> None:
        """Write the trajectories of an evaluation where `millrace show` finds them."""
        directory = self._evaluation_directory / assignment.collection / self.name
        if self._evaluation is None or self._evaluation.directory != directory:
            if self._evaluation is not None:
                self._evaluation.close()
            self._evaluation = Journal(directory)
        for trajectory in entry.trajectories:
            self._evaluation.append(TRAJECTORY_KIND, trajectory)
        self._evaluation.flush()

    async def _give_up(self, assignment: Assignment, episode_id: str, failure: EpisodeFailed, attempts: int) -> None:
        logger.error("episode %s given up after %d attempts: %s", episode_id, attempts, failure)
        self._counts["failed"] += 1
        header = assignment.header
        if assignment.purpose is Purpose.TRAIN:
            await self._ports.deliverer.fail([(header.group_id, episode_id, failure.reason)])
            self._step_log.ended(episode_id)
        await self._reporter.call(
            EpisodeReport(
                group_id=header.group_id,
                episode_id=episode_id,
                purpose=assignment.purpose,
                status=Status.SYSTEM_ERROR,
                domain=header.task.domain,
                difficulty=header.task.difficulty,
                attempts=attempts,
                reason=failure.reason,
                cause=failure.cause,
            )
        )

    async def _add(self, entries: list[EpisodeEntry]) -> list[None]:
        await self._ports.deliverer.add(entries)
        return [None] * len(entries)

    async def _report(self, reports: list[EpisodeReport]) -> list[None]:
        await self._ports.deliverer.report(reports)
        return [None] * len(reports)


def _forget(record: StepRecord) -> None:
    """Evaluation episodes are not journalled: a lost one is simply run again."""
