"""Advantages from a critic: generalised advantage estimation over the tokens that the policy sampled.

The reward of an episode arrives with its last sampled token. Tokens in between that no policy sampled (prompts of
later turns, tool answers) are no actions: the recursion steps over them. Arrays are float64 [n], the n sampled tokens of
one trajectory in order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]


def gae(rewards: FloatArray, values: FloatArray, gamma: float, lam: float) -> FloatArray:
    """``A_t = sum_k (gamma lam)^k delta_{t+k}``, ``delta_t = r_t + gamma V_{t+1} - V_t``, ``V`` after the end 0.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.

    >>> gae(np.array([0.0, 1.0]), np.array([0.5, 0.5]), 1.0, 1.0).tolist()
    [0.5, 0.5]
    """
    advantages = np.zeros(len(values))
    following, carried = 0.0, 0.0
    for t in range(len(values) - 1, -1, -1):
        delta = rewards[t] + gamma * following - values[t]
        carried = delta + gamma * lam * carried
        advantages[t], following = carried, values[t]
    return advantages


def returns(rewards: FloatArray, values: FloatArray, gamma: float, lam: float) -> FloatArray:
    """What the critic is trained towards: ``A_t + V_t`` with the critic's own ``lam``.

    Decoupled GAE (Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?", section 4.2): ``lam = 1`` here, whatever
    the policy's is, so that a reward at the end of a long answer reaches its beginning undamped.
    """
    return gae(rewards, values, gamma, lam) + values


def length_adaptive_lambda(length: int, alpha: float) -> float:
    """``1 - 1 / (alpha length)``, at least 0: the horizon of the estimate grows with the answer.

    Yue et al. 2025, "VAPO", section 4.2 (``alpha`` = 0.05 there).
    """
    if length < 1 or alpha <= 0:
        raise ValueError(f"length={length} and alpha={alpha} must be greater than 0")
    return max(0.0, 1.0 - 1.0 / (alpha * length))


def end_rewards(length: int, reward: float, kl: FloatArray | None = None, kl_coef: float = 0.0) -> FloatArray:
    """The reward at the last of ``length`` tokens, minus ``kl_coef`` times the KL estimate at each (Stiennon et al. 2020)."""
    found = np.zeros(length) if kl is None else -kl_coef * kl
    if length:
        found[-1] += reward
    return found


def lambda_of(length: int, lam: float, alpha: float | None) -> float:
    """The ``lam`` of a trajectory's advantages: adapted to its length where there is an ``alpha``, else the fixed one."""
    return lam if alpha is None else length_adaptive_lambda(length, alpha)


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None) -> Tensor:
    """``max((V - G)^2, (V_clipped - G)^2) / 2`` at each token, float32 [n], with gradient through ``values``.

    ``V_clipped`` is ``V`` within ``clip`` of the value before the step; None: no clipping. Schulman et al. 2017, "PPO" (the
    implementation; Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients", section 2).
    """
    plain = (values - targets).square()
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        plain = torch.maximum(plain, (bounded - targets).square())
    return plain / 2.0
