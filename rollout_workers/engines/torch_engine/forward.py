"""The model's forward pass over one step, traced where that is safe.

With a small model on a CPU, more than a third of a step is Python: modules, wrappers and checks of transformers around
some 150 small operations. A TorchScript trace replays those operations without them, bit for bit the same. There are
two: one of steps that only decode, attention included, and one of mixed steps, whose attention is an operation that
calls back. A trace records one path through the code, so only architectures without data-dependent paths are traced,
and each trace is compared with the untraced model before it is used.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout_workers.engines.torch_engine.attention import DecodeStep, MixedStep, NumberedStep, SlotCache, Step
from rollout_workers.engines.torch_engine.scheduler import Chunk, StepPlan
from rollout_workers.engines.torch_engine.slot_table import SERVED, IntArray

logger = logging.getLogger(__name__)

DENSE = frozenset({"granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"})
"""Model types whose forward pass takes the same path for every input."""


class Forward:
    """Computes the logits of a step. Weights may be switched between calls, traced or not."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, *, trace: bool) -> None:
        self._model = model
        self._cache = cache
        self._device, self._dtype = model.device, model.dtype
        self._decode: Any = None
        self._mixed: Any = None
        with torch.inference_mode():
            self(_prefill_plan(3), np.zeros(1, np.int64))
            if trace and self._device.type == "cpu" and model.config.model_type in DENSE:
                self._trace()

    @property
    def traced(self) -> bool:
        return self._mixed is not None

    def __call__(self, plan: StepPlan, rows: IntArray) -> Tensor:
        """float32 [R, V]: the logits of the given rows of the step."""
        self._cache.step = step = MixedStep(self._cache, plan, self._device, self._dtype)
        ids_1T = torch.from_numpy(plan.tokens).to(self._device)[None]
        rows_R = torch.from_numpy(rows).to(self._device)
        inputs = ids_1T, step.positions_T[None], rows_R
        if self._mixed is None:
            logits_1RV = _logits(self._model, *inputs, step)
        elif plan.chunks:
            logits_1RV = self._mixed(*inputs)
        else:
            logits_1RV = self._decode(*inputs, step.slots_T, step.mask_N11L)
        return logits_1RV[0].float()

    def _trace(self) -> None:
        """Trace, and keep the traces if they give the same bits as the untraced model on steps of several shapes."""
        count = min(3, self._cache.slots)
        plans = [_prefill_plan(min(n, self._cache.max_len)) for n in (1, 2, 17, 40)]
        plans += [_decode_plan(n, position) for n in (count, 1) for position in (1, self._cache.max_len - 1)]
        wanted = [self(plan, plan.sample_rows) for plan in plans]
        try:
            decode, mixed = self._trace_decode(), self._trace_mixed()
        except (RuntimeError, TypeError) as error:
            logger.warning("%s is not traced: %s", type(self._model).__name__, error)
            return
        self._decode, self._mixed = decode, mixed
        if not all(
            torch.equal(self(plan, plan.sample_rows), logits) for plan, logits in zip(plans, wanted, strict=True)
        ):
            self._decode = self._mixed = None
            logger.warning("%s is not traced: the traces give other logits", type(self._model).__name__)

    def _trace_decode(self) -> Any:
        plan = _decode_plan(min(2, self._cache.slots), 1)
        step = MixedStep(self._cache, plan, self._device, self._dtype)
        inputs = torch.from_numpy(plan.tokens)[None], step.positions_T[None], torch.from_numpy(plan.sample_rows)
        return _traced(_Decode(self._model, self._cache), (*inputs, step.slots_T, step.mask_N11L))

    def _trace_mixed(self) -> Any:
        plan = _prefill_plan(min(3, self._cache.max_len))
        self._cache.step = step = MixedStep(self._cache, plan, self._device, self._dtype)
        inputs = torch.from_numpy(plan.tokens)[None], step.positions_T[None], torch.from_numpy(plan.sample_rows)
        return _traced(_Mixed(self._model, self._cache), inputs)


class _Mixed(torch.nn.Module):
    """The model over any step: ids and positions [1, T], rows [R] -> logits [1, R, V]."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model = model
        self.step = NumberedStep(cache)

    def forward(self, ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor) -> Tensor:
        return _logits(self.model, ids_1T, positions_1T, rows_R, self.step)


class _Decode(torch.nn.Module):
    """The model over a step of decoding rows; the cache is part of the graph."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model = model
        self.count = len(cache.layers)
        for index, (keys, values) in cache.layers.items():
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    def forward(
        self, ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor, slots_T: Tensor, mask_N11L: Tensor
    ) -> Tensor:
        layers = [(getattr(self, f"keys{index}"), getattr(self, f"values{index}")) for index in range(self.count)]
        step = DecodeStep(layers, slots_T, positions_1T[0], mask_N11L)
        return _logits(self.model, ids_1T, positions_1T, rows_R, step)


def _logits(model: Any, ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor, step: Step) -> Tensor:
    """[1, R, V]"""
    output = model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, logits_to_keep=rows_R, slot_step=step)
    logits_1RV: Tensor = output.logits
    return logits_1RV


def _traced(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module.eval(), inputs, check_trace=False)  # type: ignore[no-untyped-call]


def _prefill_plan(length: int) -> StepPlan:
    """A prompt of some tokens in slot 0."""
    zeros, positions = np.zeros(length, np.int64), np.arange(length)
    tokens = (positions * 7 % 11).astype(np.int32)
    last = np.array([length - 1])
    return StepPlan(SERVED, zeros, positions, tokens, 0, ((Chunk(0, 0, length, 0),),), last)


def _decode_plan(count: int, position: int) -> StepPlan:
    """One token at ``position`` in each of the first ``count`` slots."""
    slots = np.arange(count)
    tokens = (slots * 5 + 1).astype(np.int32)
    return StepPlan(SERVED, slots, np.full(count, position), tokens, count, (), np.arange(count))
