"""Forward and backward passes through the stages of a pipeline, and the loss on its last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learner.backends.batch_loss import batch_loss
from learner.backends.frozen import FrozenModel
from learner.backends.megatron.logprobs import parallel_token_logprobs
from learner.backends.megatron.model import RotaryTable
from learner.backends.megatron.parallel import Ranks
from learner.backends.protocol import PassResult
from learner.batching import MicroBatch
from learner.objectives.config import ObjectiveConfig
from learner.objectives.regularisers import distillation_loss
from learner.objectives.sums import TokenSums

Judge = Callable[[MicroBatch, Tensor], tuple[Tensor, Any]]
"""Logits of a micro-batch's loss positions on the last stage to a loss to be summed, and what is to be known of it."""


class Pipeline:
    """Runs micro-batches one after another, those of a call at the same time on different stages (one forward, one backward:
    Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2).

    ``model`` is what holds gradients, ``stage`` the `GPTModel` inside; only logits at loss positions are computed.
    """

    def __init__(self, model: Any, stage: Any, ranks: Ranks, rotary: RotaryTable, *, divided_tokens: bool) -> None:
        self._model, self._ranks, self._rotary = model, ranks, rotary
        self._divided_tokens = divided_tokens
        self._positions: Tensor | None = None
        if ranks.last_stage and not divided_tokens:
            stage.output_layer.register_forward_pre_hook(self._select)

    def run(self, batches: Sequence[MicroBatch], judge: Judge, *, backward: bool) -> list[Any]:
        """What ``judge`` tells of each batch, on the last stage; elsewhere nothing. Gradients are added up."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if not batches:
            return []
        run = get_forward_backward_func()
        told: list[Any] = run(
            forward_step_func=partial(self._forward, judge),
            data_iterator=iter(batches),
            model=[self._model],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=not backward,
        )
        return told if self._ranks.last_stage else []

    def _forward(self, judge: Judge, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        padding = -batch.inputs.shape[1] % self._ranks.sizes.tensor if self._divided_tokens else 0
        inputs = torch.nn.functional.pad(batch.inputs, (0, padding)) if padding else batch.inputs
        self._positions = batch.asked.positions
        output = model(inputs, None, None, packed_seq_params=self._rotary.packed(batch, padding))
        return output, partial(self._judged, judge, batch)

    def _judged(self, judge: Judge, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
        logits = output[0].index_select(0, batch.asked.positions) if self._divided_tokens else output[0]
        loss, told = judge(batch, logits)
        # The schedule divides by this count; sums stay sums.
        return loss, torch.tensor(1, dtype=torch.int), told

    def _select(self, layer: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del layer
        assert self._positions is not None
        return (arguments[0].index_select(0, self._positions), *arguments[1:])


class Loss:
    """The objective on the last stage, as a `Judge`."""

    def __init__(
        self, ranks: Ranks, vocabulary: int, reference: FrozenModel | None, teacher: FrozenModel | None
    ) -> None:
        self._ranks, self._vocabulary = ranks, vocabulary
        self._reference, self._teacher = reference, teacher

    def statistics(self, batch: MicroBatch, logits: Tensor, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the batch's targets."""
        asked = batch.asked
        logp, entropies = parallel_token_logprobs(
            logits,
            asked.targets,
            asked.inverse_temperatures,
            self._ranks.tensor_group,
            self._vocabulary,
            entropy_gradient=entropy_gradient,
        )
        return batch.spread(logp), batch.spread(entropies)

    def logprobs(self, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        found = self.statistics(batch, logits)[0]
        return found.sum(), found

    def objective(self, objective: ObjectiveConfig, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, PassResult]:
        if not batch.normaliser:
            return _no_loss(logits), PassResult(TokenSums())
        logp, entropies = self.statistics(batch, logits, entropy_gradient=objective.entropy_coef > 0)
        reference = self._reference if objective.kl_coef > 0 else None
        loss, result = batch_loss(
            batch,
            logp,
            entropies,
            objective,
            reference=None if reference is None else reference.logprobs(batch),
            distillation=self._distillation(batch, logits, objective),
        )
        return _no_loss(logits) if loss is None else loss, result

    def _distillation(self, batch: MicroBatch, logits: Tensor, objective: ObjectiveConfig) -> Tensor | None:
        """The distance to the teacher needs whole rows of logits: [n, vocabulary] on every tensor-parallel rank."""
        if self._teacher is None or objective.distill_coef == 0:
            return None
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        whole = gather_from_tensor_model_parallel_region(logits)[:, : self._vocabulary]
        inverse = batch.asked.inverse_temperatures[:, None]
        return batch.spread(
            distillation_loss(whole * inverse, self._teacher.logits(batch) * inverse, objective.distill_top_k)
        )


def _no_loss(logits: Tensor) -> Tensor:
    """0, with a gradient of zeros also where logits are not finite."""
    return torch.where(torch.zeros_like(logits, dtype=torch.bool), logits, 0.0).sum()
