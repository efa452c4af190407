"""Ratios of policies: per token, or one for a whole sequence; and which policy they are taken against.

All arguments are log-probabilities of sampled tokens under the distribution that was sampled from, float32 [n]; the
tokens of one trajectory are those with the same ``sample_of`` (int64 [n]).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_means(values: Tensor, sample_of: Tensor) -> Tensor:
    """For every token the mean of ``values`` over its trajectory, with gradient; float32 [n]."""
    if not len(values):
        return values
    count = int(sample_of.max()) + 1
    sums = values.new_zeros(count).index_add(0, sample_of, values)
    sizes = torch.bincount(sample_of, minlength=count).clamp(min=1).to(values.dtype)
    return (sums / sizes)[sample_of]


def sequence_sums(values: Tensor, sample_of: Tensor) -> Tensor:
    """For every token the sum of ``values`` over its trajectory, with gradient; float32 [n]."""
    if not len(values):
        return values
    count = int(sample_of.max()) + 1
    return values.new_zeros(count).index_add(0, sample_of, values)[sample_of]


def log_ratios(logp: Tensor, anchor: Tensor, sample_of: Tensor, level: str) -> Tensor:
    """Log of the ratio of the current policy to ``anchor``, [n].

    - ``token``: each token's own (PPO).
    - ``sequence``: the mean over the trajectory, so that all its tokens share ``(pi(y) / pi_anchor(y))^(1 / |y|)``
      (Zheng et al. 2025, "Group Sequence Policy Optimization", eq. 7).
    - ``sequence_token``: that value with each token's own gradient (ibid., GSPO-token).

    Raises ValueError for an unknown level.
    """
    own = logp - anchor
    if level == "token":
        return own
    if level == "sequence":
        return sequence_means(own, sample_of)
    if level == "sequence_token":
        return sequence_means(own, sample_of).detach() + logp - logp.detach()
    raise ValueError(f"unknown ratio level {level!r}: use token, sequence or sequence_token")


def interpolated_proximal(logp: Tensor, logp_behaviour: Tensor, lags: Tensor) -> Tensor:
    """The policy one update before the next one, between behaviour and current policy by versions; no gradient, [n].

    A token of lag d was sampled d updates before the current policy, which is about to become one more. On the straight
    line of log-probabilities from the behaviour policy (0) to the current one (d), one update back lies at ``(d - 1) / d``:
    ``log pi_prox = log mu + (d - 1) / d (log pi - log mu)``; at lag 0 all three are one policy.

    Li et al. 2025, "A-3PO: Accelerating Asynchronous LLM Training with Staleness-aware Proximal Policy Approximation".
    """
    steps = lags.to(logp.dtype)
    share = torch.where(lags > 0, (steps - 1.0) / steps.clamp(min=1.0), torch.ones_like(steps))
    return torch.lerp(logp_behaviour, logp.detach(), share)
