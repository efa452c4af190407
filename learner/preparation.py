"""What must be known of a whole step before its first update: advantages over the step, masks, the policy as it is now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from learner.backends.ranks import LearnerRanks
from learner.batching import GroupSamples, Sample, collate, pack
from learner.objectives.advantages import episode_advantages, normalised_over_step
from learner.objectives.config import ObjectiveConfig
from learner.objectives.names import STEP_NORMALISED, WHOLE_STEP
from learner.objectives.policy_loss import step_mask
from learner.objectives.regularisers import kl_penalty
from learner.objectives.risk import bundled_advantages

if TYPE_CHECKING:
    from learner.backends.frozen import FrozenModel
    from learner.critic import Critic

FloatArray = npt.NDArray[np.float32]
Bins = Callable[[list[Sample]], list[list[Sample]]]
"""Divides samples into passes of all ranks."""


def needs_whole_step(objective: ObjectiveConfig) -> bool:
    """Whether the loss of a token depends on the other groups of the step, so that none can be trained on before all are in."""
    return (
        objective.advantage in WHOLE_STEP
        or objective.second_moment_limit is not None
        or objective.updates_per_step > 1
        or objective.kl_place == "reward"
    )


@dataclass(frozen=True)
class Helpers:
    """Models beside the policy that the step itself asks (they live in the learner's process)."""

    critic: Critic | None = None
    reference: FrozenModel | None = None
    """The reference policy of ``kl_place=reward``."""


class Preparation:
    """Prepares the samples of whole steps. ``pass_tokens``: most tokens in one pass of the helpers."""

    def __init__(self, ranks: LearnerRanks, objective: ObjectiveConfig, helpers: Helpers, pass_tokens: int) -> None:
        self._ranks, self._objective, self._helpers, self._pass_tokens = ranks, objective, helpers, pass_tokens

    def prepare(self, groups: Sequence[GroupSamples], bins: Bins) -> list[Sample]:
        """The samples of a step, with all that its loss needs."""
        samples = [sample for group in groups for sample in group.samples]
        if not samples:
            return []
        objective = self._objective
        kl = self._kl(samples) if objective.kl_place == "reward" else None
        if objective.advantage == "gae":
            samples = self._from_critic(samples, kl)
        else:
            samples = self._from_rewards(groups, samples, kl)
        if objective.second_moment_limit is not None or objective.proximal_policy == "recomputed":
            samples = self._under_the_policy(samples, bins)
        return samples

    def _kl(self, samples: Sequence[Sample]) -> dict[str, FloatArray]:
        """By trajectory: the estimate of KL(behaviour || reference) at each of its trained tokens."""
        reference = self._helpers.reference
        assert reference is not None, "learner.kl_place=reward needs a reference policy"
        found = {}
        for members in pack(samples, self._pass_tokens):
            logp = reference.logprobs(collate(members, "token", self._ranks.device)).cpu()
            behaviour = torch.from_numpy(np.concatenate([sample.behaviour for sample in members]))
            estimate = kl_penalty(behaviour, logp, self._objective.kl_kind).numpy()
            ends = np.cumsum([len(sample.targets) for sample in members])
            for sample, end in zip(members, ends, strict=True):
                found[sample.trajectory_id] = estimate[end - len(sample.targets) : end]
        return found

    def _from_critic(self, samples: list[Sample], kl: dict[str, FloatArray] | None) -> list[Sample]:
        from learner.critic import with_advantages

        critic = self._helpers.critic
        assert critic is not None, "learner.advantage=gae needs a critic"
        place = {sample.trajectory_id: index for index, sample in enumerate(samples)}
        valued = critic.values(pack(samples, self._pass_tokens))
        valued.sort(key=lambda sample: place[sample.trajectory_id])
        return with_advantages(
            valued, self._objective, None if kl is None else [kl[sample.trajectory_id] for sample in valued]
        )

    def _from_rewards(
        self, groups: Sequence[GroupSamples], samples: list[Sample], kl: dict[str, FloatArray] | None
    ) -> list[Sample]:
        objective = self._objective
        rewards = [dict(group.rewards) for group in groups]
        if kl is not None:
            rewards = [penalised(group, kl, objective.kl_coef) for group in groups]
        if objective.advantage == "riskpo":
            by_group = bundled_advantages(
                rewards, objective.risk_bundle, objective.risk_low, objective.risk_high, objective.risk_weight
            )
        elif kl is not None:
            by_group = [by_episode(group, objective.advantage) for group in rewards]
        else:
            return self._normalised(samples)
        return self._normalised(
            [
                replace(sample, advantage=advantages[sample.episode_id])
                for group, advantages in zip(groups, by_group, strict=True)
                for sample in group.samples
            ]
        )

    def _normalised(self, samples: list[Sample]) -> list[Sample]:
        """The samples of the whole step with their advantages over it."""
        if self._objective.advantage not in STEP_NORMALISED:
            return samples
        advantages = normalised_over_step(
            np.array([sample.advantage for sample in samples]), np.array([len(sample.targets) for sample in samples])
        )
        return [replace(sample, advantage=float(a)) for sample, a in zip(samples, advantages, strict=True)]

    def _under_the_policy(self, samples: list[Sample], bins: Bins) -> list[Sample]:
        """The samples with what takes a forward pass of the policy before its update: second-moment mask, proximal policy."""
        objective = self._objective
        divided = bins(samples)
        logp = np.concatenate(self._ranks.logprobs(divided, objective))
        ordered = [sample for members in divided for sample in members]
        ends = np.cumsum([len(sample.targets) for sample in ordered])
        spans = [slice(end - len(sample.targets), end) for sample, end in zip(ordered, ends, strict=True)]
        if objective.proximal_policy == "recomputed":
            ordered = [replace(sample, proximal=logp[span]) for sample, span in zip(ordered, spans, strict=True)]
        limit = objective.second_moment_limit
        if limit is not None:
            behaviour = np.concatenate([sample.behaviour for sample in ordered])
            advantages = np.concatenate([_token_advantages(sample) for sample in ordered])
            stays = step_mask(logp, behaviour, advantages, limit)
            ordered = [replace(sample, stays=stays[span]) for sample, span in zip(ordered, spans, strict=True)]
        place = {sample.trajectory_id: index for index, sample in enumerate(samples)}
        return sorted(ordered, key=lambda sample: place[sample.trajectory_id])


def _token_advantages(sample: Sample) -> FloatArray:
    if sample.token_advantages is not None:
        return sample.token_advantages
    return np.full(len(sample.targets), sample.advantage, dtype=np.float32)


def penalised(group: GroupSamples, kl: dict[str, FloatArray], coef: float) -> dict[str, float]:
    """Rewards by episode, each minus ``coef`` times the sum of its tokens' estimates (Ahmadian et al. 2024, section 2)."""
    rewards = dict(group.rewards)
    for sample in group.samples:
        rewards[sample.episode_id] -= coef * float(kl[sample.trajectory_id].sum())
    return rewards


def by_episode(rewards: dict[str, float], kind: str) -> dict[str, float]:
    """Advantages of a group's episodes."""
    found = episode_advantages(np.array(list(rewards.values()), dtype=np.float64), kind)
    return {episode: float(advantage) for episode, advantage in zip(rewards, found, strict=True)}


def mini_batches(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """The samples of a step in at most ``count`` parts of whole groups, with about as many groups each.

    Groups go round in the order in which they come; none is divided.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    parts: list[list[Sample]] = [[] for _ in range(min(count, len(groups)))]
    for index, members in enumerate(groups.values()):
        parts[index % len(parts)].extend(members)
    return parts
