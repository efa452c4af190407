"""Sharding a Hugging Face model over the ranks of the default process group (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch

from learner.errors import ModelError


def shard(model: Any, device: torch.device, dtype: torch.dtype, *, offload: bool = False) -> None:
    """Shard each decoder layer, then the rest; gradients of the ranks are *summed*. ``dtype`` is what layers compute in.

    ``offload`` keeps shards and optimizer state in host memory. Raises ModelError for a model without decoder layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise ModelError(f"{type(model).__name__} has no decoder layers at model.layers: it cannot be sharded")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    compute = None if dtype is torch.float32 else dtype
    inside = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    outermost = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, output_dtype=torch.float32)
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=inside, offload_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=outermost, offload_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sums: a plain one, which is what a factor of 1 asks for.
            module.set_force_sum_reduction_for_comms(True)


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, without importing what makes them: a second of start-up that one rank has no use for."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together (all ranks must call this at once), another one as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def as_sharded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out as ``like`` is."""
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
