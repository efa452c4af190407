"""The Ray shell of a rollout worker: translates actor calls into the worker's, and its ports into actor calls."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from env_pool.batches import LANE_METHODS
from env_pool.config import EnvironmentsConfig, RewardConfig
from env_pool.fleet import OnLost
from experience.books import clock
from experience.entries import Added, EpisodeEntry
from experience.slots import Wait
from experience.transport.client import QueueProducer, producer_for
from experience.transport.lane import OverLane
from experience.wire import decode, encode
from experience.workload_trace import TraceHeader, WorkloadTraceWriter
from rollout_workers.assignments import Assignment, EpisodeReport
from rollout_workers.config import RolloutConfig
from rollout_workers.disaggregation.client import PairedEngineClient
from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.engine_client import RayEngineHandle
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.ports import LoopRewards, WorkerPorts
from rollout_workers.watchdog import LoopWatchdog
from rollout_workers.worker import RolloutWorker

if TYPE_CHECKING:
    from env_pool.rewards.client import RewardClient

BLOCKED_S = 20.0
"""How long the event loop may stand still before the worker counts as blocked by its rollout loop."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker process needs to know."""

    rollout: RolloutConfig
    environments: EnvironmentsConfig
    rewards: list[RewardConfig]
    model_path: Path
    step_log_directory: Path
    evaluation_directory: Path
    concurrency: int
    lock_step: bool
    seed: int
    workload_file: Path
    """Where the workload trace of this worker goes."""
    workload_header: TraceHeader
    handoff: HandoffConfig | None = None
    """How engines hand KV over, where prefill and decode are split."""
    engine_timeout_s: float = 120.0
    """How long requests wait for an engine while there is none."""


class QueueDeliverer:
    """Sends finished episodes to the queue and reports to the controller actor."""

    def __init__(self, queue: Any, controller: Any, producer: QueueProducer) -> None:
        self._queue = queue
        self._controller = controller
        self._producer = producer

    async def add(self, entries: list[EpisodeEntry]) -> None:
        """Returns when the queue has taken all of them; it answers late while its byte budget is spent."""
        results = await self._producer.add(entries)
        for entry, result in zip(entries, results, strict=True):
            if result is not Added.ACCEPTED:
                logger.info("episode %s was not added: %s", entry.episode_id, result.value)

    async def fail(self, failures: list[tuple[str, str, str]]) -> None:
        await self._queue.fail.remote(failures)

    async def report(self, reports: list[EpisodeReport]) -> None:
        await self._controller.episodes_ended.remote(encode(reports))


class RolloutWorkerActor:
    """One process of episodes. `connect` comes first."""

    def __init__(self, name: str, settings: WorkerSettings) -> None:
        self.name = name
        self._settings = settings
        self._worker: RolloutWorker | None = None
        self._rewards: RewardClient | None = None
        self._watchdog: LoopWatchdog | None = None
        self._ended = asyncio.Event()

    async def connect(self, queue: Any, controller: Any, environments: list[Any], rewards: list[Any]) -> None:
        """Take the handles of the actors to talk to and get ready. Raises on a bad loop or tokenizer."""
        from env_pool.pool import EnvironmentPool
        from env_pool.rewards.client import RewardClient

        settings = self._settings
        reports = OverLane(controller, "controller", ("episodes_ended",))
        deliverer = QueueDeliverer(queue, reports, await producer_for(queue))
        self._pool = EnvironmentPool(
            [_over_lane(handle, "environment actor") for handle in environments],
            settings.environments,
            self.name,
            self._tells(controller, "environment"),
        )
        if settings.rewards:
            scorers = [_over_lane(handle, "reward actor") for handle in rewards]
            self._rewards = RewardClient(scorers, settings.rewards, self.name, self._tells(controller, "reward"))
        self._watchdog = LoopWatchdog(BLOCKED_S, partial(self._is_blocked, controller))
        self._worker = RolloutWorker(
            self.name,
            settings.rollout,
            settings.model_path,
            settings.step_log_directory,
            settings.evaluation_directory,
            WorkerPorts(self._pool, self._rewards or LoopRewards(), deliverer),
            settings.concurrency,
            settings.lock_step,
            WorkloadTraceWriter(settings.workload_file, settings.workload_header),
            settings.handoff,
            settings.engine_timeout_s,
        )

    def _tells(self, controller: Any, role: str) -> OnLost:
        """Tell the controller of an actor that this worker has given up."""

        def lost(index: int, reason: str) -> None:
            controller.actor_stuck.remote(self.name, role, index, reason)

        return lost

    def _is_blocked(self, controller: Any, seconds: float, where: str) -> None:
        cause = (
            f"{self.name}: rollout loop {self._settings.rollout.loop!r} has blocked the event loop for {seconds:.0f} s, so "
            f"no episode goes on (at {where}); await what takes long, or call it with asyncio.to_thread"
        )
        logger.error("%s", cause)
        controller.worker_blocked.remote(self.name, cause)

    @property
    def worker(self) -> RolloutWorker:
        assert self._worker is not None, "connect() comes first"
        return self._worker

    async def add_engine(self, name: str, handle: Any, since: int = 0) -> None:
        engines = self.worker.engines
        if isinstance(engines, PairedEngineClient):
            role, address = await handle.kv_place.remote()
            engines.add_paired_engine(name, RayEngineHandle(handle, name), EngineRole(role), address, since)
        else:
            engines.add_engine(name, RayEngineHandle(handle, name), since)

    async def set_engine_role(self, name: str, role: str) -> None:
        """An engine prefills from now on, or decodes (only where the two are split)."""
        engines = self.worker.engines
        if isinstance(engines, PairedEngineClient):
            engines.set_role(name, EngineRole(role))

    async def remove_engine(self, name: str) -> None:
        self.worker.engines.remove_engine(name, ConnectionError("the supervisor saw it die"))

    async def drain_engine(self, name: str, grace_s: float) -> tuple[int, int]:
        """Take this worker's requests off an engine, see `EngineClient.drain_engine`."""
        return await self.worker.engines.drain_engine(name, grace_s)

    async def relocated(self, name: str, timeout_s: float) -> tuple[int, float, float] | None:
        """Of an engine that was lost: how many requests it had of this worker, when the worker noticed, and when all of
        them had another place (Unix seconds). Raises TimeoutError when they have none in time."""
        loss = await self.worker.engines.relocated(name, timeout_s)
        return None if loss is None else (loss.requests, loss.noticed_at, loss.placed_at)

    async def replace_environment(self, index: int, handle: Any) -> None:
        self._pool.replace(index, _over_lane(handle, "environment actor"))

    async def replace_reward(self, index: int, handle: Any) -> None:
        if self._rewards is not None:
            self._rewards.replace(index, _over_lane(handle, "reward actor"))

    async def recover(self, directories: list[str]) -> None:
        """Read the step logs of dead workers."""
        await asyncio.to_thread(self.worker.recover, [Path(directory) for directory in directories])

    async def run(self, assignments: bytes) -> None:
        self.worker.run(decode(assignments, list[Assignment]))

    async def cancel(self, group_ids: list[str]) -> None:
        self.worker.cancel(group_ids)

    async def stats(self) -> bytes:
        """An encoded `WorkerStats`."""
        return encode(self.worker.stats())

    def slot_seconds(self) -> dict[str, float]:
        """Slot-seconds by what the episodes do, see `experience.slots`."""
        return {} if self._worker is None else self._worker.slots.slot_seconds(clock())

    async def waits(self, groups: list[str], limit: int) -> list[Wait]:
        """The episodes that have been in one state for longest, those of ``groups`` first."""
        return self.worker.waits(set(groups), limit)

    async def alive(self) -> None:
        """Ends with the process only."""
        await self._ended.wait()

    async def stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        if self._worker is not None:
            await self._worker.close()
        self._ended.set()


def _over_lane(handle: Any, what: str) -> OverLane:
    return OverLane(handle, what, LANE_METHODS)
