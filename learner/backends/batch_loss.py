"""The loss of one micro-batch, the same for all backends."""

from __future__ import annotations

import math

from torch import Tensor

from learner.backends.protocol import PassResult
from learner.batching import MicroBatch
from learner.objectives.config import ObjectiveConfig
from learner.objectives.policy_loss import TokenInputs, policy_loss
from learner.objectives.sums import TokenSums, sum_tokens


def batch_loss(
    batch: MicroBatch,
    logp: Tensor,
    entropies: Tensor,
    objective: ObjectiveConfig,
    *,
    reference: Tensor | None = None,
    distillation: Tensor | None = None,
) -> tuple[Tensor | None, PassResult]:
    """The summed loss, with gradient, and what to report of it; all tensors are [n] as the batch's targets are.

    None for the loss: it is not finite, and the result names the samples.
    """
    tokens = TokenInputs(
        logp,
        batch.behaviour,
        batch.advantages,
        batch.lags,
        batch.sample_of,
        entropies,
        reference=reference,
        distillation=distillation,
        stays=batch.stays,
        proximal=batch.proximal,
        positive=batch.positive,
    )
    terms = policy_loss(tokens, objective)
    loss = (terms.loss * batch.weights).sum()
    if not math.isfinite(float(loss.detach())):
        return None, PassResult(TokenSums(), batch.samples_at(~terms.loss.detach().isfinite()))
    sums = sum_tokens(terms, logp, batch.behaviour, entropies, batch.weights, batch.lags)
    sums.normaliser = batch.normaliser
    return loss, PassResult(sums)
