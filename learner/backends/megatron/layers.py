"""The parts of a decoder layer that are not Megatron-Core's: attention over ragged sequences, and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.attention import RaggedLayout, ragged_attention
from learner.fused import rms_norm
from learner.tree_attention import TreeLayout


@dataclass
class Packed:
    """What every layer needs to know of a micro-batch of T tokens. Megatron-Core hands it down as ``packed_seq_params``."""

    layout: RaggedLayout | TreeLayout
    cosines: Tensor
    """Float32 [T, 1, head width]: of each token's place in its own sequence."""
    sines: Tensor
    qkv_format: str = "sbhd"
    cp_group: Any = None


class Norm(torch.nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        # Where sequences are divided among tensor-parallel ranks, each sees the gradient of its own tokens only.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return rms_norm(x.float(), self.weight.float(), self.eps).to(x.dtype)
        weight = self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


def _device(config: Any) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


class RaggedCoreAttention(torch.nn.Module):
    """Causal attention of every token to those before it in its own sequence, after rotary embedding (Su et al. 2021)."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Packed,
        **_: Any,
    ) -> Tensor:
        """[T, 1, local heads, width] each (keys and values may have fewer heads); [T, 1, local heads * width]."""
        packed = packed_seq_params
        rotated = [_rotate(tensor[:, 0], packed) for tensor in (query, key)]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (*rotated, value[:, 0]))
        found = ragged_attention(self, q, k, v, None, ragged=packed.layout)[0]
        return found.reshape(query.shape[0], 1, -1)


def _rotate(x: Tensor, packed: Packed) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * packed.cosines + turned * packed.sines).to(x.dtype)
