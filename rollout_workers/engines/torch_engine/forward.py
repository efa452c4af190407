"""The model's forward pass over one step, traced where that is safe.

With a small model on a CPU, more than a third of a step is Python: modules, wrappers and checks of transformers around
some 150 small operations. A TorchScript trace replays those operations without them, bit for bit the same. There are
two: one of steps that only decode, attention and sampling included, and one of mixed steps, whose attention is an operation that
calls back. A trace records one path through the code, so only architectures without data-dependent paths are traced,
and each trace is compared with the untraced model before it is used.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout_workers.engines.torch_engine.attention import (
    DecodeStep,
    MixedStep,
    NumberedStep,
    SlotCache,
    Step,
    last_positions,
    to_device,
)
from rollout_workers.engines.torch_engine.loader import ModelError
from rollout_workers.engines.torch_engine.sampler import draw
from rollout_workers.engines.torch_engine.scheduler import Chunk, StepPlan
from rollout_workers.engines.torch_engine.slot_table import SERVED

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")

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
            self(_prefill_plan(3))
            if trace and self._device.type == "cpu" and model.config.model_type in DENSE:
                self._trace()

    @property
    def traced(self) -> bool:
        return self._mixed is not None

    def draw(self, plan: StepPlan, uniform_R: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """As :func:`.sampler.draw` from the logits of the step's sample rows."""
        if self._decode is None or plan.chunks:
            return draw(self(plan), to_device(uniform_R, self._device))
        _, tokens_R, logprobs_R = self._decode(*_decode_inputs(plan, self._cache), torch.from_numpy(uniform_R))
        return tokens_R, logprobs_R

    def __call__(self, plan: StepPlan) -> Tensor:
        """float32 [R, V]: the logits of the step's sample rows; of its first row when there is none."""
        if self._decode is not None and not plan.chunks:
            unused_T = torch.zeros(plan.decodes, dtype=torch.float64)
            logits_RV: Tensor = self._decode(*_decode_inputs(plan, self._cache), unused_T)[0]
            return logits_RV
        self._cache.step = step = MixedStep(self._cache, plan, self._device, self._dtype)
        inputs = _mixed_inputs(plan, step)
        if self._mixed is not None:
            logits_RV = self._mixed(*inputs)
            return logits_RV
        return _logits(self._model, *inputs, step)

    def _trace(self) -> None:
        """Trace, and keep the traces if they give the same bits as the untraced model on steps of several shapes."""
        count = min(3, self._cache.slots)
        plans = [_prefill_plan(min(n, self._cache.max_len)) for n in (1, 2, 17, 40)]
        plans += [_decode_plan(n, position) for n in (count, 1) for position in (1, self._cache.max_len - 1)]
        wanted = [self(plan) for plan in plans]
        try:
            decode, mixed = self._trace_decode(), self._trace_mixed()
        except (RuntimeError, TypeError) as error:
            logger.warning("%s is not traced: %s", type(self._model).__name__, error)
            return
        self._decode, self._mixed = decode, mixed
        if not all(torch.equal(self(plan), logits) for plan, logits in zip(plans, wanted, strict=True)):
            self._decode = self._mixed = None
            logger.warning("%s is not traced: the traces give other logits", type(self._model).__name__)

    def _trace_decode(self) -> Any:
        plan = _decode_plan(min(2, self._cache.slots), 1)
        inputs = *_decode_inputs(plan, self._cache), torch.zeros(plan.decodes, dtype=torch.float64)
        return _traced(_Decode(self._model, self._cache), inputs)

    def _trace_mixed(self) -> Any:
        plan = _prefill_plan(min(3, self._cache.max_len))
        self._cache.step = step = MixedStep(self._cache, plan, self._device, self._dtype)
        return _traced(_Mixed(self._model, self._cache), _mixed_inputs(plan, step))


def forward_of(model: PreTrainedModel, cache: SlotCache, trace: bool) -> Forward:
    """Raises ModelError for a model that bypasses the attention interface or wants more of it than there is."""
    name = type(model).__name__
    try:
        forward = Forward(model, cache, trace=trace)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name} cannot run in the torch engine: {error}") from error
    layers = int(model.config.get_text_config().num_hidden_layers)
    if len(cache.layers) != layers:
        raise ModelError(
            f"{name}: {len(cache.layers)} of its {layers} layers use the attention interface; the torch engine needs "
            "all of them to"
        )
    return forward


class _Mixed(torch.nn.Module):
    """The model over any step: ids and positions [T], rows [R] -> logits [R, V]."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model = model
        self.step = NumberedStep(cache)

    def forward(self, ids_T: Tensor, positions_T: Tensor, rows_R: Tensor) -> Tensor:
        return _logits(self.model, ids_T, positions_T, rows_R, self.step)


class _Decode(torch.nn.Module):
    """The model over a step of decoding rows, and a draw from its logits; the cache is part of the graph."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model = model
        self.count = len(cache.layers)
        for index, (keys, values) in cache.layers.items():
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        last_N: Tensor,
        seen_L: Tensor,
        uniform_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = [(getattr(self, f"keys{index}"), getattr(self, f"values{index}")) for index in range(self.count)]
        step = DecodeStep(layers, slots_T, positions_T, last_N, seen_L)
        logits_TV = _logits(self.model, ids_T, positions_T, 0, step)
        return (logits_TV, *draw(logits_TV, uniform_T))


def _logits(model: Any, ids_T: Tensor, positions_T: Tensor, rows: Tensor | int, step: Step) -> Tensor:
    """float32 [R, V]; ``rows`` 0 means all."""
    output = model(
        input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, logits_to_keep=rows, slot_step=step
    )
    logits_RV: Tensor = output.logits[0]
    return logits_RV.float()


def _decode_inputs(plan: StepPlan, cache: SlotCache) -> tuple[Tensor, ...]:
    """What :class:`_Decode` takes, on the CPU."""
    last_N = last_positions(plan)
    seen_L = cache.positions(cache.round_up(int(last_N.max()) + 1), _CPU)
    arrays = plan.tokens, plan.positions, plan.slots, last_N
    return (*map(torch.from_numpy, arrays), seen_L)


def _mixed_inputs(plan: StepPlan, step: MixedStep) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`_Mixed` takes."""
    rows = plan.sample_rows if len(plan.sample_rows) else np.zeros(1, np.int64)
    device = step.positions_T.device
    return to_device(plan.tokens, device), step.positions_T, to_device(rows, device)


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
