"""Advantages of the episodes of a group, from their rewards alone.

- ``grpo``: ``(r - mean) / std`` with the population's deviation (Shao et al. 2024, "DeepSeekMath", section 4.1.2).
- ``dr_grpo``: ``r - mean`` (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.2).
- ``rloo``: ``r`` minus the mean of the *other* episodes (Ahmadian et al. 2024, "Back to Basics", section 3.2).
- ``reinforce_pp``: ``r``, and ``reinforce_pp_baseline``: ``r - mean``; both are then normalised over all tokens of the step
  (`normalised_over_step`; Hu et al. 2025, "REINFORCE++").
- ``riskpo``: over bundles of the step's groups (`learner.objectives.risk`); ``gae``: of every token, from a critic
  (`learner.objectives.critic`). Here both give the reward itself, which the step replaces.

Statistics are taken over the episodes that a group really has, one reward each: groups may be uneven, and an episode
that yielded several trajectories counts once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from learner.objectives.names import ADVANTAGES

FloatArray = npt.NDArray[np.float64]

EPSILON = 1e-6
"""Added to the standard deviation of ``grpo``."""


def episode_advantages(rewards: FloatArray, kind: str) -> FloatArray:
    """Advantages float64 [n] of the n episodes of one group; all zero when the rewards are equal, or for one episode.

    Raises ValueError for an unknown kind.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"unknown advantage {kind!r}: use one of {', '.join(ADVANTAGES)}")
    count = len(rewards)
    if kind in ("reinforce_pp", "riskpo", "gae"):
        return rewards.astype(np.float64)
    if count < 2 or rewards.max() == rewards.min():
        return np.zeros(count)
    centred: FloatArray = rewards - rewards.mean()
    if kind in ("dr_grpo", "reinforce_pp_baseline"):
        return centred
    scale = count / (count - 1) if kind == "rloo" else 1.0 / (float(rewards.std()) + EPSILON)
    scaled: FloatArray = centred * scale
    return scaled


def trajectory_advantages(
    group_ids: Sequence[Hashable], episode_ids: Sequence[Hashable], rewards: Sequence[float], kind: str
) -> FloatArray:
    """Advantages float64 [n] of n trajectories: those of their episodes, compared within their groups.

    An episode's reward is the mean over its trajectories, which normally all carry the same one.

    >>> trajectory_advantages("aab", [1, 2, 3], [1.0, 0.0, 1.0], "dr_grpo").tolist()
    [0.5, -0.5, 0.0]
    """
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, (group, episode) in enumerate(zip(group_ids, episode_ids, strict=True)):
        members.setdefault(group, {}).setdefault(episode, []).append(index)
    result = np.zeros(len(group_ids))
    for episodes in members.values():
        per_episode = np.array([sum(rewards[i] for i in indices) / len(indices) for indices in episodes.values()])
        for advantage, indices in zip(episode_advantages(per_episode, kind), episodes.values(), strict=True):
            result[indices] = advantage
    return result


def normalised_over_step(advantages: FloatArray, tokens: npt.NDArray[np.int64]) -> FloatArray:
    """``(A - mean) / std`` over the tokens of a step: trajectory i has ``tokens[i]`` of them, all with ``advantages[i]``.

    All zero where all are equal. With ``tokens`` all 1 the advantages are those of single tokens. Hu et al. 2025, "REINFORCE++", global advantage normalisation.
    """
    total = tokens.sum()
    if not total or advantages.max() == advantages.min():
        return np.zeros(len(advantages))
    mean = float((advantages * tokens).sum() / total)
    deviation = float(np.sqrt((np.square(advantages - mean) * tokens).sum() / total))
    result: FloatArray = (advantages - mean) / (deviation + EPSILON)
    return result
