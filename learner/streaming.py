"""One training step whose groups arrive one after another.

Gradients are sums and are divided once, by the normaliser that is known when the last group is in. So it makes no
difference when a group arrives and with which others it is packed (up to the rounding of float32 sums), and forward and
backward passes run while the rest of the step is still being generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from experience.records import Group
from learner.backends.ranks import LearnerRanks
from learner.batching import GroupSamples, Sample, make_samples, tokens_of
from learner.objectives.advantages import STEP_NORMALISED, normalised_over_step
from learner.objectives.config import ObjectiveConfig
from learner.objectives.policy_loss import step_mask
from learner.objectives.sums import TokenSums
from learner.tree_packing import balance_shared, computed_tokens, pack_shared

SUCCESS_REWARD = 1.0
"""An episode counts as a success from this reward on."""


@dataclass(frozen=True)
class StepSettings:
    """How a step turns groups into a gradient."""

    objective: ObjectiveConfig
    max_lag: int
    skip_no_signal: bool = True
    pass_tokens: int = 8192
    """Most tokens in one pass; passes start as soon as that many are waiting."""
    largest_pass: int | None = None
    """Most tokens in a pass of trajectories that share a prefix, where that is more than ``pass_tokens``."""
    deterministic: bool = False
    """Wait for all groups and take them in dispatch order, so that the result does not depend on arrival."""

    @property
    def whole_step(self) -> bool:
        """Whether the loss of a token depends on the other groups of the step, so that none can be trained on before all are in."""
        return self.objective.advantage in STEP_NORMALISED or self.objective.second_moment_limit is not None


@dataclass
class StepResult:
    """What a step did. ``applied`` is False when the gradient was not finite and the weights stayed."""

    metrics: dict[str, float]
    applied: bool
    bad_samples: list[str] = field(default_factory=list)


class StreamingStep:
    """Accumulates the gradient of one step at learner ``version``; use once."""

    def __init__(self, ranks: LearnerRanks, settings: StepSettings, version: int) -> None:
        self._ranks, self._settings, self._version = ranks, settings, version
        self._held: list[Group] = []
        self._groups: list[GroupSamples] = []
        self._pending: list[Sample] = []
        self._sums = TokenSums()
        self._passes = 0
        self._tokens = self._saved = 0
        self._bad: list[str] = []

    def add(self, groups: Iterable[Group]) -> None:
        """Takes complete groups, and runs the passes that are full."""
        if self._settings.deterministic:
            self._held.extend(groups)
            return
        for group in groups:
            self._take(group)
        if self._settings.whole_step:
            return
        width, budget = self._ranks.width, self._settings.pass_tokens
        if self._computed(self._pending) >= budget * width:
            bins = sorted(self._packed(self._pending), key=self._computed, reverse=True)
            count = max(1, (len(bins) - 1) // width) * width
            self._pending = [sample for samples in bins[count:] for sample in samples]
            self._run(bins[:count])

    def flush(self) -> None:
        """Runs everything that has arrived (nothing, if the objective needs the whole step)."""
        if not self._settings.whole_step:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        self._run(self._even(pending))

    def _even(self, samples: list[Sample]) -> list[list[Sample]]:
        """Bins for what is left: as many for each rank, with as even a load as can be had."""
        width = self._ranks.width
        bins = self._packed(samples)
        if width == 1 or not bins:
            return bins
        return balance_shared(samples, -(-len(bins) // width) * width, self._ranks.sharing)

    def _packed(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        settings = self._settings
        return pack_shared(samples, settings.pass_tokens, self._ranks.sharing, settings.largest_pass)

    def _computed(self, samples: Sequence[Sample]) -> int:
        return computed_tokens(samples, self._ranks.sharing)

    def finish(self) -> StepResult:
        """Runs the rest, normalises and updates the weights."""
        for group in sorted(self._held, key=lambda group: group.header.index):
            self._take(group)
        self._held = []
        if self._settings.whole_step:
            self._pending = self._masked(self._normalised(self._pending))
        self._flush()
        norm: float | None = 0.0
        if self._bad:
            self._ranks.discard_gradient()
            norm = None
        elif self._sums.normaliser > 0:
            norm = self._ranks.step(self._sums.normaliser)
        applied = norm is not None
        metrics = {
            "loss": 0.0,
            **self._sums.metrics(),
            **group_metrics(self._groups, applied, self._passes),
            "packing/prefix_saved": self._saved / self._tokens if self._tokens else 0.0,
            **_norm(norm),
        }
        return StepResult(metrics, applied, self._bad)

    def _take(self, group: Group) -> None:
        made = make_samples(group, self._version, self._settings.max_lag, self._settings.objective.advantage)
        self._groups.append(made)
        if made.has_signal or not self._settings.skip_no_signal or self._settings.whole_step:
            self._pending.extend(made.samples)

    def _normalised(self, samples: list[Sample]) -> list[Sample]:
        """The samples of the whole step with their advantages over it."""
        if self._settings.objective.advantage not in STEP_NORMALISED or not samples:
            return samples
        advantages = normalised_over_step(
            np.array([sample.advantage for sample in samples]), np.array([len(sample.targets) for sample in samples])
        )
        return [replace(sample, advantage=float(a)) for sample, a in zip(samples, advantages, strict=True)]

    def _masked(self, samples: list[Sample]) -> list[Sample]:
        """The samples of the whole step with its second-moment mask, which takes a forward pass of its own."""
        limit = self._settings.objective.second_moment_limit
        if limit is None or not samples:
            return samples
        bins = self._even(samples)
        logp = np.concatenate(self._ranks.logprobs(bins, self._settings.objective))
        ordered = [sample for members in bins for sample in members]
        behaviour = np.concatenate([sample.behaviour for sample in ordered])
        advantages = np.repeat([sample.advantage for sample in ordered], [len(sample.targets) for sample in ordered])
        stays = step_mask(logp, behaviour, advantages.astype(np.float32), limit)
        ends = np.cumsum([len(sample.targets) for sample in ordered])
        return [
            replace(sample, stays=stays[end - len(sample.targets) : end])
            for sample, end in zip(ordered, ends, strict=True)
        ]

    def _run(self, bins: list[list[Sample]]) -> None:
        if not bins:
            return
        done = self._ranks.train(bins, self._settings.objective)
        self._sums.add(done.sums)
        self._bad.extend(done.bad_samples)
        self._passes += len(bins)
        self._tokens += sum(map(tokens_of, bins))
        self._saved += sum(tokens_of(samples) - self._computed(samples) for samples in bins)


def _norm(norm: float | None) -> dict[str, float]:
    return {} if norm is None else {"grad_norm": norm}


def group_metrics(groups: Sequence[GroupSamples], applied: bool, passes: int) -> dict[str, float]:
    """What a step says of its groups; ``applied``: whether the weights were updated."""
    rewards = np.array([reward for group in groups for reward in group.rewards.values()] or [np.nan])
    spans = [span for group in groups for span in group.version_spans]
    sampled = sum(group.sampled_tokens for group in groups)
    trained = sum(group.usable_tokens for group in groups) if applied else 0
    with_signal = [group for group in groups if group.has_signal]
    metrics: dict[str, float] = {
        "groups/total": len(groups),
        "groups/no_signal": len(groups) - len(with_signal),
        "episodes/rewarded": sum(len(group.rewards) for group in groups),
        "episodes/unrewarded": sum(group.unrewarded for group in groups),
        "tokens/trained": trained,
        "tokens/masked": sampled - trained,
        "tokens/with_signal": sum(group.usable_tokens for group in with_signal) if applied else 0,
        "passes": passes,
        "step/skipped": 0 if applied else 1,
    }
    if not np.isnan(rewards).all():
        metrics["reward/mean"] = float(rewards.mean())
        metrics["reward/std"] = float(rewards.std())
        metrics["success"] = float((rewards >= SUCCESS_REWARD).mean())
    lags = [sample.lags for group in groups for sample in group.samples]
    if lags:
        usable = np.concatenate(lags)
        metrics["lag/mean"], metrics["lag/max"] = float(usable.mean()), float(usable.max())
        metrics["lag/p50"], metrics["lag/p99"] = (float(value) for value in np.percentile(usable, (50, 99)))
    if spans:
        metrics["trajectory_spans"] = float(np.mean(spans))
    return {name: float(value) for name, value in metrics.items()}
