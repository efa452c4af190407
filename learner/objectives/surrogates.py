"""What is maximised for each token: a function of the ratio and of the advantage.

All take ``log_ratio`` and ``advantages`` float32 [n] and return the objective [n] (to be maximised, with gradient through
``log_ratio``) and a bool mask [n] of the tokens whose gradient the rule takes away or bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(log_ratio)``; for ``A < 0`` at least ``dual_clip A``.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; separate bounds: Yu et al. 2025, "DAPO",
    section 3.1; the bound for negative advantages: Ye et al. 2020, "Mastering Complex Control in MOBA Games" (dual clip).
    """
    ratio = log_ratio.exp()
    plain = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective, binds = torch.minimum(plain, bounded), bounded < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (objective < floor)
        objective, binds = torch.where(below, floor, objective), binds | below
    return objective, binds.detach()


def plain(log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """``r A``: the importance-weighted policy gradient without any bound (Williams 1992 at ``r = 1``)."""
    return log_ratio.exp() * advantages, torch.zeros_like(advantages, dtype=torch.bool)


def clipped_weight(
    logp: Tensor, log_ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float
) -> tuple[Tensor, Tensor]:
    """``sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi``: every token keeps a gradient, its weight is bounded.

    MiniMax 2025, "MiniMax-M1" (CISPO), which bounds from above only (``clip_low`` None). With the behaviour policy
    as anchor and ``1 + clip_high = rho`` it is the one-sided importance weight of AIPO (Wu et al. 2025, "LlamaRL").
    """
    ratio = log_ratio.detach().exp()
    low = 0.0 if clip_low is None else 1.0 - clip_low
    weight = ratio.clamp(low, 1.0 + clip_high)
    return weight * advantages * logp, weight != ratio


def likelihood(logp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """``A log pi``: no ratio at all (Williams 1992, REINFORCE); with ``A = 1`` maximum likelihood of given tokens."""
    return advantages * logp, torch.zeros_like(advantages, dtype=torch.bool)
