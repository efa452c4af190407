"""The process groups of tensor, pipeline, data and expert parallelism, made once a process."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from learner.backends.megatron.cpu import make_cpu_ready
from learner.backends.megatron.settings import Sizes
from learner.errors import ModelError

MISSING = "learner.backend=megatron needs Megatron-Core: pip install 'millrace[megatron]'"


def require_megatron() -> None:
    """Prepare the process for Megatron-Core. Raises ModelError where it is not installed."""
    make_cpu_ready()
    try:
        import megatron.core
    except ImportError as error:
        raise ModelError(f"{MISSING} ({error})") from error
    del megatron


class Ranks:
    """This process's place in each dimension, and the groups it belongs to. Replaces what an earlier model of the process used."""

    def __init__(self, sizes: Sizes, device: torch.device, timeout_s: float) -> None:
        from megatron.core import parallel_state

        if not dist.is_initialized():
            _join_alone(device, timeout_s)
        if dist.get_world_size() != sizes.ranks:
            raise ModelError(
                f"{dist.get_world_size()} processes train a model that is divided over {sizes.ranks} ({sizes})"
            )
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
            create_gloo_process_groups=False,
        )
        self.sizes = sizes
        self.tensor_group: Any = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group: Any = parallel_state.get_pipeline_model_parallel_group()
        self.data_group: Any = parallel_state.get_data_parallel_group()
        self.expert_group: Any = parallel_state.get_expert_model_parallel_group()
        self.expert_data_group: Any = parallel_state.get_expert_data_parallel_group()
        self.tensor = dist.get_rank(self.tensor_group)
        self.stage = dist.get_rank(self.pipeline_group)
        self.data = dist.get_rank(self.data_group)
        self.expert = dist.get_rank(self.expert_group)

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.sizes.pipeline - 1

    def places(self) -> list[int]:
        """The data-parallel place of every rank, in order of rank; all ranks must call this at once."""
        found: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(found, self.data)
        return found

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all tensor-parallel ranks, in order."""
        if self.sizes.tensor == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.sizes.tensor)]
        dist.all_gather(found, tensor.contiguous(), group=self.tensor_group)
        return found

    def from_stage(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """What the rank of ``stage`` in this pipeline has; filled in place on the others."""
        return _broadcast(tensor, stage, self.pipeline_group)

    def from_expert_rank(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """What expert-parallel rank ``rank`` of this group has; filled in place on the others."""
        return _broadcast(tensor, rank, self.expert_group)


def _broadcast(tensor: torch.Tensor, source: int, group: Any) -> torch.Tensor:
    if dist.get_world_size(group) > 1:
        dist.broadcast(tensor, group_src=source, group=group)
    return tensor


def _join_alone(device: torch.device, timeout_s: float) -> None:
    """A default process group of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=torch._C._distributed_c10d.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=timeout_s),
    )
