"""What a step sums over its tokens, and the metrics that come of it.

Sums of micro-batches add up to the sums of the step, in any order, so streaming changes no metric either.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from learner.objectives.policy_loss import TokenTerms


@dataclass
class TokenSums:
    """Sums over trained tokens (``ratio_max`` is a maximum). Ratios are current over behaviour policy."""

    tokens: float = 0.0
    normaliser: float = 0.0
    """What the gradient is divided by: tokens or trajectories, depending on the aggregation."""
    loss: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    log_ratio_squared: float = 0.0
    ratio_max: float = 0.0
    clipped: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0
    mismatch: float = 0.0
    fresh_tokens: float = 0.0
    """Tokens of lag 0."""
    fresh_mismatch: float = 0.0
    """Sum of the absolute differences of log-probabilities over tokens of lag 0."""
    entropy: float = 0.0
    lag: float = 0.0
    lag_max: float = 0.0

    def add(self, other: TokenSums) -> None:
        """Adds the sums of more tokens."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            setattr(self, item.name, max(mine, theirs) if item.name.endswith("_max") else mine + theirs)

    def metrics(self) -> dict[str, float]:
        """Means, under the names users know; empty when no token was trained."""
        if not self.tokens:
            return {}
        metrics = {
            "loss": self.loss / max(self.normaliser, 1.0),
            "ratio/mean": self.ratio / self.tokens,
            "ratio/max": self.ratio_max,
            "staleness/ess": self.ratio**2 / (self.tokens * self.ratio_squared) if self.ratio_squared else 0.0,
            "staleness/second_moment": self.log_ratio_squared / self.tokens,
            "ratio/clip_fraction": self.clipped / self.tokens,
            "correction/weight_mean": self.weight / self.tokens,
            "correction/ess": self.weight**2 / (self.tokens * self.weight_squared) if self.weight_squared else 0.0,
            "kl/mismatch": self.mismatch / self.tokens,
            "entropy": self.entropy / self.tokens,
            "lag/mean": self.lag / self.tokens,
            "lag/max": self.lag_max,
        }
        if self.fresh_tokens:
            metrics["kl/mismatch_lag0"] = self.fresh_mismatch / self.fresh_tokens
        return metrics


def sum_tokens(
    terms: TokenTerms, logp: Tensor, logp_behaviour: Tensor, entropies: Tensor, weights: Tensor, lags: Tensor
) -> TokenSums:
    """The sums of one micro-batch; all arguments have n entries. ``weights``: of each token in the loss.

    ``normaliser`` is left 0: whoever knows the trajectories sets it.
    """
    if not len(logp):
        return TokenSums()
    log_ratio = (logp - logp_behaviour).detach()
    ratio = log_ratio.exp()
    fresh = lags == 0
    values = torch.stack(
        [
            (terms.loss.detach() * weights).sum(),
            ratio.sum(),
            ratio.square().sum(),
            log_ratio.square().sum(),
            ratio.max(),
            terms.clipped.sum().float(),
            terms.weight.sum(),
            terms.weight.square().sum(),
            -log_ratio.sum(),
            fresh.sum().float(),
            log_ratio[fresh].abs().sum(),
            entropies.detach().sum(),
            lags.sum().float(),
            lags.max().float(),
        ]
    )
    return TokenSums(float(len(logp)), 0.0, *values.tolist())
