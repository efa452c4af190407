"""Log-probabilities and entropies of chosen tokens where every tensor-parallel rank has its part of the vocabulary.

With logits ``z`` at temperature ``T``, ``p = softmax(z / T)`` and ``H`` its entropy:

    d log p_t / d z_j = ([j = t] - p_j) / T            dH / d z_j = -p_j (log p_j + H) / T

Every rank needs the largest logit, the sum of exponentials, the logit of the target and ``sum_j p_j z_j``, which are three small
reductions over the ranks; the backward pass needs none (Shoeybi et al. 2019, "Megatron-LM", section 3, for the cross entropy).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.objectives.token_statistics import CHUNK_ELEMENTS, token_logprobs


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        inverse_temperatures: Tensor,
        first: int,
        group: Any,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.float() * inverse_temperatures[:, None]
        largest = scaled.max(dim=-1).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scaled = scaled.sub_(largest[:, None])
        width = logits.shape[-1]
        local = targets - first
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        exponentials = scaled.exp()
        chosen = torch.where(mine, scaled.gather(1, local[:, None])[:, 0], 0.0)
        sums = torch.stack([exponentials.sum(-1), (exponentials * scaled).sum(-1), chosen])
        dist.all_reduce(sums, group=group)
        total, weighted, chosen = sums.unbind()
        log_total = total.log()
        entropies = log_total - weighted / total
        ctx.save_for_backward(
            scaled.sub_(log_total[:, None]) if entropy_gradient else logits.new_empty(0),
            exponentials.div_(total[:, None]),
            entropies,
            local,
            mine,
            inverse_temperatures,
        )
        ctx.entropy_gradient, ctx.dtype = entropy_gradient, logits.dtype
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return chosen - log_total, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        log_probabilities, probabilities, entropies, local, mine, inverse_temperatures = ctx.saved_tensors
        of_chosen = gradients[0] * inverse_temperatures
        result = probabilities * -of_chosen[:, None]
        result.scatter_add_(1, local[:, None], torch.where(mine, of_chosen, 0.0)[:, None])
        if ctx.entropy_gradient:
            of_entropy = gradients[1] * inverse_temperatures
            result -= of_entropy[:, None] * probabilities * (log_probabilities + entropies[:, None])
        return result.to(ctx.dtype), None, None, None, None, None


def parallel_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    inverse_temperatures: Tensor,
    group: Any,
    vocabulary: int,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, of the columns of ``logits`` that this rank has: [n, columns], as many on each rank of ``group``.

    Columns from ``vocabulary`` on stand for no token. All ranks of ``group`` must call it at once; each gets the same [n].
    """
    if dist.get_world_size(group) == 1:
        return token_logprobs(logits, targets, inverse_temperatures, entropy_gradient=entropy_gradient)
    first = dist.get_rank(group) * logits.shape[-1]
    mine = logits[:, : vocabulary - first]
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = []
    for start in range(0, len(targets), rows):
        chunk = (mine[start : start + rows], targets[start : start + rows], inverse_temperatures[start : start + rows])
        arguments = (*chunk, first, group, entropy_gradient)
        whole = rows >= len(targets)
        # Several chunks are recomputed in the backward pass, by all ranks in the same order, instead of being kept.
        parts.append(
            _Parallel.apply(*arguments) if whole else checkpoint(_Parallel.apply, *arguments, use_reentrant=False)
        )
    chosen, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen, entropies
