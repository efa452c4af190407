"""One rank of a Megatron-Core model: its shard of the layers, the schedule it runs in, its share of the optimizer.

The same micro-batch gives the same loss, gradient and update as `FsdpBackend`: samples lie end to end in one row without padding,
the objective is the same code on the last stage, gradients are sums that `step` divides once. Weights come from and go to Hugging
Face directories; names and layouts of everything that leaves this class are Hugging Face's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learner.backends.frozen import FrozenModel
from learner.backends.megatron.architecture import SUPPORTED, read_architecture
from learner.backends.megatron.cpu import plain_torch
from learner.backends.megatron.exchange import Exchange
from learner.backends.megatron.files import WeightFiles, read_config, write_weights
from learner.backends.megatron.model import (
    RotaryTable,
    build_stage,
    is_sequence_parallel,
    recompute_layers,
    transformer_config,
)
from learner.backends.megatron.optimizer import MOMENTS, ModelOptimizer
from learner.backends.megatron.parallel import Ranks, require_megatron
from learner.backends.megatron.passes import Loss, Pipeline
from learner.backends.megatron.slots import fused, fused_names, make_slots, unfused
from learner.backends.memory import keep_freed_memory
from learner.backends.model import resolve_device
from learner.backends.protocol import PassResult
from learner.batching import MicroBatch, idle_batch
from learner.config import LearnerConfig
from learner.errors import CheckpointError, ModelError
from learner.objectives.config import ObjectiveConfig
from learner.objectives.sums import TokenSums
from learner.prefix_tree import Sharing

logger = logging.getLogger(__name__)

Named = Iterator[tuple[str, torch.Tensor]]


class MegatronBackend:
    """Model and optimizer of one rank of ``world``. Raises ModelError if the model cannot be trained or divided so.

    ``initial`` is the model that the run began with, which a KL term measures the distance to (None: ``path``). A reference or a
    teacher is a whole Hugging Face model on every rank of the last stage: 4 bytes a parameter each.
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
        require_megatron()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.updates = 0
        self._moments = () if config.optimizer == "sgd" else MOMENTS
        self._config = config
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._hugging_face = read_config(path)
        self._architecture = read_architecture(self._hugging_face)
        sizes = config.megatron.sizes(world)
        self._architecture.check(sizes)
        self._ranks = Ranks(sizes, self.device, config.rank_timeout_s)
        self._build(path)
        with plain_torch():
            self._make_frozen(path, initial)
        self._loss = Loss(self._ranks, self._architecture.vocabulary, self._reference, self._teacher)
        self._places = self._ranks.places()
        logger.info("training %s", self.describe())

    def _build(self, path: str | Path) -> None:
        ranks, model = self._ranks, self._architecture
        transformer = transformer_config(model, ranks, self._dtype)
        stage: Any = build_stage(model, ranks, transformer)
        self._exchange = Exchange(make_slots(model, ranks.sizes), stage, ranks)
        with WeightFiles(path) as files:
            self._load_weights(files, lambda parameter, value: parameter.detach().copy_(value))
            if self._config.gradient_checkpointing:
                recompute_layers(stage)
            stage = stage.to(self.device).train()
            module = stage
            if self._dtype is torch.bfloat16:
                from megatron.core.transformer.module import Float16Module

                module = Float16Module(transformer, stage)
            self._optimizer = ModelOptimizer(module, transformer, ranks, self._config)
            if self._dtype is not torch.float32:
                self._load_weights(files, self._optimizer.set_weight)
        with plain_torch():
            rotary = RotaryTable(self._hugging_face, self.device)
        divided = is_sequence_parallel(model, ranks)
        self.sharing: Sharing | None = None if divided else self._config.sharing
        self._pipeline = Pipeline(self._optimizer.model, stage, ranks, rotary, divided_tokens=divided)

    def _load_weights(self, files: WeightFiles, put: Any) -> None:
        for slot, parameter in self._exchange.local():
            try:
                put(parameter, self._exchange.scatter(slot, files.read))
            except ModelError:
                raise
            except ValueError as error:
                raise ModelError(f"config.json and weights belong to different models: {error}") from error

    def _make_frozen(self, path: str | Path, initial: str | Path | None) -> None:
        config, vocabulary = self._config, self._architecture.vocabulary
        self._reference: FrozenModel | None = None
        self._teacher: FrozenModel | None = None
        if not self._ranks.last_stage:
            return
        if self._has_reference:
            place = config.reference or initial or path
            self._reference = FrozenModel("learner.reference", place, self.device, vocabulary)
        if config.teacher is not None:
            self._teacher = FrozenModel("learner.teacher", config.teacher, self.device, vocabulary)

    @property
    def _has_reference(self) -> bool:
        return self._config.kl_coef > 0 and self._config.kl_place == "loss"

    def describe(self) -> dict[str, Any]:
        sizes = self._ranks.sizes
        slots = self._exchange.slots
        return {
            "architecture": f"{SUPPORTED[self._architecture.model_type]} (Megatron-Core)",
            "parameters": sum(prod(shape) for slot in slots if not slot.copy for shape in slot.shapes),
            "device": str(self.device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "tensor_parallel": sizes.tensor,
            "pipeline_parallel": sizes.pipeline,
            "expert_parallel": sizes.expert,
            "data_parallel": sizes.data,
            "places": self._places,
            "shares_prefixes": self.sharing is not None,
        }

    # Passes

    @torch.no_grad()
    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """On the last stage of a pipeline; the others return zeros."""
        found = self._pipeline.run([batch], self._loss.logprobs, backward=False)
        result: torch.Tensor = found[0] if found else torch.zeros(len(batch.targets), device=self.device)
        return result

    def forward_backward(self, batch: MicroBatch, objective: ObjectiveConfig) -> PassResult:
        return self.forward_backward_all([batch], objective)

    def forward_backward_all(self, batches: Sequence[MicroBatch | None], objective: ObjectiveConfig) -> PassResult:
        """All micro-batches of a call in one schedule, which keeps every stage busy; None: a pass that adds nothing."""
        filled = [idle_batch(self.device) if batch is None else batch for batch in batches]
        sums = TokenSums()
        bad: list[str] = []
        for result in self._pipeline.run(filled, partial(self._loss.objective, objective), backward=True):
            sums.add(result.sums)
            bad.extend(result.bad_samples)
        return PassResult(sums, tuple(bad))

    def idle_pass(self) -> None:
        self.forward_backward_all([None], self._config)

    def idle_forward(self) -> None:
        self.forward(idle_batch(self.device))

    # Updates

    def learning_rate(self, update: int) -> float:
        """Of the update number ``update``, from 0: linear warm-up to ``lr`` over ``warm_up_steps``, then constant."""
        return self._config.lr * min(1.0, (update + 1) / max(1, self._config.warm_up_steps))

    def step(self, normaliser: float) -> float | None:
        norm = self._optimizer.step(normaliser, self.learning_rate(self.updates))
        if norm is not None:
            self.updates += 1
            self._move_reference()
        return norm

    def gradient_is_finite(self) -> bool:
        return self._optimizer.gradient_is_finite()

    def discard_gradient(self) -> None:
        self._optimizer.discard_gradient()

    def _move_reference(self) -> None:
        """Reset the reference policy when it is due (Liu et al. 2025, "ProRL", section 3.2)."""
        every = self._config.reference_reset_every
        if self._has_reference and every and self.updates % every == 0:
            gathered = self._exchange.gather(self._optimizer.weight, torch.float32)
            weights = fused(gathered, self._architecture.experts)
            if self._reference is not None:
                self._reference.take(weights)
            else:
                _exhaust(weights)
            logger.info("the reference policy is that of update %d", self.updates)

    # Weights and state by Hugging Face name

    def named_tensors(self) -> Named:
        """Whole tensors by the names of files, on every rank; all ranks must iterate to the end."""
        yield from self._exchange.gather(self._optimizer.weight, self._dtype)

    def master_weights(self) -> Named:
        """Whole, each on the first rank alone, by the names of files."""
        for name, tensor in self._exchange.gather(self._optimizer.weight, torch.float32):
            if dist.get_rank() == 0:
                yield name, tensor

    def save_config(self, directory: Path) -> None:
        self._hugging_face.dtype = torch.float32
        self._hugging_face.save_pretrained(directory)

    def save_model(self, directory: Path) -> None:
        keep = dist.get_rank() == 0
        if keep:
            self.save_config(directory)
        write_weights(directory, self._exchange.gather(self._optimizer.weight, torch.float32), keep=keep)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Each rank has some of the tensors, whole; together they have all."""
        state: dict[str, torch.Tensor] = {}
        if not self.updates:
            return state
        for kind in self._moments:
            take = partial(self._optimizer.moment, kind=kind)
            gathered = fused(self._exchange.gather(take, torch.float32), self._architecture.experts)
            for index, (name, value) in enumerate(gathered):
                if index % dist.get_world_size() == dist.get_rank():
                    state[f"{kind}/{name}"] = value
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        names = fused_names(self._exchange.slots)
        expected = {f"{kind}/{name}" for kind in self._moments for name in names} if updates else set()
        if expected != state.keys():
            strange = sorted(expected ^ state.keys())[:3]
            raise CheckpointError(f"the optimizer state is not this model's: {', '.join(strange)} do not match")
        self.updates = updates
        self._optimizer.clear_state()
        if not updates or not self._moments:
            return
        finders = {kind: unfused(_below(state, f"{kind}/")) for kind in self._moments}
        for slot, parameter in self._exchange.local():
            try:
                moments = {kind: self._exchange.scatter(slot, find) for kind, find in finders.items()}
            except ValueError as error:
                raise CheckpointError(f"the optimizer state does not have the shape of the model: {error}") from error
            self._optimizer.set_state(parameter, moments, updates)

    def reference_state(self) -> dict[str, torch.Tensor]:
        """On the ranks of the last stage, which have a reference policy."""
        return self._reference.named_tensors() if self._reference is not None and self._reference.updates else {}

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        if not self._has_reference:
            raise CheckpointError("the checkpoint has a reference policy, and learner.kl_coef=0 uses none")
        if self._reference is not None:
            self._reference.take(state.items())


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _exhaust(named: Named) -> None:
    for _ in named:
        pass
