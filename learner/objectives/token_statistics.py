"""Log-probabilities and entropies of chosen tokens from logits, in float32 and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Logits that are converted to float32 at a time (64 MiB)."""


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
    parts = []
    for start in range(0, len(targets), rows):
        part = (logits[start : start + rows], targets[start : start + rows], inverse_temperatures[start : start + rows])
        parts.append(_chunk(*part) if rows >= len(targets) else checkpoint(_chunk, *part, use_reentrant=False))
    if not parts:
        return inverse_temperatures.new_zeros(0), inverse_temperatures.new_zeros(0)
    chosen, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen, entropies if entropy_gradient else entropies.detach()
