"""Attention over the slot cache, behind transformers' attention interface.

A step is one ragged batch of T tokens that the model sees as a single sequence ``[1, T]``. Only here are they told
apart: each token's key and value go to its own (slot, position), and each query sees its own slot up to its position.
Decoding rows attend in one batched operation, prefill chunks in one per group of similar length.

Shapes: T tokens, H query heads, G key/value heads, D head size, S slots, L positions, N rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rollout_workers.disaggregation.cache_memory import CacheMemory
from rollout_workers.engines.torch_engine.scheduler import Chunk, StepPlan
from rollout_workers.engines.torch_engine.slot_table import IntArray

ATTENTION_NAME = "millrace_slots"
"""The ``attn_implementation`` to load a model with. No mask function has this name, so transformers makes no mask."""

LENGTH_STEP = 16
"""Attended lengths are rounded up to a multiple of this, so that shapes repeat from step to step."""

_NOT_SUPPORTED = ("softcap", "s_aux", "position_bias")


class SlotCache:
    """Keys and values of all slots: per layer two tensors ``[S, G, max_len, D]``, made when a layer first runs.

    With a ``memory`` they lie where other processes can write into them.
    """

    _numbers = count()
    _by_number: ClassVar[WeakValueDictionary[int, SlotCache]] = WeakValueDictionary()

    def __init__(self, slots: int, max_len: int, memory: CacheMemory | None = None) -> None:
        self.memory = memory
        self.slots = slots
        self.max_len = max_len
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.step: Step | None = None
        """The step that is being computed."""
        self._positions: Tensor | None = None
        self.number = next(SlotCache._numbers)
        """Names this cache where only plain values can pass, as in a traced model."""
        SlotCache._by_number[self.number] = self

    @classmethod
    def numbered(cls, number: int) -> SlotCache:
        return cls._by_number[number]

    def round_up(self, length: int) -> int:
        """How many positions to attend over for ``length`` of them."""
        return min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.max_len)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """int64 [L]: 0, 1, 2, ..."""
        if self._positions is None:
            self._positions = torch.arange(self.max_len, device=device)
        return self._positions[:length]

    def layer(self, index: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self.layers:
            self.layers[index] = (self._empty(key_1GTD), self._empty(value_1GTD))
        return self.layers[index]

    @torch.inference_mode()
    def clear(self, slots: list[int]) -> None:
        """Zero the slots, so that not-a-number values cannot reach their next users through masked positions."""
        for keys, values in self.layers.values():
            keys[slots] = 0
            values[slots] = 0

    @torch.inference_mode()
    def copy(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` positions of slot ``source`` to ``slot``."""
        for pair in self.layers.values():
            for tensor in pair:
                tensor[slot, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def swap(self, low: IntArray, high: IntArray, length: int) -> None:
        """Exchange the first ``length`` positions of slots ``low[i]`` and ``high[i]``."""
        device = next(iter(self.layers.values()))[0].device
        to = to_device(np.concatenate([low, high]), device)
        source = to_device(np.concatenate([high, low]), device)
        for pair in self.layers.values():
            for tensor in pair:
                used = tensor[:, :, :length]
                used.index_copy_(0, to, used.index_select(0, source))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)

    def _empty(self, like_1GTD: Tensor) -> Tensor:
        _, heads, _, size = like_1GTD.shape
        shape = (self.slots, heads, self.max_len, size)
        return like_1GTD.new_zeros(shape) if self.memory is None else self.memory.zeros(shape, like_1GTD.dtype)


class Step(Protocol):
    """What the attention of each layer does in one step."""

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, scaling: float | None
    ) -> Tensor:
        """Store the step's keys and values, then attend; returns ``[1, T, H, D]``."""
        ...


class DecodeStep:
    """T decoding rows, one query each, over the slots from 0 to the last of theirs. Tensor operations only."""

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        slots_T: Tensor,
        positions_T: Tensor,
        last_N: Tensor,
        seen_L: Tensor,
    ) -> None:
        self.layers, self.slots_T, self.positions_T = layers, slots_T, positions_T
        self.mask_N11L = visible(seen_L, last_N, layers[0][0].dtype)[:, None, None]

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, scaling: float | None
    ) -> Tensor:
        keys, values = self.layers[layer]
        keys[self.slots_T, :, self.positions_T] = key_1GTD[0].transpose(0, 1)
        values[self.slots_T, :, self.positions_T] = value_1GTD[0].transpose(0, 1)
        query_THD = query_1HTD[0].transpose(0, 1)
        return decode_attention(query_THD, keys, values, self.slots_T, self.mask_N11L, scaling)[None]


def decode_attention(
    query_THD: Tensor, keys_SGLD: Tensor, values_SGLD: Tensor, slots_T: Tensor, mask_N11L: Tensor, scaling: float | None
) -> Tensor:
    """Attend with one query in each of ``slots_T``, over the first N slots and L positions; returns ``[T, H, D]``."""
    count, heads, size = query_THD.shape
    span, length = mask_N11L.shape[0], mask_N11L.shape[3]
    query_TGRD = query_THD.reshape(count, keys_SGLD.shape[1], -1, size)
    spread_NGRD = query_TGRD.new_zeros(span, query_TGRD.shape[1], query_TGRD.shape[2], size)
    spread_NGRD.index_copy_(0, slots_T, query_TGRD)
    keys, values = keys_SGLD[:span, :, :length], values_SGLD[:span, :, :length]
    out_NGRD = scaled_dot_product_attention(spread_NGRD, keys, values, attn_mask=mask_N11L, scale=scaling)
    return out_NGRD.index_select(0, slots_T).reshape(count, heads, -1)


def last_positions(plan: StepPlan) -> IntArray:
    """int64 [N]: the last position that each slot's decoding row sees; 0 in slots without one."""
    slots = plan.slots[: plan.decodes]
    last_N = np.zeros(slots[-1] + 1, np.int64)
    last_N[slots] = plan.positions[: plan.decodes]
    return last_N


def visible(positions_L: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 up to and including position ``last``, minus infinity after it; adds a dimension L."""
    zero = torch.zeros((), dtype=dtype, device=last.device)
    return torch.where(positions_L <= last[..., None], zero, -torch.inf)


class _Prefill:
    """N chunks of at most Q tokens, padded to Q for attention only; the R query heads of a KV head are stacked."""

    def __init__(self, cache: SlotCache, chunks: tuple[Chunk, ...], device: torch.device, dtype: torch.dtype) -> None:
        lengths = np.array([chunk.length for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        self.first = chunks[0].row
        self.count, self.longest = len(chunks), int(lengths.max())
        self.tokens = int(lengths.sum())
        self.length = cache.round_up(int((starts + lengths).max()))
        self.slots = to_device(np.array([chunk.slot for chunk in chunks]), device)
        columns = np.arange(self.longest)
        padded = None if self.tokens == self.count * self.longest else np.flatnonzero(columns < lengths[:, None])
        self.padded = None if padded is None else to_device(padded, device)
        last_NQ = starts[:, None] + np.minimum(columns, lengths[:, None] - 1)
        seen_L = cache.positions(self.length, device)
        self.mask_N1QL = visible(seen_L, to_device(last_NQ, device), dtype)[:, None]

    def attend(self, query_THD: Tensor, keys_SGLD: Tensor, values_SGLD: Tensor, scaling: float | None) -> Tensor:
        _, heads, size = query_THD.shape
        groups = keys_SGLD.shape[1]
        if self.padded is not None:
            spread = query_THD.new_zeros(self.count * self.longest, heads, size)
            query_THD = spread.index_copy_(0, self.padded, query_THD)
        query = query_THD.view(self.count, self.longest, groups, -1, size).permute(0, 2, 3, 1, 4)
        repeats = query.shape[2]
        query = query.reshape(self.count, groups, repeats * self.longest, size)
        keys, values = (kv[:, :, : self.length].index_select(0, self.slots) for kv in (keys_SGLD, values_SGLD))
        mask = self.mask_N1QL if repeats == 1 else self.mask_N1QL.repeat(1, 1, repeats, 1)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        out = out.view(self.count, groups, repeats, self.longest, -1).permute(0, 3, 1, 2, 4)
        out = out.reshape(self.count * self.longest, heads, -1)
        return out if self.padded is None else out.index_select(0, self.padded)


class MixedStep:
    """Decoding rows first, then prefill chunks."""

    def __init__(self, cache: SlotCache, plan: StepPlan, device: torch.device, dtype: torch.dtype) -> None:
        self.cache = cache
        self.decodes = plan.decodes
        self.slots_T = to_device(plan.slots, device)
        self.positions_T = to_device(plan.positions, device)
        self.mask_N11L = None
        if plan.decodes:
            last_N = last_positions(plan)
            seen_L = cache.positions(cache.round_up(int(last_N.max()) + 1), device)
            self.mask_N11L = visible(seen_L, to_device(last_N, device), dtype)[:, None, None]
        self.prefills = [_Prefill(cache, group, device, dtype) for group in plan.chunks]

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, scaling: float | None
    ) -> Tensor:
        keys, values = self.cache.layer(layer, key_1GTD, value_1GTD)
        keys[self.slots_T, :, self.positions_T] = key_1GTD[0].transpose(0, 1)
        values[self.slots_T, :, self.positions_T] = value_1GTD[0].transpose(0, 1)
        query_THD = query_1HTD[0].transpose(0, 1)
        parts = []
        if self.mask_N11L is not None:
            decoding, slots = query_THD[: self.decodes], self.slots_T[: self.decodes]
            parts.append(decode_attention(decoding, keys, values, slots, self.mask_N11L, scaling))
        for group in self.prefills:
            rows = query_THD[group.first : group.first + group.tokens]
            parts.append(group.attend(rows.contiguous(), keys, values, scaling))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


class NumberedStep:
    """The current step of the cache with a certain number, as one operation that a trace can hold."""

    def __init__(self, cache: SlotCache) -> None:
        self._number = cache.number

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, scaling: float | None
    ) -> Tensor:
        out: Tensor = torch.ops.millrace.slot_attention(self._number, layer, query_1HTD, key_1GTD, value_1GTD, scaling)
        return out


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    slot_step: Step,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer; ``slot_step`` is a keyword argument of the model.

    Raises ValueError where a layer asks for what is not implemented here (soft caps, sinks, biases).
    """
    for name in _NOT_SUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} needs attention with `{name}`, which the torch engine lacks")
    return slot_step.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


def _attend(
    slot_cache: int, layer: int, query_1HTD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, scaling: float | None
) -> Tensor:
    step = SlotCache.numbered(slot_cache).step
    assert step is not None, "attention outside of a step"
    return step.attend(layer, query_1HTD, key_1GTD, value_1GTD, scaling)


_LIBRARY = torch.library.Library("millrace", "DEF")
_LIBRARY.define(
    "slot_attention(int slot_cache, int layer, Tensor query, Tensor key, Tensor value, float? scaling) -> Tensor"
)
_LIBRARY.impl("slot_attention", _attend, "CompositeExplicitAutograd")


def register() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, slot_attention)


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
