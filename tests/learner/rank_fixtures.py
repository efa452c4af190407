"""Real ranks in processes of their own, over gloo, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from learner.backends.rank_actor import RankActor, RankSettings
from learner.backends.rank_group import RankGroup
from learner.config import LearnerConfig, ModelConfig
from learner.learner import Learner


class ReusedRank(RankActor):
    """A rank whose settings can be changed, so that several tests share the processes."""

    def configure(self, config: LearnerConfig, dtype: str) -> None:
        self._settings = replace(self._settings, config=config, dtype=dtype)


def settings_of(world: int, **settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"warm_up_steps": 0, "device": "cpu", "ranks": world, **settings})


def make_group(world: int, timeout_s: float = 60.0, **settings: Any) -> RankGroup:
    config = settings_of(world, **settings)
    kind = ray.remote(ReusedRank).options(num_cpus=0, num_gpus=0 if config.device == "cpu" else 1)
    ranks = [kind.remote(RankSettings(rank, world, config, "float32", 1, 1, timeout_s)) for rank in range(world)]
    return RankGroup(ranks, config, timeout_s)


def learner_on(group: RankGroup, directory: Path, dtype: str = "float32", **settings: Any) -> Learner:
    """A new learner on these ranks; the one before it is gone."""
    config = settings_of(len(group._ranks), **settings)
    ray.get([rank.configure.remote(config, dtype) for rank in group._ranks])
    learner = Learner(config, ModelConfig(dtype=dtype), max_lag=4, seed=1, group=group)
    learner.load(directory)
    return learner
