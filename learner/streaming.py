"""One training step whose groups arrive one after another.

Gradients are sums and are divided once, by the normaliser that is known when the last group is in. So it makes no
difference when a group arrives and with which others it is packed (up to the rounding of float32 sums), and forward and
backward passes run while the rest of the step is still being generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import astuple, dataclass, field

import numpy as np

from experience.records import Group
from learner.backends.ranks import LearnerRanks
from learner.batching import GroupSamples, Sample, make_samples, pack
from learner.critic import Critic, CriticSums
from learner.mixing import Source
from learner.objectives.config import ObjectiveConfig
from learner.objectives.names import GROUP_RELATIVE
from learner.objectives.sums import TokenSums
from learner.packing import PackingCounts, even_bins
from learner.preparation import Helpers, Preparation, mini_batches, needs_whole_step
from learner.tree_packing import packer_for

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
        """Whether no group can be trained on before all are in."""
        return needs_whole_step(self.objective)


@dataclass
class StepResult:
    """What a step did. ``applied`` is False when the gradient was not finite and the weights stayed."""

    metrics: dict[str, float]
    applied: bool
    bad_samples: list[str] = field(default_factory=list)


class StreamingStep:
    """Accumulates the gradient of one step at learner ``version``; use once.

    ``helpers`` are models that the objective asks beside the policy; ``sources`` are trained on beside the groups;
    ``policy_stays``: only the critic learns in this step.
    """

    def __init__(
        self,
        ranks: LearnerRanks,
        settings: StepSettings,
        version: int,
        helpers: Helpers | None = None,
        sources: Sequence[Source] = (),
        *,
        policy_stays: bool = False,
    ) -> None:
        self._ranks, self._settings, self._version = ranks, settings, version
        self._helpers, self._sources, self._policy_stays = helpers or Helpers(), sources, policy_stays
        self._held: list[Group] = []
        self._groups: list[GroupSamples] = []
        self._pending: list[Sample] = []
        self._sums = TokenSums()
        self._normaliser = 0.0
        """Of the update under way."""
        self._passes = 0
        self._rounds: list[list[list[Sample]]] = []
        """The passes since the last update, as they ran: looked through again when the gradient they add up to is not finite."""
        self._packer = packer_for(ranks.sharing, settings.largest_pass)
        self._packing = PackingCounts(ranks.width, self._packer)
        self._bad: list[str] = []
        self._norms: list[float] = []
        """Of the updates that were applied."""
        self._extra: dict[str, float] = {}

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
        if self._packer.load(self._pending) >= budget * width:
            bins = sorted(self._packer.pack(self._pending, budget), key=self._packer.load, reverse=True)
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
        """Bins for what is left."""
        return even_bins(samples, self._ranks.width, self._settings.pass_tokens, self._packer)

    def finish(self) -> StepResult:
        """Runs the rest, normalises and updates the weights: once, or ``updates_per_step`` times."""
        for group in sorted(self._held, key=lambda group: group.header.index):
            self._take(group)
        self._held = []
        left_out: set[str] = set()
        if self._settings.whole_step:
            left_out = self._finish_whole()
        else:
            self._flush()
            if not self._update():
                left_out = {group.group_id for group in self._groups}
        applied = not left_out or bool(self._norms)
        metrics = {
            "loss": 0.0,
            **self._sums.metrics(),
            **group_metrics(self._groups, left_out, self._passes),
            "step/skipped": 0.0 if applied else 1.0,
            **({"grad_norm": float(np.mean(self._norms)) if self._norms else 0.0} if applied else {}),
            **self._packing.metrics(),
            **self._extra,
        }
        return StepResult(metrics, applied, self._bad)

    def _finish_whole(self) -> set[str]:
        """One update for each part of the step; returns the ids of the groups whose part was not applied."""
        objective, critic = self._settings.objective, self._helpers.critic
        preparation = Preparation(self._ranks, objective, self._helpers, self._settings.pass_tokens)
        parts = mini_batches(self._teaching(preparation.prepare(self._groups, self._even)), objective.updates_per_step)
        if critic is not None:
            self._train_critic(critic, parts)
        if self._policy_stays:
            return set()
        for index, part in enumerate(parts or [[]]):
            self._run(self._even(part))
            if not self._update(index):
                return {sample.group_id for rest in parts[index:] for sample in rest} or {
                    group.group_id for group in self._groups
                }
        return set()

    def _teaching(self, samples: list[Sample]) -> list[Sample]:
        """Without the groups that teach nothing, where those count nowhere."""
        objective = self._settings.objective
        counted = objective.second_moment_limit is not None or objective.advantage not in GROUP_RELATIVE
        if counted or not self._settings.skip_no_signal:
            return samples
        teaching = {sample.group_id for sample in samples if sample.advantage != 0.0}
        return [sample for sample in samples if sample.group_id in teaching]

    def _train_critic(self, critic: Critic, parts: Sequence[list[Sample]]) -> None:
        sums = CriticSums()
        for part in parts:
            done = critic.train(pack(part, self._settings.pass_tokens))
            sums = CriticSums(*(mine + theirs for mine, theirs in zip(astuple(sums), astuple(done), strict=True)))
        samples = [sample for part in parts for sample in part]
        if samples:
            values, targets = (
                np.concatenate([getattr(sample, name) for sample in samples]) for name in ("values", "returns")
            )
            self._extra["critic/loss"] = sums.loss / sums.tokens
            self._extra["critic/grad_norm"] = sums.grad_norm / len(parts)
            self._extra["critic/skipped"] = float(sums.skipped)
            spread = float(np.var(targets))
            self._extra["critic/explained"] = 1.0 - float(np.var(targets - values)) / spread if spread > 0 else 0.0

    def _update(self, index: int = 0) -> bool:
        """Normalises and applies what was gathered since the last update; False: it is not finite, nothing was changed."""
        normaliser, self._normaliser = self._normaliser, 0.0
        for source in self._sources:
            addition = source.draw(self._version, index, normaliser)
            done = self._ranks.train(self._even(addition.samples), addition.objective)
            self._bad.extend(done.bad_samples)
            name = addition.name
            self._extra[f"{name}/tokens"] = self._extra.get(f"{name}/tokens", 0.0) + done.sums.tokens
            if addition.counts:
                normaliser += done.sums.normaliser
                self._extra[f"{name}/ess"] = done.sums.metrics().get("correction/ess", 0.0)
            else:
                normaliser = normaliser if normaliser > 0 else 1.0
                weight = sum(len(sample.targets) * sample.advantage for sample in addition.samples)
                self._extra[f"{name}/loss"] = done.sums.loss / weight if weight else 0.0
        if self._bad:
            self._ranks.discard_gradient()
            return False
        if normaliser <= 0:
            return True
        norm = self._ranks.step(normaliser)
        if norm is None:
            self._bad = self._culprits() or [f"the gradient of {self._named_groups()}, as a whole"]
            return False
        self._norms.append(norm)
        self._rounds.clear()
        return True

    def _named_groups(self, count: int = 8) -> str:
        names = [group.group_id for group in self._groups if group.has_signal] or [g.group_id for g in self._groups]
        return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])

    def _take(self, group: Group) -> None:
        made = make_samples(group, self._version, self._settings.max_lag, self._settings.objective.advantage)
        self._groups.append(made)
        if made.has_signal or not self._settings.skip_no_signal or self._settings.whole_step:
            self._pending.extend(made.samples)

    def _run(self, bins: list[list[Sample]]) -> None:
        if not bins:
            return
        done = self._ranks.train(bins, self._settings.objective)
        self._sums.add(done.sums)
        self._normaliser += done.sums.normaliser
        self._bad.extend(done.bad_samples)
        self._passes += len(bins)
        width = self._ranks.width
        self._rounds += [bins[first : first + width] for first in range(0, len(bins), width)]
        self._packing.add(bins)

    def _culprits(self) -> list[str]:
        """The trajectories whose gradient is not finite, found by running the step's passes again, one after another.

        None where only the sum of all is not finite.
        """
        for bins in self._rounds:
            if not self._is_finite(bins):
                members = [sample for samples in bins for sample in samples]
                return [_span(sample) for sample in members if not self._is_finite([[sample]])] or [
                    *map(_span, members)
                ]
        return []

    def _is_finite(self, bins: list[list[Sample]]) -> bool:
        self._ranks.train(bins, self._settings.objective)
        finite = self._ranks.gradient_is_finite()
        self._ranks.discard_gradient()
        return finite


def _span(sample: Sample) -> str:
    first, last = sample.positions[[0, -1]] + 1
    return f"{sample.group_id}/{sample.trajectory_id} tokens {first} to {last}"


def group_metrics(groups: Sequence[GroupSamples], left_out: Set[str], passes: int) -> dict[str, float]:
    """What a step says of its groups; ``left_out``: ids of those that no update was made with, for want of a finite gradient."""
    rewards = np.array([reward for group in groups for reward in group.rewards.values()] or [np.nan])
    spans = [span for group in groups for span in group.version_spans]
    sampled = sum(group.sampled_tokens for group in groups)
    used = [group for group in groups if group.group_id not in left_out]
    trained = sum(group.usable_tokens for group in used)
    with_signal = [group for group in groups if group.has_signal]
    metrics: dict[str, float] = {
        "groups/total": len(groups),
        "groups/no_signal": len(groups) - len(with_signal),
        "episodes/rewarded": sum(len(group.rewards) for group in groups),
        "episodes/unrewarded": sum(group.unrewarded for group in groups),
        "tokens/trained": trained,
        "tokens/masked": sampled - trained,
        "tokens/with_signal": sum(group.usable_tokens for group in used if group.has_signal),
        "passes": passes,
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
