"""In which dtype weights travel: as they are, in another float dtype, or in 8 bits with a scale for every block.

``fp8_block``: the matrices of linear layers as float8_e4m3fn, in blocks of 128 x 128 whose largest value becomes 448, the
largest that the dtype has. ``NAME_scale_inv`` (float32, one a block) is what a block is multiplied with to get its values back:
the names and the meaning of DeepSeek-V3's checkpoints (arXiv:2412.19437, section 3.3.2), which engines load as they are.
Everything else travels in bfloat16. What engines cannot take is turned back on arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from weight_sync.plan import Manifest, PlanBuilder, TensorSpec
from weight_sync.tensors import NamedTensors, each_once

FP8_BLOCK = "fp8_block"

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_NAME = "float8_e4m3fn"
FP8_MAX = 448.0
SCALE = "_scale_inv"
LINEAR = "_proj.weight"
"""Ending of the names of matrices that take 8 bits; embeddings, output heads, routers and norms do not."""


def on_the_wire(named: NamedTensors, dtype: str) -> NamedTensors:
    """The tensors in the dtype ``weights.dtype``; tied ones once."""
    if dtype == "auto":
        return named
    if dtype == FP8_BLOCK:
        return _in_blocks(each_once(named))
    wanted = getattr(torch, dtype)
    return ((name, t.to(wanted) if t.is_floating_point() else t) for name, t in each_once(named))


def _in_blocks(named: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named:
        if name.endswith(LINEAR) and tensor.ndim == 2:
            values, scale = quantise(tensor)
            yield name + SCALE, scale  # ahead of what needs it
            yield name, values
        else:
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [m, n] and float32 [ceil(m / 128), ceil(n / 128)]: values and what to multiply each block with.

    The error of an element w in a block of scale s is at most ``max(|w| / 16, s / 1024)``: half a unit in the last of three
    mantissa bits, or half the smallest number that the dtype has.
    """
    rows, columns = matrix.shape
    blocks = _blocks(matrix.float())
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.reshape(blocks.shape[0] * BLOCK, -1)[:rows, :columns].contiguous().to(FP8), scale


def dequantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The inverse of `quantise`, [m, n] in ``dtype``."""
    rows, columns = values.shape
    blocks = _blocks(values.float()) * scale[:, None, :, None]
    return blocks.reshape(blocks.shape[0] * BLOCK, -1)[:rows, :columns].to(dtype)


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[a, 128, b, 128], filled up with zeros."""
    rows, columns = matrix.shape
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    filled = torch.nn.functional.pad(matrix, padding)
    return filled.view(filled.shape[0] // BLOCK, BLOCK, filled.shape[1] // BLOCK, BLOCK)


def quantised_names(specs: Iterable[TensorSpec]) -> set[str]:
    """Names of the tensors that travel in blocks of 8 bits."""
    known = {spec.name: spec.dtype for spec in specs}
    return {name for name, dtype in known.items() if dtype == FP8_NAME and known.get(name + SCALE) == "float32"}


def plain_manifest(manifest: Manifest) -> Manifest:
    """What arrives of a version at an engine that does not take blocks of 8 bits."""
    quantised = quantised_names(manifest.tensors)
    if not quantised:
        return manifest
    plan = PlanBuilder(manifest.version, max(1, manifest.largest_bucket))
    for spec in manifest.tensors:
        if spec.name not in {name + SCALE for name in quantised}:
            plan.add(spec.name, spec.shape, "bfloat16" if spec.name in quantised else spec.dtype)
    return plan.manifest()


def dequantising(
    manifest: Manifest, on_tensor: Callable[[str, torch.Tensor], None]
) -> Callable[[str, torch.Tensor], None]:
    """``on_tensor`` for an engine that does not take blocks of 8 bits: gets plain values under plain names."""
    quantised = quantised_names(manifest.tensors)
    if not quantised:
        return on_tensor
    scales: dict[str, torch.Tensor] = {}
    early: dict[str, torch.Tensor] = {}

    def take(name: str, tensor: torch.Tensor) -> None:
        owner = name.removesuffix(SCALE)
        if owner not in quantised:
            on_tensor(name, tensor)
        elif name == owner:
            if name in scales:
                on_tensor(name, dequantise(tensor, scales.pop(name)))
            else:
                early[name] = tensor.clone()
        elif owner in early:
            on_tensor(owner, dequantise(early.pop(owner), tensor))
        else:
            scales[owner] = tensor.clone()

    return take
