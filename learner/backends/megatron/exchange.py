"""Tensors between the shards of the ranks and their Hugging Face form, one parameter at a time: no rank ever holds them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from learner.backends.megatron.parallel import Ranks
from learner.backends.megatron.slots import Slot

Read = Callable[[str], Tensor]
"""A whole tensor by its Hugging Face name (experts by those of files)."""


class Exchange:
    """``stage`` is this rank's `GPTModel`."""

    def __init__(self, slots: list[Slot], stage: Any, ranks: Ranks) -> None:
        self._ranks = ranks
        self._parameters: dict[str, torch.nn.Parameter] = dict(stage.named_parameters())
        self.slots = slots
        local = [slot.local for slot in slots if self._has(slot)]
        missing = sorted(self._parameters.keys() ^ set(local))
        if missing:
            raise RuntimeError(
                f"parameters without a place in the model's files, or the other way round: {missing[:4]}"
            )
        for slot, parameter in self.local():
            # Norms of gradients count every element once: copies of another tensor-parallel rank's are left out by this mark.
            parameter.tensor_model_parallel = slot.layout.divided or slot.expert_rank is not None  # type: ignore[attr-defined]

    def local(self) -> Iterator[tuple[Slot, torch.nn.Parameter]]:
        """The parameters of this rank, the second copies included."""
        for slot in self.slots:
            if self._has(slot):
                yield slot, self._parameters[slot.local]

    def scatter(self, slot: Slot, read: Read) -> Tensor:
        """This rank's part of what ``read`` has. Raises ValueError where a tensor has another shape."""
        whole = [read(name) for name in slot.names]
        for name, tensor, shape in zip(slot.names, whole, slot.shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and the model's is {shape}")
        return slot.layout.cut(whole, self._ranks.tensor, self._ranks.sizes.tensor)

    def gather(self, take: Callable[[torch.nn.Parameter], Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, whole, on every rank: what ``take`` gives of each parameter.

        A collective: all ranks must iterate to the end, and nothing else may be called between.
        """
        ranks = self._ranks
        for slot in self.slots:
            if slot.copy:
                continue
            whole: list[Tensor] | None = None
            if self._has(slot):
                mine = take(self._parameters[slot.local]).to(dtype)
                whole = slot.layout.join(ranks.gathered(mine) if slot.layout.divided else [mine])
            yield from zip(slot.names, self._shared(slot, whole, dtype), strict=True)

    def _has(self, slot: Slot) -> bool:
        mine = slot.expert_rank is None or slot.expert_rank == self._ranks.expert
        return mine and slot.stage == self._ranks.stage

    def _shared(self, slot: Slot, whole: list[Tensor] | None, dtype: torch.dtype) -> Iterator[Tensor]:
        """``whole`` of the ranks that have it, on all."""
        ranks = self._ranks
        device = next(iter(self._parameters.values())).device
        for index, shape in enumerate(slot.shapes):
            tensor = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole[index].contiguous()
            if slot.expert_rank is not None and slot.stage == ranks.stage:
                tensor = ranks.from_expert_rank(tensor, slot.expert_rank)
            yield ranks.from_stage(tensor, slot.stage)
