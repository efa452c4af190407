"""Seeds, and top-k before top-p, in SGLang's scheduler process.

SGLang heeds a request's seed only under ``--enable-deterministic-inference``, which also exchanges the kernels of the
model and which a CPU does not have; and it keeps the tokens that pass top-k or top-p over the whole distribution, where
the other engines let top-p count what top-k has left. So the two functions by which its sampler draws from probabilities
are replaced by ones that do both. A draw depends on nothing but the seed, the position and the probabilities: not on the
other requests of the batch (up to rounding), and a request that goes on elsewhere from its last token goes on as it would have here.
"""

from __future__ import annotations

import functools
import random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SAMPLER = "sglang.srt.layers.sampler"
BATCHES = "sglang.srt.sampling.sampling_batch_info"
"""Modules of SGLang that `install` changes."""

PLAIN, FILTERED = "sampling_from_probs_torch", "top_k_top_p_min_p_sampling_from_probs_torch"
_INSTALLED = "_millrace_sampling"
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64, as signed numbers."""


def install(sampler: ModuleType, batches: ModuleType) -> None:
    """Once is enough; again does no harm. Raises AttributeError if these are not the modules of the expected SGLang."""
    if getattr(sampler, _INSTALLED, False):
        return
    plain, filtered = getattr(sampler, PLAIN), getattr(sampler, FILTERED)
    info = batches.SamplingBatchInfo
    make = info.from_schedule_batch

    @functools.wraps(plain)
    def sample_plain(probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None) -> Any:
        if sampling_seed is None or positions is None:
            return plain(probs, sampling_seed, positions)
        return draw(probs, uniforms(sampling_seed, positions + 1)).to(torch.int32)

    @functools.wraps(filtered)
    def sample_filtered(
        probs: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        min_ps: Tensor,
        need_min_p_sampling: bool,
        sampling_seed: Tensor | None,
        positions: Tensor,
        *,
        return_filtered_probs: bool = False,
        **named: Any,
    ) -> Any:
        if sampling_seed is None or need_min_p_sampling:
            named["return_filtered_probs"] = return_filtered_probs
            return filtered(probs, top_ks, top_ps, min_ps, need_min_p_sampling, None, positions, **named)
        kept_RV, order_RV = keep(probs, top_ks, top_ps)
        weights_RV = torch.zeros_like(probs).scatter_(-1, order_RV, kept_RV)
        tokens_R = draw(weights_RV, uniforms(sampling_seed, positions + 1))
        if not return_filtered_probs:
            return tokens_R.to(torch.int32)
        weight_R = weights_RV.gather(1, tokens_R[:, None])[:, 0]
        return tokens_R.to(torch.int32), kept_RV, order_RV.to(torch.int32), weight_R

    @functools.wraps(make)
    def make_with_seeds(batch: Any, vocab_size: int) -> Any:
        made = make(batch, vocab_size)
        if made.sampling_seed is None:
            seeds = [seed_of(request.sampling_params.sampling_seed) for request in batch.reqs]
            made.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=made.temperatures.device)
        return made

    setattr(sampler, PLAIN, sample_plain)
    setattr(sampler, FILTERED, sample_filtered)
    info.from_schedule_batch = staticmethod(make_with_seeds)
    setattr(sampler, _INSTALLED, True)


def seed_of(given: int | None) -> int:
    """Whoever gives no seed does not ask for the same tokens again."""
    return random.getrandbits(63) if given is None else given


def keep(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """What top-k and then top-p leave of each row, the most probable first, zeros behind; and the tokens in this order."""
    ordered_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(probs_RV.shape[-1], device=probs_RV.device)
    kept_RV = ordered_RV.masked_fill(ranks_V >= top_k_R[:, None], 0.0)
    before_RV = kept_RV.cumsum(-1) - kept_RV
    outside_RV = (before_RV >= top_p_R[:, None] * kept_RV.sum(-1, keepdim=True)) & (top_p_R < 1)[:, None]
    outside_RV[:, 0] = False
    return kept_RV.masked_fill(outside_RV, 0.0), order_RV


def draw(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One index of each row [R, V], int64 [R], with the probability of its weight; they need not add up to 1."""
    reached_RV = weights_RV.to(torch.float64).cumsum(-1)
    total_R1 = reached_RV[:, -1:].contiguous()
    index_R1 = torch.searchsorted(reached_RV, uniform_R[:, None] * total_R1, right=True)
    # The last index with any weight, should rounding have passed it.
    last_R1 = torch.searchsorted(reached_RV, total_R1)
    return torch.minimum(index_R1, last_R1)[:, 0]


def uniforms(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """float64 [R] in [0, 1 - 2^-52], one for each seed and position of the token to be drawn (int64 [R]).

    By SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); the same numbers as the embedded engine's.
    """
    counter_R = _mix(seed_R + _GOLDEN) + (position_R.to(torch.int64) + 1) * _GOLDEN
    return _shifted(_mix(counter_R), 12).to(torch.float64) * 2.0**-52


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
