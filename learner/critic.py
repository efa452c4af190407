"""The critic of ``learner.advantage=gae``: a value model of its own, and what the step does with it.

The value model has the policy's architecture and starts from its weights, with one output instead of a vocabulary, at 0 for
every state. It has an optimizer of its own and lives in the learner's process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from learner.backends.model import load_model
from learner.batching import MicroBatch, Sample, collate
from learner.errors import CheckpointError
from learner.mixing_config import CriticConfig
from learner.objectives.advantages import normalised_over_step
from learner.objectives.config import ObjectiveConfig
from learner.objectives.critic import end_rewards, gae, lambda_of, returns, value_loss

MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIX = "weights/"


@dataclass
class CriticSums:
    """Of the tokens that the critic was trained on in a step."""

    tokens: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0
    """Updates without a finite gradient: the critic stayed as it was."""


class Critic:
    """Values of states, and their training. Raises ModelError if the model cannot be loaded."""

    def __init__(self, path: str | Path, config: CriticConfig, device: torch.device) -> None:
        model = load_model(path, device)
        self._trunk = model.base_model
        self._head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, device=device)
        nn.init.zeros_(self._head.weight)
        self._device, self._config = device, config
        self._parameters = {f"trunk.{name}": p for name, p in self._trunk.named_parameters()}
        self._parameters["head.weight"] = self._head.weight
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.updates = 0

    def values(self, bins: Sequence[Sequence[Sample]]) -> list[Sample]:
        """The samples of all bins with ``values`` set: of the state in which each target was sampled."""
        found = []
        with torch.no_grad():
            for samples in bins:
                values = self._forward(collate(samples, "token", self._device)).cpu().numpy()
                ends = np.cumsum([len(sample.targets) for sample in samples])
                found += [
                    replace(sample, values=values[end - len(sample.targets) : end])
                    for sample, end in zip(samples, ends, strict=True)
                ]
        return found

    def train(self, bins: Sequence[Sequence[Sample]]) -> CriticSums:
        """One update on samples with ``values`` and ``returns``; the loss is the mean over their tokens."""
        tokens = sum(len(sample.targets) for samples in bins for sample in samples)
        sums = CriticSums(tokens)
        if not tokens:
            return sums
        for samples in bins:
            batch = collate(samples, "token", self._device)
            old, targets = (
                torch.from_numpy(np.concatenate([_array(sample, name) for sample in samples])).to(self._device)
                for name in ("values", "returns")
            )
            loss = value_loss(self._forward(batch), old, targets, self._config.clip).sum()
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
            sums.loss += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.clip_grad or math.inf)
        sums.grad_norm = float(norm)
        if math.isfinite(sums.grad_norm):
            self._optimizer.step()
            self.updates += 1
        else:
            sums.skipped = 1
        self._optimizer.zero_grad(set_to_none=True)
        return sums

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer on the CPU."""
        found = {PREFIX + name: p.detach().cpu().contiguous() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                known = self._optimizer.state.get(parameter, {}).get(moment)
                if known is not None:
                    found[f"{moment}/{name}"] = known.detach().cpu().contiguous()
        found["updates"] = torch.tensor(self.updates)
        return found

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse. Raises CheckpointError if the state is another model's."""
        updates = int(state.get("updates", torch.tensor(0)))
        kinds = (PREFIX, *(f"{moment}/" for moment in MOMENTS)) if updates else (PREFIX,)
        expected = {kind + name for kind in kinds for name in self._parameters} | {"updates"}
        wrong = sorted(expected ^ state.keys())
        wrong = wrong or [name for name, p in self._parameters.items() if state[PREFIX + name].shape != p.shape]
        if wrong:
            raise CheckpointError(f"the critic's state is not this model's: {', '.join(wrong[:3])} do not match")
        self.updates = updates
        self._optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[PREFIX + name])
                if updates:
                    moments = {m: state[f"{m}/{name}"].to(parameter.device).clone() for m in MOMENTS}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **moments}

    def _forward(self, batch: MicroBatch) -> torch.Tensor:
        """Values at the batch's positions, float32 [n]."""
        output = self._trunk(
            input_ids=batch.inputs, position_ids=batch.position_ids, use_cache=False, ragged=batch.layout
        )
        values: torch.Tensor = self._head(output.last_hidden_state[0, batch.positions].float())[:, 0]
        return values


def _array(sample: Sample, name: str) -> np.ndarray:  # type: ignore[type-arg]
    array = getattr(sample, name)
    assert array is not None, f"a critic is trained on samples with {name}"
    return np.asarray(array, dtype=np.float32)


def with_advantages(
    samples: Sequence[Sample],
    objective: ObjectiveConfig,
    kl: Sequence[np.ndarray] | None = None,  # type: ignore[type-arg]
) -> list[Sample]:
    """Samples that have ``values``, with ``token_advantages`` and ``returns``.

    ``kl``: for every sample the estimate at each token that is taken off the reward, float [n]; None: nothing is.
    """
    found, all_advantages = [], []
    for index, sample in enumerate(samples):
        values = _array(sample, "values").astype(np.float64)
        count = len(values)
        penalty = None if kl is None else np.asarray(kl[index], dtype=np.float64)
        rewards = end_rewards(count, sample.reward, penalty, objective.kl_coef)
        lam = lambda_of(count, objective.gae_lambda, objective.gae_alpha)
        critic_lam = lam if objective.gae_critic_lambda is None else objective.gae_critic_lambda
        advantages = gae(rewards, values, objective.gae_gamma, lam)
        targets = returns(rewards, values, objective.gae_gamma, critic_lam)
        all_advantages.append(advantages)
        found.append(replace(sample, returns=targets.astype(np.float32)))
    if objective.gae_normalise and all_advantages:
        joined = np.concatenate(all_advantages)
        normalised = normalised_over_step(joined, np.ones(len(joined), dtype=np.int64))
        ends = np.cumsum([len(part) for part in all_advantages])
        all_advantages = [normalised[end - len(part) : end] for part, end in zip(all_advantages, ends, strict=True)]
    return [
        replace(sample, token_advantages=advantages.astype(np.float32))
        for sample, advantages in zip(found, all_advantages, strict=True)
    ]
