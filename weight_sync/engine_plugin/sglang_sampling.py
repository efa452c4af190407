"""Top-k and top-p in SGLang's scheduler process as the other engines have them: the one after the other.

SGLang keeps the tokens that pass either filter over the whole distribution; elsewhere top-p counts the probability that
top-k has left. Where both are asked for, the distribution is cut by top-k before SGLang's own sampling, which then finds
nothing left for its top-k to do. Everything else stays SGLang's: seeds, top-p, and the log-probabilities after both.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SAMPLER = "sglang.srt.layers.sampler"
"""The module of SGLang in which `filter_in_turn` works."""

_FUNCTION = "top_k_top_p_min_p_sampling_from_probs_torch"
_DONE = "_millrace_filters_in_turn"


def filter_in_turn(sampler: ModuleType) -> None:
    """Once is enough; again does no harm. Raises AttributeError if this is not the sampler of the expected SGLang."""
    original = getattr(sampler, _FUNCTION)
    if getattr(original, _DONE, False):
        return

    @functools.wraps(original)
    def sample(probs: Tensor, top_ks: Tensor, top_ps: Tensor, *arguments: Any, **named: Any) -> Any:
        return original(cut_to_top_k(probs, top_ks, top_ps), top_ks, top_ps, *arguments, **named)

    setattr(sample, _DONE, True)
    setattr(sampler, _FUNCTION, sample)


def cut_to_top_k(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Probabilities [R, V] in which rows with both filters have their ``top_k`` most probable tokens only, adding up to 1."""
    both_R = (top_k_R < probs_RV.shape[-1]) & (top_p_R < 1)
    if not bool(both_R.any()):
        return probs_RV
    ordered_RV, order_RV = probs_RV.sort(dim=-1, descending=True)
    ranks_V = torch.arange(probs_RV.shape[-1], device=probs_RV.device)
    ordered_RV = ordered_RV.masked_fill(ranks_V >= top_k_R[:, None], 0.0)
    ordered_RV = ordered_RV / ordered_RV.sum(dim=-1, keepdim=True)
    cut_RV = torch.zeros_like(probs_RV).scatter(-1, order_RV, ordered_RV)
    return torch.where(both_R[:, None], cut_RV, probs_RV)
