"""Which Megatron-Core parameter of which stage holds which Hugging Face tensors. Names only: pure, the same on every rank.

Tensors of experts go by their names in files (``mlp.experts.7.up_proj.weight``); `fused` and `unfused` translate them to those
of the loaded model, where one tensor holds all experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.backends.megatron.architecture import Architecture
from learner.backends.megatron.layouts import Copied, Divided, Interleaved, Layout, PaddedRows, Stacked
from learner.backends.megatron.settings import Sizes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Slot:
    """One Megatron-Core parameter."""

    names: tuple[str, ...]
    """Of the Hugging Face tensors in it, in the order that ``layout`` wants."""
    shapes: tuple[tuple[int, ...], ...]
    local: str
    """Its name in the module of its stage, on the ranks that have it."""
    layout: Layout
    stage: int
    expert_rank: int | None = None
    """The expert-parallel rank that has it; None: all of them."""
    copy: bool = False
    """A second copy of tensors that another stage has, too (tied embeddings): loaded, never published."""


def make_slots(model: Architecture, sizes: Sizes) -> list[Slot]:
    """All parameters of the model, in the order of its Hugging Face tensors."""
    last = sizes.pipeline - 1
    table, rows = ((model.vocabulary, model.hidden),), PaddedRows(model.vocabulary)
    slots = [Slot((EMBEDDING,), table, "embedding.word_embeddings.weight", rows, 0)]
    each = model.layers // sizes.pipeline
    for layer in range(model.layers):
        stage, local = divmod(layer, each)
        slots += _layer_slots(model, sizes, layer, local, stage)
    slots.append(Slot(("model.norm.weight",), ((model.hidden,),), "decoder.final_layernorm.weight", Copied(), last))
    if not model.tied:
        slots.append(Slot((HEAD,), table, "output_layer.weight", rows, last))
    elif last > 0:
        slots.append(Slot((EMBEDDING,), table, "output_layer.weight", rows, last, copy=True))
    return slots


def _layer_slots(model: Architecture, sizes: Sizes, layer: int, local: int, stage: int) -> Iterator[Slot]:
    theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."

    def slot(name: str, shape: tuple[int, ...], place: str, layout: Layout) -> Slot:
        return Slot((theirs + name,), (shape,), ours + place, layout, stage)

    hidden, width = model.hidden, model.head_width
    rows = (model.heads * width, model.kv_heads * width, model.kv_heads * width)
    mixed = Interleaved(model.heads, model.kv_heads, width)
    kinds: dict[str, tuple[int, ...]] = {"weight": (hidden,), "bias": ()} if model.qkv_bias else {"weight": (hidden,)}
    for kind, columns in kinds.items():
        shapes = tuple((count, *columns) for count in rows)
        names = tuple(f"{theirs}self_attn.{which}_proj.{kind}" for which in "qkv")
        yield Slot(names, shapes, f"{ours}self_attention.linear_qkv.{kind}", mixed, stage)
    yield slot("self_attn.o_proj.weight", (hidden, rows[0]), "self_attention.linear_proj.weight", Divided(1))
    if model.qk_norm:
        for which in "qk":
            yield slot(f"self_attn.{which}_norm.weight", (width,), f"self_attention.{which}_layernorm.weight", Copied())
    if model.experts:
        yield from _expert_slots(model, sizes, layer, local, stage)
        yield slot("mlp.gate.weight", (model.experts, hidden), "mlp.router.weight", Copied())
    else:
        yield _gated(f"{theirs}mlp.", f"{ours}mlp.", model, stage, Stacked())
        yield slot("mlp.down_proj.weight", (hidden, model.feed_forward), "mlp.linear_fc2.weight", Divided(1))
    yield slot("input_layernorm.weight", (hidden,), "input_layernorm.weight", Copied())
    yield slot("post_attention_layernorm.weight", (hidden,), "pre_mlp_layernorm.weight", Copied())


def _expert_slots(model: Architecture, sizes: Sizes, layer: int, local: int, stage: int) -> Iterator[Slot]:
    """Experts are whole: they are divided over expert-parallel ranks, not cut by tensor parallelism."""
    each = model.experts // sizes.expert
    for expert in range(model.experts):
        rank, index = divmod(expert, each)
        theirs = f"model.layers.{layer}.mlp.experts.{expert}."
        ours = f"decoder.layers.{local}.mlp.experts.local_experts.{index}."
        yield _gated(theirs, ours, model, stage, Stacked(divided=False), rank)
        down = ((model.hidden, model.feed_forward),)
        yield Slot((theirs + "down_proj.weight",), down, ours + "linear_fc2.weight", Copied(), stage, rank)


def _gated(
    theirs: str, ours: str, model: Architecture, stage: int, layout: Layout, expert_rank: int | None = None
) -> Slot:
    names = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    shape = (model.feed_forward, model.hidden)
    return Slot(names, (shape, shape), ours + "linear_fc1.weight", layout, stage, expert_rank)


def fused(named: Iterable[tuple[str, Tensor]], experts: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, those of a layer's ``experts`` put into one, as the loaded model has them. Others pass as they come."""
    waiting: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in named:
        match = _EXPERT.match(name)
        if match is None:
            yield name, tensor
            continue
        prefix, expert, kind = match[1], int(match[2]), match[3]
        held = waiting.setdefault(prefix, {})
        held[expert, kind] = tensor
        if len(held) == 3 * experts:
            del waiting[prefix]
            gates = [torch.cat([held[index, "gate"], held[index, "up"]]) for index in range(experts)]
            yield f"{prefix}.gate_up_proj", torch.stack(gates)
            yield f"{prefix}.down_proj", torch.stack([held[index, "down"] for index in range(experts)])


def fused_names(slots: Iterable[Slot]) -> list[str]:
    """The names that `fused` gives for these slots, in its order."""
    found: dict[str, None] = {}
    for name in (name for slot in slots if not slot.copy for name in slot.names):
        match = _EXPERT.match(name)
        names = [name] if match is None else [f"{match[1]}.gate_up_proj", f"{match[1]}.down_proj"]
        found |= dict.fromkeys(names)
    return list(found)


@dataclass(frozen=True)
class FusedPart:
    """Where a tensor of one expert lies in the tensor ``name`` of all experts of its layer."""

    name: str
    expert: int
    half: int | None
    """Of the gate and up projections, which are one above the other."""

    def take(self, whole: Tensor) -> Tensor:
        mine = whole[self.expert]
        return mine if self.half is None else mine.chunk(2, 0)[self.half]


def parts_of_fused(name: str) -> FusedPart | None:
    """None for a tensor that is no expert's."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    prefix, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return FusedPart(f"{prefix}.down_proj", expert, None)
    return FusedPart(f"{prefix}.gate_up_proj", expert, 0 if kind == "gate" else 1)


def unfused(state: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Looks tensors up by the names of files where ``state`` has those of the loaded model. Raises KeyError."""

    def find(name: str) -> Tensor:
        part = parts_of_fused(name)
        return state[name] if part is None else part.take(state[part.name])

    return find
