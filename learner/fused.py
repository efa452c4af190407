"""Norms with a backward pass of their own, for training on a CPU.

transformers writes a root-mean-square norm as six elementwise operations and autograd doubles them. On a CPU a small
model spends a fifth of its step there. The formulas:

    n = x / sqrt(mean(x^2) + eps)        y = w n
    dL/dx = (g w - n mean(g w n)) / sqrt(mean(x^2) + eps)        dL/dw = sum over rows of g n

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference to the module that is replaced, relative to its largest output."""


class _RmsNorm(torch.autograd.Function):
    """``x [..., D]`` and ``weight [D]``, both float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean_square = torch.linalg.vecdot(x, x).div_(x.shape[-1])
        inverse = mean_square.add_(epsilon).rsqrt_().unsqueeze(-1)
        normal: Tensor = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        normal, inverse, weight = ctx.saved_tensors
        width = normal.shape[-1]
        product = gradient * normal
        along = product.matmul(weight).div_(-width).unsqueeze(-1)
        weight_gradient = product.reshape(-1, width).sum(0)
        result = torch.mul(gradient, weight, out=product)
        return result.addcmul_(normal, along).mul_(inverse), weight_gradient, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension, float32."""
    result: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


def fuse_norms(model: torch.nn.Module) -> int:
    """Give the model's norms this forward and backward pass where it computes what theirs does; returns how many.

    A norm that computes something else (another formula, a weight of another meaning) is found by trying and left alone.
    """
    norms = [module for module in model.modules() if _is_candidate(module)]
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward, _epsilon(norm))
    if norms:
        logger.info("%d norms of %s run fused", len(norms), type(model).__name__)
    return len(norms)


def _forward(norm: Any, plain: Callable[[Tensor], Tensor], epsilon: float, x: Tensor) -> Tensor:
    """``plain`` is what the module did before: it still runs on anything but float32."""
    return rms_norm(x, norm.weight, epsilon) if x.dtype is torch.float32 else plain(x)


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)) or 0.0)


def _is_candidate(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator)
    # Not the module's own weights: at their initial value (ones, zeros) different formulas look alike.
    other = 0.5 + torch.rand(len(weight), generator=generator)
    with torch.no_grad():
        plain: Tensor = torch.func.functional_call(module, {"weight": other}, (x,))
        ours = rms_norm(x, other, _epsilon(module))
    limit = TOLERANCE * float(plain.abs().max())
    return plain.shape == ours.shape and bool(torch.allclose(plain, ours, rtol=0.0, atol=limit))
