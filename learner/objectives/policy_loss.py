"""Surrogate and off-policy correction, per token.

Three policies: *behaviour* mu (sampled the token), *proximal* pi_prox (the policy before the step), *current* pi. All
arguments are log-probabilities of the sampled tokens under the distribution that was sampled from, float32 [n].

With one update per step the proximal policy *is* the policy at the start of the step, so its log-probabilities are
those of the current forward pass, detached: exact, and no pass of its own. Then ``r = 1`` in value and only its gradient
counts; what is bounded is the correction's weight, by its cap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTerms:
    """Per-token terms, each [n]. Only ``loss`` carries a gradient."""

    loss: Tensor
    weight: Tensor
    """The importance weight of the correction; ones without one."""
    clipped: Tensor
    """bool: the surrogate's clip removes this token's gradient."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(log_ratio)``, and where the clip binds.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; separate bounds: Yu et al. 2025, "DAPO".
    """
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return torch.minimum(plain, clipped), (clipped < plain).detach()


def truncated_weight(logp_target: Tensor, logp_behaviour: Tensor, cap: float) -> Tensor:
    """``min(pi_target / mu, cap)``, without gradient.

    Espeholt et al. 2018, "IMPALA", section 4.1.
    """
    return (logp_target - logp_behaviour).detach().exp().clamp(max=cap)


def policy_loss(
    logp: Tensor,
    logp_behaviour: Tensor,
    advantages: Tensor,
    *,
    correction: str,
    clip_low: float,
    clip_high: float,
    cap: float,
    logp_proximal: Tensor | None = None,
) -> TokenTerms:
    """The loss of each token, to be summed. ``logp_proximal`` None: the current policy before the step (see above).

    - ``decoupled``: ``-min(pi_prox / mu, cap) * min(r A, clip(r) A)``, ``r = pi / pi_prox`` (Hilton et al. 2021, "Batch
      size-invariance for policy optimization", there "decoupled"; for language models Fu et al. 2025, "AReaL", section 5.2).
    - ``tis``: ``-min(pi_prox / mu, cap) * r A``, the truncated importance-sampled policy gradient, without a clip. Equal
      to ``decoupled`` in its gradient as long as there is one update per step.
    - ``none``: the plain clipped surrogate with ``r = pi / mu``.

    Raises ValueError for an unknown correction.
    """
    proximal = logp.detach() if logp_proximal is None else logp_proximal
    if correction == "none":
        surrogate, clipped = clipped_surrogate(logp - logp_behaviour, advantages, clip_low, clip_high)
        return TokenTerms(-surrogate, torch.ones_like(advantages), clipped)
    weight = truncated_weight(proximal, logp_behaviour, cap)
    if correction == "decoupled":
        surrogate, clipped = clipped_surrogate(logp - proximal, advantages, clip_low, clip_high)
        return TokenTerms(-weight * surrogate, weight, clipped)
    if correction == "tis":
        plain = (logp - proximal).exp() * advantages
        return TokenTerms(-weight * plain, weight, torch.zeros_like(advantages, dtype=torch.bool))
    raise ValueError(f"unknown correction {correction!r}: use none, tis or decoupled")
