"""Weights that correct for sampling from another policy: ``pi_target / mu`` with its tails cut, without gradient.

``log_weight`` float32 [n] is the log of the ratio of target to behaviour policy, of a token or of its whole trajectory.
A weight of 0 takes a token out of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(log_weight: Tensor, cap: float) -> Tensor:
    """``min(w, cap)`` (Espeholt et al. 2018, "IMPALA", section 4.1; for language models Yao et al. 2025, "TIS")."""
    return log_weight.detach().exp().clamp(max=cap)


def masked(log_weight: Tensor, cap: float) -> Tensor:
    """``w`` where ``w <= cap``, else 0 (Liu et al. 2025, "When Speed Kills Stability", masked importance sampling)."""
    weight = log_weight.detach().exp()
    return torch.where(weight <= cap, weight, 0.0)


def double_sided(log_weight: Tensor, low: float, high: float) -> Tensor:
    """``w`` where ``1 - low <= w <= 1 + high``, else 0 (GLM-5 Team 2026, "GLM-5", double-sided
    calibration of asynchronous agent RL; Ling Team 2025, "Every Step Evolves", IcePop)."""
    weight = log_weight.detach().exp()
    return torch.where((weight >= 1.0 - low) & (weight <= 1.0 + high), weight, 0.0)


def second_moment_mask(log_ratio: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """Which tokens stay (bool [n]) so that the mean of ``log_ratio ** 2`` over them is at most ``limit``.

    Only tokens whose update goes further away (``A > 0`` and ``r > 1``, or ``A < 0`` and ``r < 1``) can be taken out, the
    furthest first; as few as possible are. Zheng et al. 2025, "Prosperity before Collapse", M2PO.
    """
    squared = log_ratio.detach().square()
    stay = torch.ones_like(squared, dtype=torch.bool)
    outward = ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))
    total, count = float(squared.double().sum()), len(squared)
    if not count or total <= limit * count:
        return stay
    candidates = outward.nonzero()[:, 0]
    order = candidates[squared[candidates].argsort(descending=True)]
    removed = squared[order].double().cumsum(0)
    left = count - torch.arange(1, len(order) + 1, device=order.device)
    enough = (total - removed <= limit * left).nonzero()[:, 0]
    needed = int(enough[0]) + 1 if len(enough) else len(order)
    stay[order[:needed]] = False
    return stay
