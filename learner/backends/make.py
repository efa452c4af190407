"""The backend that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from learner.backends.protocol import TrainingBackend
from learner.config import LearnerConfig


def make_backend(
    path: str | Path, config: LearnerConfig, dtype: str, initial: str | Path | None, world: int = 1
) -> TrainingBackend:
    """Model and optimizer of this process's rank; with ``world`` > 1 the default process group is there already."""
    if config.backend == "megatron":
        from learner.backends.megatron.backend import MegatronBackend

        return MegatronBackend(path, config, dtype, initial, world)
    from learner.backends.fsdp import FsdpBackend

    return FsdpBackend(path, config, dtype, initial, world)
