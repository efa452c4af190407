"""The model's forward pass over one step, traced where that is safe.

With a small model on a CPU, more than a third of a step is Python: modules, wrappers and checks of transformers around
some 150 small operations. A TorchScript trace replays those operations without them, bit for bit the same. A trace
records one path through the code, so only architectures without data-dependent paths are traced, and each trace is
compared with the untraced model before it is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout_workers.engines.torch_engine.attention import SlotBatch, SlotCache
from rollout_workers.engines.torch_engine.scheduler import Chunk, StepPlan
from rollout_workers.engines.torch_engine.slot_table import SERVED, IntArray

logger = logging.getLogger(__name__)

DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"})
"""Model types whose forward pass takes the same path for every input."""

_Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Forward:
    """Computes the logits of a step. Weights may be switched between calls, traced or not."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, *, trace: bool) -> None:
        self._model = model
        self._cache = cache
        self._device, self._dtype = model.device, model.dtype
        self._function: _Function = _Untraced(model, cache.number)
        with torch.inference_mode():
            self(_trial_plan(3), np.zeros(1, np.int64))
            if trace and self._device.type == "cpu" and model.config.model_type in DENSE:
                self._trace()

    @property
    def traced(self) -> bool:
        return not isinstance(self._function, _Untraced)

    def __call__(self, plan: StepPlan, rows: IntArray) -> Tensor:
        """float32 [R, V]: the logits of the given rows of the step."""
        self._cache.batch = batch = SlotBatch(self._cache, plan, self._device, self._dtype)
        ids_1T = torch.from_numpy(plan.tokens).to(self._device)[None]
        logits_1RV = self._function(ids_1T, batch.positions_T[None], torch.from_numpy(rows).to(self._device))
        return logits_1RV[0].float()

    def _trace(self) -> None:
        untraced = self._function
        self._cache.batch = batch = SlotBatch(self._cache, _trial_plan(3), self._device, self._dtype)
        example = (torch.zeros(1, 3, dtype=torch.int32), batch.positions_T[None], torch.zeros(1, dtype=torch.int64))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._function = torch.jit.trace(_Untraced(self._model, self._cache.number), example, check_trace=False)
        except (RuntimeError, TypeError) as error:
            logger.warning("%s is not traced: %s", type(self._model).__name__, error)
            return
        for length in (1, 2, 5, min(40, self._cache.max_len), min(17, self._cache.max_len)):
            plan, rows = _trial_plan(length), np.arange(max(length // 2, 1))
            traced = self(plan, rows)
            self._function, kept = untraced, self._function
            if not torch.equal(traced, self(plan, rows)):
                logger.warning("%s is not traced: the trace gives other logits", type(self._model).__name__)
                return
            self._function = kept


class _Untraced(torch.nn.Module):
    """The model as a function of tensors only: ids and positions [1, T], rows [R] -> logits [1, R, V]."""

    def __init__(self, model: PreTrainedModel, slot_cache: int) -> None:
        super().__init__()
        self.model = model
        self.slot_cache = slot_cache

    def forward(self, ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor) -> Tensor:
        logits_1RV: Tensor = self.model(
            input_ids=ids_1T,
            position_ids=positions_1T,
            use_cache=False,
            logits_to_keep=rows_R,
            slot_cache=self.slot_cache,
        ).logits
        return logits_1RV


def _trial_plan(length: int) -> StepPlan:
    """A prompt of some tokens in slot 0."""
    return StepPlan(
        pin=SERVED,
        slots=np.zeros(length, np.int64),
        positions=np.arange(length),
        tokens=(np.arange(length) * 7 % 11).astype(np.int32),
        decodes=0,
        chunks=((Chunk(0, 0, length, 0),),),
        sample_rows=np.zeros(1, np.int64),
    )
