"""Settings of the Megatron-Core backend, and how they divide the ranks. Imports nothing heavy: the configuration reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class MegatronConfig:
    """The ``learner.megatron`` section. What is left of the ranks after tensor and pipeline parallelism is data parallel."""

    tensor_parallel: int = 1
    """Ranks that share every matrix of a layer."""
    pipeline_parallel: int = 1
    """Stages, each with as many layers as the others."""
    expert_parallel: int = 1
    """Ranks of one stage that share the experts of a layer (mixtures of experts only)."""
    distributed_optimizer: bool = False
    """Each data-parallel rank holds its share of the optimizer's state instead of all of it."""

    def validate(self, ranks: int) -> None:
        """Raises ValueError, naming the key and what would be right."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"learner.megatron.{field.name}={value} must be at least 1")
        model = self.tensor_parallel * self.pipeline_parallel
        if ranks % model:
            raise ValueError(
                f"learner.ranks={ranks} is not a multiple of learner.megatron.tensor_parallel={self.tensor_parallel} times "
                f"learner.megatron.pipeline_parallel={self.pipeline_parallel}: use {model} ranks, or {2 * model}"
            )
        stage = ranks // self.pipeline_parallel
        if stage % self.expert_parallel:
            raise ValueError(
                f"learner.megatron.expert_parallel={self.expert_parallel} does not divide the {stage} ranks of a pipeline stage "
                f"(learner.ranks={ranks}, learner.megatron.pipeline_parallel={self.pipeline_parallel})"
            )

    def sizes(self, ranks: int) -> Sizes:
        """How ``ranks`` are divided. Raises ValueError as `validate` does."""
        self.validate(ranks)
        return Sizes(
            tensor=self.tensor_parallel,
            pipeline=self.pipeline_parallel,
            data=ranks // (self.tensor_parallel * self.pipeline_parallel),
            expert=self.expert_parallel,
        )


@dataclass(frozen=True)
class Sizes:
    """Ranks along each dimension; ``expert`` ranks lie across ``tensor`` and ``data`` ones and add none."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"tensor {self.tensor}, pipeline {self.pipeline}, data {self.data}, expert {self.expert}"
