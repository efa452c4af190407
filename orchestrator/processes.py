"""The Ray actors of a run: which class runs in each, with which resources.

The classes live beside what they carry (`rollout_workers.actor`, `learner.actor`, ...) and are plain; here they become
actors. A subclass made inside the actor's own process adds logging, so that no process imports another one's libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from experience.workload_trace import TraceHeader
from orchestrator.actor_shell import Identity, logged
from orchestrator.config import Config
from orchestrator.resources import Resources
from orchestrator.run_directory import RunDirectory
from rollout_workers.engines.config import SERVERS

LEAST_WAIT_S = 120.0
"""Requests wait at least that long for an engine while there is none; longer if an engine may take longer to start."""

MAX_CALLS = 1000
"""Calls that one actor may have open at once (waiting ones included)."""


@dataclass
class Processes:
    """Makes the actors of one run. ``attempt_base`` numbers the logs of a resumed run on from where they were."""

    config: Config
    run: RunDirectory
    resources: Resources
    model_path: Path
    attempt_base: int
    secrets: list[str] = field(default_factory=list)

    def queue(self, index: int, attempt: int) -> Any:
        from orchestrator.queue_actor import QueueActor

        config = self.config
        journal = self.run.journal if config.queue.journal else None
        return self._actor(
            QueueActor,
            "queue",
            index,
            attempt,
            0,
            config.queue,
            config.staleness,
            config.rollout.groups_per_update,
            journal,
        )

    def environment(self, index: int, attempt: int) -> Any:
        from env_pool.actor import EnvironmentActor

        return self._actor(EnvironmentActor, "environment", index, attempt, 0, self.config.environments, index)

    def reward(self, index: int, attempt: int) -> Any:
        from env_pool.rewards.actor import RewardActor

        return self._actor(RewardActor, "reward", index, attempt, 0, list(self.config.rewards), index)

    def engine(self, index: int, attempt: int) -> Any:
        if self.config.engines.kind in SERVERS:
            return self._server_engine(index, attempt)
        from rollout_workers.engines.actor import EngineActor

        gpus, engines = self.resources.engine_gpus, self.config.engines
        settings = (engine_name(index, attempt), engines, engines.role_of(index))
        return self._actor(EngineActor, "engine", index, attempt, gpus, *settings)

    def _server_engine(self, index: int, attempt: int) -> Any:
        from rollout_workers.engines.servers.actor import ServerEngineActor

        gpus, name = self.resources.engine_gpus, engine_name(index, attempt)
        engines = self.config.engines
        settings = (name, engines, str(self.run.logs), index, engines.role_of(index).value)
        return self._actor(ServerEngineActor, "engine", index, attempt, gpus, *settings)

    def worker(self, index: int, attempt: int) -> Any:
        from rollout_workers.actor import RolloutWorkerActor, WorkerSettings

        config = self.config
        settings = WorkerSettings(
            rollout=config.rollout,
            environments=config.environments,
            rewards=list(config.rewards),
            model_path=self.model_path,
            step_log_directory=self.step_log_directory(index, attempt),
            evaluation_directory=self.run.evaluations,
            concurrency=math.ceil(config.rollout.concurrency / config.rollout.workers),
            lock_step=config.run.deterministic,
            seed=config.seed,
            workload_file=self.run.workload / f"worker-{index}-{self.attempt_base + attempt}.jsonl",
            workload_header=self._workload_header(),
            handoff=config.engines.handoff if config.engines.split else None,
            engine_timeout_s=max(LEAST_WAIT_S, config.run.startup_timeout_s),
        )
        return self._actor(RolloutWorkerActor, "worker", index, attempt, 0, worker_name(index, attempt), settings)

    def learner(self, index: int, attempt: int) -> Any:
        from learner.actor import LearnerActor, LearnerSettings

        config = self.config
        settings = LearnerSettings(
            learner=config.learner,
            model=config.model,
            weights=config.weights,
            model_path=self.model_path,
            checkpoint_directory=self.run.checkpoints,
            threads=self.resources.learner_threads,
            max_lag=config.staleness.max_lag,
            groups_per_update=config.rollout.groups_per_update,
            steps=config.run.steps,
            checkpoint_every=config.run.checkpoint_every,
            keep_checkpoints=config.run.keep_checkpoints,
            deterministic=config.run.deterministic,
            seed=config.seed,
            ranks=self._ranks(attempt),
            time_shared=config.mode == "sync",
        )
        gpus = 0.0 if settings.ranks else self.resources.learner_gpus
        return self._actor(LearnerActor, "learner", index, attempt, gpus, f"learner-{index}.{attempt}", settings)

    def stager(self, node: str) -> Any:
        """What holds weights on a node, for the engines there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from weight_sync.relay.stager import StagerActor

        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._actor(StagerActor, "stager", node[:8], 0, 0, strategy=strategy)

    def _ranks(self, attempt: int) -> tuple[Any, ...]:
        """The actors of a learner of several ranks; none for a learner that trains in its own process."""
        from learner.backends.rank_actor import RankActor, RankSettings

        learner, resources = self.config.learner, self.resources
        if learner.backend == "synthetic" or (learner.ranks == 1 and learner.backend != "megatron"):
            return ()
        threads = max(1, resources.learner_threads // learner.ranks)
        group = placement_group([_bundle(resources.learner_gpus)] * learner.ranks, strategy="PACK")
        return tuple(
            self._actor(
                RankActor,
                "learner-rank",
                rank,
                attempt,
                resources.learner_gpus,
                RankSettings(
                    rank,
                    learner.ranks,
                    learner,
                    self.config.model.dtype,
                    threads,
                    self.config.seed,
                    learner.rank_timeout_s,
                ),
                strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            for rank in range(learner.ranks)
        )

    def _workload_header(self) -> TraceHeader:
        tasks = self.config.tasks
        modelled = tasks.options if tasks.environment == "workload" else {}
        return TraceHeader(
            run=str(self.run.path.name),
            model=str(self.config.model.path or self.config.model.recipe),
            environment=tasks.environment,
            time_scale=float(modelled.get("time_scale", 1.0)),
            token_scale=float(modelled.get("token_scale", 1.0)),
        )

    def step_log_directory(self, index: int, attempt: int) -> Path:
        """Where one life of one worker keeps its durable steps."""
        return self.run.episodes / f"worker-{index}-{self.attempt_base + attempt}"

    def past_step_logs(self, alive: set[Path]) -> list[str]:
        """Step logs of workers that are gone."""
        return [str(path) for path in sorted(self.run.episodes.glob("worker-*")) if path not in alive]

    def _actor(
        self, kind: type, role: str, index: int | str, attempt: int, gpus: float, *arguments: Any, strategy: Any = None
    ) -> Any:
        remote = ray.remote(logged(kind))
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": MAX_CALLS, "max_restarts": 0}
        options["scheduling_strategy"] = strategy or "DEFAULT"
        identity = Identity(
            str(self.run.path), f"{role}-{index}", self.attempt_base + attempt, attempt > 0, self.secrets
        )
        return remote.options(**options).remote(identity, *arguments)


def _bundle(gpus: float) -> dict[str, float]:
    """What a rank reserves. Processes share the cores, so without GPUs a bundle is next to nothing, but not empty."""
    return {"GPU": gpus} if gpus else {"CPU": 0.001}


def engine_name(index: int, attempt: int) -> str:
    """Engines are known by index and life, so that nobody takes a rebuilt one for the one that died."""
    return f"engine-{index}.{attempt}"


def worker_name(index: int, attempt: int) -> str:
    return f"worker-{index}.{attempt}"
