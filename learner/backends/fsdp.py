"""The PyTorch backend: a Hugging Face model, AdamW with warm-up, gradient sums.

One rank trains the plain module; several shard it, each decoder layer a unit (FSDP2, ``fully_shard``): a unit's weights are
gathered before it runs and let go after it, its gradient is summed and scattered, and every rank updates its shard. Weights
and optimizer state are float32; with another ``dtype`` the layers compute in it (by autocast, or gathered in it), gradients are
reduced in float32, and that dtype is what engines get.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from learner.adapter_files import ADAPTER_WEIGHTS, adapter_settings, base_of
from learner.backends.batch_loss import batch_loss
from learner.backends.frozen import FrozenModel
from learner.backends.lora import LoraAdapter
from learner.backends.memory import keep_freed_memory
from learner.backends.model import load_model, resolve_device
from learner.backends.protocol import PassResult
from learner.backends.sharding import as_sharded, shard, whole
from learner.batching import MicroBatch, idle_batch
from learner.config import LearnerConfig
from learner.errors import CheckpointError, ModelError
from learner.objectives.config import ObjectiveConfig
from learner.objectives.regularisers import distillation_loss
from learner.objectives.token_statistics import token_logprobs
from learner.prefix_tree import Sharing
from weight_sync.file_names import FileNames

logger = logging.getLogger(__name__)

ADAPTER_DIRECTORY = "adapter"
"""Where the adapter lies in a directory that holds the model with it merged in."""

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Tensors that an optimizer keeps for each parameter."""


class FsdpBackend:
    """Model and optimizer of one rank. Raises ModelError if the model cannot be trained.

    ``initial`` is the model that the run began with, which a KL term measures the distance to (None: ``path``).
    """

    def __init__(
        self,
        path: str | Path,
        config: LearnerConfig,
        dtype: str = "float32",
        initial: str | Path | None = None,
        world: int = 1,
    ) -> None:
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.updates = 0
        self._config = config
        self._dtype: torch.dtype = getattr(torch, dtype)
        base = base_of(path, initial)
        self._model = load_model(base, self.device, gradient_checkpointing=config.gradient_checkpointing)
        self.sharing = _sharing_for(self._model.config, config)
        self._adapter = _adapter_of(self._model, path, base, config)
        self._world = world
        if world > 1:
            shard(self._model, self.device, self._dtype, offload=config.cpu_offload)
        self._parameters: dict[str, torch.nn.Parameter] = (
            dict(self._model.named_parameters()) if self._adapter is None else self._adapter.trained()
        )
        """What is trained."""
        self._optimizer = make_optimizer(list(self._parameters.values()), config)
        self._moments = MOMENTS[config.optimizer]
        vocabulary = self._model.config.vocab_size
        self._reference: FrozenModel | None = None
        if config.kl_coef > 0 and config.kl_place == "loss":
            place = config.reference or initial or base
            self._reference = FrozenModel("learner.reference", place, self.device, vocabulary)
        self._teacher: FrozenModel | None = None
        if config.teacher is not None:
            self._teacher = FrozenModel("learner.teacher", config.teacher, self.device, vocabulary)
        logger.info("training %s", self.describe())

    def describe(self) -> dict[str, Any]:
        return {
            "architecture": type(self._model).__name__.removeprefix("FSDP"),
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "trained_parameters": sum(p.numel() for p in self._parameters.values()),
            "device": str(self.device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "data_parallel": self._world,
            "places": list(range(self._world)),
            "shares_prefixes": self.sharing is not None,
        }

    def logprobs(self, batch: MicroBatch, *, entropy_gradient: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the batch's targets, float32 [n] each, with gradient."""
        return self._statistics(batch, self._logits(batch), entropy_gradient)

    def _statistics(
        self, batch: MicroBatch, logits: torch.Tensor, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked = batch.asked
        logp, entropies = token_logprobs(
            logits, asked.targets, asked.inverse_temperatures, entropy_gradient=entropy_gradient
        )
        return batch.spread(logp), batch.spread(entropies)

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        """[m, vocabulary] of what the batch asks."""
        with self._autocast():
            output = self._model(
                input_ids=batch.inputs,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.asked.positions,
                ragged=batch.layout,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        if self._adapter is not None:
            self._adapter.dropping(False)
        try:
            with torch.no_grad():
                return self.logprobs(batch)[0]
        finally:
            if self._adapter is not None:
                self._adapter.dropping(True)

    def idle_pass(self) -> None:
        (self._logits(idle_batch(self.device)).sum() * 0.0).backward()  # type: ignore[no-untyped-call]

    def idle_forward(self) -> None:
        with torch.no_grad():
            self._logits(idle_batch(self.device))

    def forward_backward(self, batch: MicroBatch, objective: ObjectiveConfig) -> PassResult:
        logits = self._logits(batch)
        logp, entropies = self._statistics(batch, logits, objective.entropy_coef > 0)
        reference = self._reference if objective.kl_coef > 0 else None
        loss, result = batch_loss(
            batch,
            logp,
            entropies,
            objective,
            reference=None if reference is None else reference.logprobs(batch),
            distillation=self._distillation(batch, logits, objective),
        )
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        elif self._world > 1:  # the other ranks are in their backward passes and wait for this one
            (logits.sum() * 0.0).backward()  # type: ignore[no-untyped-call]
        return result

    def _distillation(self, batch: MicroBatch, logits: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor | None:
        if self._teacher is None or objective.distill_coef == 0:
            return None
        inverse = batch.asked.inverse_temperatures[:, None]
        return batch.spread(
            distillation_loss(logits * inverse, self._teacher.logits(batch) * inverse, objective.distill_top_k)
        )

    def step(self, normaliser: float) -> float | None:
        gradients = self._gradients()
        if not gradients:
            return 0.0
        torch._foreach_mul_(gradients, 1.0 / normaliser)
        norm = _norm(gradients)
        if not math.isfinite(norm):
            self.discard_gradient()
            return None
        limit = self._config.clip_grad
        if 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.updates)
        self._optimizer.step()
        self.updates += 1
        self.discard_gradient()
        self._move_reference()
        return norm

    def gradient_is_finite(self) -> bool:
        return math.isfinite(_norm(self._gradients()))

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def _move_reference(self) -> None:
        """Reset the reference policy when it is due (Liu et al. 2025, "ProRL", section 3.2)."""
        every = self._config.reference_reset_every
        if self._reference is not None and every and self.updates % every == 0:
            self._reference.take(self._whole_model())
            logger.info("the reference policy is that of update %d", self.updates)

    def reference_state(self) -> dict[str, torch.Tensor]:
        if self._reference is None or not self._reference.updates:
            return {}
        return self._reference.named_tensors()

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        if self._reference is None:
            raise CheckpointError("the checkpoint has a reference policy, and learner.kl_coef=0 uses none")
        self._reference.take(state.items())

    def learning_rate(self, update: int) -> float:
        """Of the update number ``update``, from 0: linear warm-up to ``lr`` over ``warm_up_steps``, then constant."""
        return self._config.lr * min(1.0, (update + 1) / max(1, self._config.warm_up_steps))

    def discard_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._adapter is not None:
            yield from self._adapter.published(self._dtype)
            return
        names = FileNames.of(self._model.config.model_type)
        for name, parameter in self._parameters.items():
            yield from names.split(name, whole(parameter.detach().to(self._dtype)))

    def master_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, parameter.detach()

    def _whole_model(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, whole, by Hugging Face name, an adapter merged in. All ranks go through it together."""
        if self._adapter is not None:
            return self._adapter.merged()
        return ((name, whole(parameter.detach())) for name, parameter in self._parameters.items())

    def save_config(self, directory: Path) -> None:
        self._save_model_config(directory)
        if self._adapter is not None:
            self._adapter.save_config(directory)

    def _save_model_config(self, directory: Path) -> None:
        self._model.config.save_pretrained(directory)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(directory)

    def save_model(self, directory: Path) -> None:
        if self._world == 1 and self._adapter is None:
            self._model.save_pretrained(directory, safe_serialization=True)
            return
        weights = {name: tensor.cpu().contiguous() for name, tensor in self._whole_model()}
        first = self._world == 1 or torch.distributed.get_rank() == 0
        if self._adapter is None:
            if first:
                self._model.save_pretrained(directory, state_dict=weights, safe_serialization=True)
            return
        trained = {name: whole(p.detach()).cpu().contiguous() for name, p in self._parameters.items()}
        if first:
            self._save_merged(weights, trained, directory)

    def _save_merged(self, weights: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], directory: Path) -> None:
        """The model with the adapter merged in, which transformers would not write of a model that has one, and the adapter."""
        from huggingface_hub import save_torch_state_dict
        from safetensors.torch import save_file

        assert self._adapter is not None
        save_torch_state_dict(weights, directory)
        self._save_model_config(directory)
        (directory / ADAPTER_DIRECTORY).mkdir(exist_ok=True)
        save_file(trained, directory / ADAPTER_DIRECTORY / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self._adapter.save_config(directory / ADAPTER_DIRECTORY)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            for moment in self._moments:
                known = self._optimizer.state.get(parameter, {}).get(moment)
                if known is not None:
                    state[f"{moment}/{name}"] = known.detach()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        expected = {f"{moment}/{name}" for moment in self._moments for name in self._parameters} if updates else set()
        if expected != state.keys():
            strange = sorted(expected ^ state.keys())[:3]
            raise CheckpointError(f"the optimizer state is not this model's: {', '.join(strange)} do not match")
        self.updates = updates
        self._optimizer.state.clear()
        if not updates or not self._moments:
            return
        for name, parameter in self._parameters.items():
            moments = {moment: state[f"{moment}/{name}"].to(parameter.device).clone() for moment in self._moments}
            if any(value.shape != parameter.shape for value in moments.values()):
                raise CheckpointError(f"the optimizer state of {name} does not have the shape of the parameter")
            moments = {moment: as_sharded(value, parameter) for moment, value in moments.items()}
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device if self.device.type == "cuda" else "cpu"),
                **moments,
            }

    def _autocast(self) -> Any:
        if self._dtype is torch.float32 or self._world > 1:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)


def _adapter_of(model: Any, path: str | Path, base: Path, config: LearnerConfig) -> LoraAdapter | None:
    """The adapter that the settings ask for, as new or as ``path`` has it. Raises ModelError, CheckpointError."""
    held = adapter_settings(path)
    if not config.lora.rank:
        if held is not None:
            raise ModelError(f"{path} holds a LoRA adapter, and learner.lora.rank=0: set it to {held['r']}")
        return None
    adapter = LoraAdapter(model, config.lora, base)
    if held is not None:
        adapter.load(Path(path))
    return adapter


def _norm(gradients: list[torch.Tensor]) -> float:
    return float(whole(torch.nn.utils.get_total_norm(gradients)))


def make_optimizer(parameters: list[torch.nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    """What ``learner.optimizer`` asks for."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def _sharing_for(model_config: Any, config: LearnerConfig) -> Sharing | None:
    """None where attention or an adapter drops at random: sequences that share a prefix would drop the same.

    Raises ModelError if sharing was asked for then.
    """
    drops = any(getattr(model_config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    if not drops and not config.lora.dropout:
        return config.sharing
    if config.prefix_sharing == "on":
        where, remedy = (
            ("model", "attention_dropout to 0 in its config.json") if drops else ("adapter", "learner.lora.dropout=0")
        )
        raise ModelError(
            f"learner.prefix_sharing=on: this {where} has dropout, which would drop the same for all that share a prefix; "
            f"use auto or off, or set {remedy}"
        )
    return None
