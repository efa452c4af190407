"""The loss of each token, composed of ratio, surrogate and correction.

Three policies: *behaviour* mu (sampled the token), *proximal* pi_prox (what the surrogate's ratio is taken against), and
*current* pi. All arguments are log-probabilities of the sampled tokens under the distribution that was sampled from,
float32 [n].

With one update in a step (or ``proximal=current``) the policy before the update *is* the current one, so its log-probabilities are those of the
forward pass at hand, detached: exact, and no pass of its own. Then the ratio is 1 in value, only its gradient counts, and
what bounds the step is the correction's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.objectives.config import ObjectiveConfig
from learner.objectives.corrections import double_sided, masked, second_moment_mask, truncated
from learner.objectives.ratios import interpolated_proximal, log_ratios, sequence_means
from learner.objectives.regularisers import kl_penalty, positive_lm_loss
from learner.objectives.surrogates import clipped, clipped_weight, likelihood, plain


@dataclass(frozen=True)
class TokenInputs:
    """What is known of n trained tokens; each field [n]."""

    logp: Tensor
    """Current policy, with gradient."""
    behaviour: Tensor
    advantages: Tensor
    lags: Tensor
    """int64: updates between the policy that sampled the token and the current one."""
    sample_of: Tensor
    """int64: which tokens belong to one trajectory."""
    entropies: Tensor
    reference: Tensor | None = None
    """The reference policy, where the objective has a distance to one."""
    distillation: Tensor | None = None
    """Distance of the policy to its teacher at each token, with gradient, where there is a teacher."""
    stays: Tensor | None = None
    """bool: tokens that the second-moment mask of the whole step leaves in; None where there is none."""
    proximal: Tensor | None = None
    """The policy at the beginning of the step, where ``proximal=recomputed`` asks for it."""
    positive: Tensor | None = None
    """bool: tokens to imitate; None: those of positive advantage."""


@dataclass(frozen=True)
class TokenTerms:
    """Per-token terms, each [n]. Only ``loss`` carries a gradient."""

    loss: Tensor
    weight: Tensor
    """The importance weight of the correction; ones without one."""
    clipped: Tensor
    """bool: the surrogate's bound or a mask takes this token's gradient away, or bounds it."""


def policy_loss(tokens: TokenInputs, config: ObjectiveConfig) -> TokenTerms:
    """The loss of each token, to be summed.

    - ``correction=none``: ``-surrogate(pi / mu)``.
    - otherwise ``-w(pi_prox / mu) surrogate(pi / pi_prox)``: the decoupled objective (Hilton et al. 2021, "Batch size-invariance
      for policy optimization"; for language models Fu et al. 2025, "AReaL", section 5.2) with the weight's tails cut as
      ``correction`` says.
    """
    anchor, weight = tokens.behaviour, torch.ones_like(tokens.advantages)
    if config.correction != "none":
        anchor = proximal_logp(tokens, config.proximal_policy)
        weight = correction_weight(anchor, tokens, config)
    log_ratio = log_ratios(tokens.logp, anchor, tokens.sample_of, config.ratio)
    objective, bound = _surrogate(log_ratio, tokens, config)
    loss = -weight * objective
    if tokens.stays is not None:
        loss, bound = torch.where(tokens.stays, loss, 0.0), bound | ~tokens.stays
    return TokenTerms(loss + regularisers(tokens, config), weight, bound | (weight == 0))


def proximal_logp(tokens: TokenInputs, proximal: str) -> Tensor:
    """Log-probabilities of the proximal policy, without gradient."""
    if proximal == "interpolated":
        return interpolated_proximal(tokens.logp, tokens.behaviour, tokens.lags)
    if proximal == "recomputed":
        assert tokens.proximal is not None, "learner.proximal=recomputed needs the policy at the beginning of the step"
        return tokens.proximal
    return tokens.logp.detach()


def correction_weight(proximal: Tensor, tokens: TokenInputs, config: ObjectiveConfig) -> Tensor:
    """``w(pi_prox / mu)``, [n], without gradient; at ``sequence`` level the geometric mean over the trajectory."""
    if config.correction == "unweighted":
        return torch.ones_like(tokens.advantages)
    log_weight = (proximal - tokens.behaviour).detach()
    if config.correction_level == "sequence":
        log_weight = sequence_means(log_weight, tokens.sample_of)
    if config.correction == "masked_is":
        return masked(log_weight, config.correction_cap)
    if config.correction == "double_sided":
        return double_sided(log_weight, config.correction_low, config.correction_high)
    return truncated(log_weight, config.correction_cap)


def regularisers(tokens: TokenInputs, config: ObjectiveConfig) -> Tensor:
    """What is added to the loss of each token, [n]."""
    added = torch.zeros_like(tokens.advantages)
    if config.entropy_coef > 0:
        added = added - config.entropy_coef * tokens.entropies
    if config.kl_coef > 0 and config.kl_place == "loss":
        assert tokens.reference is not None, "a distance to the reference policy needs its log-probabilities"
        added = added + config.kl_coef * kl_penalty(tokens.logp, tokens.reference, config.kl_kind)
    if tokens.distillation is not None:
        added = added + config.distill_coef * tokens.distillation
    if config.positive_lm_coef > 0:
        positive = tokens.advantages > 0 if tokens.positive is None else tokens.positive
        added = added + config.positive_lm_coef * positive_lm_loss(tokens.logp, positive)
    return added


def step_mask(
    logp: npt.NDArray[np.float32], behaviour: npt.NDArray[np.float32], advantages: npt.NDArray[np.float32], limit: float
) -> npt.NDArray[np.bool_]:
    """The second-moment mask over all tokens of a step, each argument [n]; see `second_moment_mask`."""
    stays = second_moment_mask(torch.from_numpy(logp - behaviour), torch.from_numpy(advantages), limit)
    mask: npt.NDArray[np.bool_] = stays.numpy()
    return mask


def _surrogate(log_ratio: Tensor, tokens: TokenInputs, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    advantages = tokens.advantages
    if config.surrogate == "clip":
        assert config.clip_low is not None
        assert config.clip_high is not None
        return clipped(log_ratio, advantages, config.clip_low, config.clip_high, config.dual_clip)
    if config.surrogate == "clipped_weight":
        assert config.clip_high is not None
        return clipped_weight(tokens.logp, log_ratio, advantages, config.clip_low, config.clip_high)
    if config.surrogate == "likelihood":
        return likelihood(tokens.logp, advantages)
    return plain(log_ratio, advantages)
