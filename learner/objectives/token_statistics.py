"""Log-probabilities and entropies of chosen tokens from logits, in float32 and in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Logits that are converted to float32 at a time (64 MiB)."""


class _Chosen(torch.autograd.Function):
    """As :func:`_chunk`, entropies without gradient: the gradient of a logit is that of one softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, inverse_temperatures: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = torch.log_softmax(logits.float() * inverse_temperatures[:, None], dim=-1)
        chosen = log_probabilities.gather(1, targets[:, None])[:, 0]
        probabilities = log_probabilities.exp()
        entropies = log_probabilities.mul_(probabilities).sum(dim=-1).neg_()
        ctx.save_for_backward(probabilities, targets, inverse_temperatures)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probabilities, targets, inverse_temperatures = ctx.saved_tensors
        scaled = (gradients[0] * inverse_temperatures)[:, None]
        result = probabilities * -scaled
        result.scatter_add_(1, targets[:, None], scaled)
        return result.to(ctx.dtype), None, None


def _chunk(logits: Tensor, targets: Tensor, inverse_temperatures: Tensor) -> tuple[Tensor, Tensor]:
    scaled = logits.float() * inverse_temperatures[:, None]
    log_probabilities = torch.log_softmax(scaled, dim=-1)
    chosen = log_probabilities.gather(1, targets[:, None])[:, 0]
    return chosen, -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def token_logprobs(
    logits: Tensor, targets: Tensor, inverse_temperatures: Tensor, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats), float32 [n] each, of ``softmax(logits / temperature)``.

    ``logits`` [n, vocabulary] of any float dtype, ``targets`` int64 [n], ``inverse_temperatures`` float32 [n]. More
    than one chunk is recomputed in the backward pass instead of being kept. Entropies carry a gradient only when asked
    for.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    compute = _chunk if entropy_gradient else _Chosen.apply
    parts = []
    for start in range(0, len(targets), rows):
        part = (logits[start : start + rows], targets[start : start + rows], inverse_temperatures[start : start + rows])
        parts.append(compute(*part) if rows >= len(targets) else checkpoint(compute, *part, use_reentrant=False))
    if not parts:
        return inverse_temperatures.new_zeros(0), inverse_temperatures.new_zeros(0)
    chosen, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen, entropies
