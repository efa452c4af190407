"""How a run's processes share the machine: torch threads and GPUs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import Config


@dataclass(frozen=True)
class Resources:
    """Torch threads and GPU shares of engines and learner."""

    engine_threads: int
    learner_threads: int
    engine_gpus: float
    learner_gpus: float


def share_resources(config: Config, cores: int, gpus: int) -> Resources:
    """Divide ``cores`` and ``gpus``.

    Asynchronous modes run engines and learner at the same time, so each gets its part of the cores. ``sync`` time-shares:
    while one works the others wait, so each may use all of them. GPUs: one each if there are enough, otherwise all share.
    """
    replicas = config.engines.count
    if config.mode == "sync":
        engine_threads, learner_threads = max(1, cores // replicas), cores
    else:
        each = max(1, cores // (replicas + 1))
        engine_threads, learner_threads = each, max(1, cores - each * replicas)
    processes = replicas + config.learner.ranks
    each_gpu = 0.0 if gpus == 0 else (1.0 if gpus >= processes else gpus / processes)
    return Resources(
        engine_threads=config.engines.threads or engine_threads,
        learner_threads=config.learner.threads or learner_threads,
        engine_gpus=each_gpu if config.engines.device != "cpu" else 0.0,
        learner_gpus=each_gpu if config.learner.device != "cpu" else 0.0,
    )
