"""Sampling, vectorised over the rows of a step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def draw(logits_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from the softmax of its logits, by inverting the cumulative distribution.

    Args:
        logits_RV: float32 [R, V].
        uniform_R: float64 [R], numbers in [0, 1).

    Returns:
        Token ids int64 [R] and their log-probabilities float32 [R].
    """
    probabilities_RV = logits_RV.softmax(-1)
    cumulative_RV = probabilities_RV.cumsum(-1, dtype=torch.float64)
    threshold_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    tokens_R1 = torch.searchsorted(cumulative_RV, threshold_R1, right=True).clamp_(max=logits_RV.shape[-1] - 1)
    return tokens_R1[:, 0], probabilities_RV.gather(1, tokens_R1)[:, 0].log_()


def sample(
    logits_RV: Tensor,
    temperature_R: npt.NDArray[np.float32],
    top_k_R: npt.NDArray[np.int64],
    top_p_R: npt.NDArray[np.float32],
    uniform_R: npt.NDArray[np.float64],
) -> tuple[Tensor, Tensor]:
    """As :func:`draw`, after temperature, top-k and top-p (in that order), each row with its own.

    Args:
        logits_RV: float32 [R, V].
        temperature_R: 0 takes the most probable token.
        top_k_R: keep the k most probable tokens; 0 keeps all.
        top_p_R: keep the fewest most probable tokens whose probability reaches p; 1 keeps all.
        uniform_R: numbers in [0, 1), one a row.

    Returns:
        Token ids int64 [R] and their log-probabilities float32 [R] under the distribution drawn from, that is after
        temperature, top-k and top-p (in that order). A greedy token has its log-probability at temperature 1.
    """
    device = logits_RV.device
    greedy_R = temperature_R == 0
    if not (temperature_R == 1).all():
        divisor_R = np.where(greedy_R, np.float32(1), temperature_R)
        logits_RV = logits_RV / torch.from_numpy(divisor_R).to(device)[:, None]
    if top_k_R.any() or (top_p_R < 1).any():
        logits_RV = _filter(logits_RV, top_k_R, top_p_R)
    tokens_R, logprobs_R = draw(logits_RV, torch.from_numpy(uniform_R).to(device))
    if greedy_R.any():
        best_R1 = logits_RV.argmax(-1, keepdim=True)
        on_device_R = torch.from_numpy(greedy_R).to(device)
        tokens_R = torch.where(on_device_R, best_R1[:, 0], tokens_R)
        best_logprob_R = logits_RV.log_softmax(-1).gather(1, best_R1)[:, 0]
        logprobs_R = torch.where(on_device_R, best_logprob_R, logprobs_R)
    return tokens_R, logprobs_R


def _filter(logits_RV: Tensor, top_k_R: npt.NDArray[np.int64], top_p_R: npt.NDArray[np.float32]) -> Tensor:
    """Set the logits outside the top k and the top p to minus infinity; ties keep the lower token id."""
    device, size = logits_RV.device, logits_RV.shape[-1]
    sorted_RV, order_RV = logits_RV.sort(stable=True, dim=-1, descending=True)
    keep_R1 = torch.from_numpy(np.where(top_k_R > 0, np.minimum(top_k_R, size), size)).to(device)[:, None]
    dropped_RV = torch.arange(size, device=device) >= keep_R1
    sorted_RV = sorted_RV.masked_fill(dropped_RV, -torch.inf)
    if (top_p_R < 1).any():
        bound_R1 = torch.from_numpy(np.where(top_p_R < 1, top_p_R, np.float32(np.inf))).to(device)[:, None]
        probabilities_RV = sorted_RV.softmax(-1)
        before_RV = probabilities_RV.cumsum(-1) - probabilities_RV
        outside_RV = before_RV >= bound_R1
        outside_RV[:, 0] = False
        sorted_RV = sorted_RV.masked_fill(outside_RV, -torch.inf)
    return torch.full_like(logits_RV, -torch.inf).scatter_(-1, order_RV, sorted_RV)
