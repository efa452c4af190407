"""Low-rank adapters on the wire, and what an engine makes of them (LoRA, Hu et al. 2021, arXiv:2106.09685).

A version of an adapter is nothing but the pairs A [rank, in] and B [out, rank], under the names that peft gives them. B is
multiplied with ``alpha / rank`` before it travels, so a served matrix is ``W = W0 + B A`` and the tensors say all there is to
know. Every version is merged into the *pristine* W0, read again from the model's files: no error is carried from version
to version. Engines are handed whole versions, so that nothing beyond the receiver knows of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from weight_sync.base_weights import BaseWeights
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, PlanBuilder, TensorSpec

PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def adapter_names(weight: str) -> tuple[str, str]:
    """The names of A and B of a matrix: ``model.layers.0.mlp.up_proj.weight``, as peft's files have them."""
    module = PREFIX + weight.removesuffix(".weight")
    return module + A_SUFFIX, module + B_SUFFIX


def adapted_weight(name: str) -> str | None:
    """The matrix that a tensor of an adapter changes; None for a tensor that is none of an adapter's."""
    for suffix in (A_SUFFIX, B_SUFFIX):
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix) + ".weight"
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are the tensors of an adapter. Raises WeightTransferError for a mixture."""
    found = [adapted_weight(name) is not None for name in names]
    if any(found) and not all(found):
        raise WeightTransferError("a version holds tensors of an adapter and others: it must be one or the other")
    return any(found)


def merged(base: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``base + high @ low``, computed in float32, in the wider dtype of base and adapter; low is A, high is B (scaled)."""
    dtype = torch.promote_types(base.dtype, low.dtype)
    return torch.addmm(base.float(), high.float(), low.float()).to(dtype)


def merged_manifest(manifest: Manifest, base: BaseWeights | None) -> Manifest:
    """What an engine is handed of an adapter's version: all tensors of the model.

    Raises WeightTransferError if the adapter does not fit the model.
    """
    given = {spec.name: spec for spec in manifest.tensors}
    model = _fitting(manifest.version, given, base)
    plan = PlanBuilder(manifest.version, max(1, manifest.largest_bucket))
    for name, (shape, dtype) in model.specs.items():
        low = given.get(adapter_names(name)[0])
        plan.add(name, shape, dtype if low is None else _wider(dtype, low.dtype))
    return plan.manifest()


class Merging:
    """Takes the tensors of one version of an adapter, in any order, and hands whole weights on to ``on_tensor``.

    Raises WeightTransferError if the adapter does not fit the model.
    """

    def __init__(self, manifest: Manifest, base: BaseWeights | None, on_tensor: Callable[[str, torch.Tensor], None]):
        self._version, self._on_tensor = manifest.version, on_tensor
        self._base = _fitting(manifest.version, {spec.name: spec for spec in manifest.tensors}, base)
        self._waiting: dict[str, torch.Tensor] = {}
        self._done: set[str] = set()

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """One half of a pair; the other half completes it."""
        weight = adapted_weight(name)
        if weight is None:
            raise WeightTransferError(f"version {self._version}: {name} is no tensor of an adapter")
        other = self._waiting.pop(weight, None)
        if other is None:
            self._waiting[weight] = tensor.detach().clone()
            return
        low, high = (other, tensor) if name.endswith(B_SUFFIX) else (tensor, other)
        self._on_tensor(weight, merged(self._base.tensor(weight).to(low.device), low, high))
        self._done.add(weight)

    def finish(self) -> None:
        """All that the adapter does not change follows, as it is in the files."""
        if self._waiting:
            raise WeightTransferError(f"version {self._version}: one half of {sorted(self._waiting)[0]} did not arrive")
        for name in self._base.specs:
            if name not in self._done:
                self._on_tensor(name, self._base.tensor(name))


def _fitting(version: int, given: Mapping[str, TensorSpec], base: BaseWeights | None) -> BaseWeights:
    if base is None or not base.specs:
        raise WeightTransferError(
            f"version {version} is an adapter: it is merged into the weights of the engine's model directory, which must hold "
            "them as safetensors"
        )
    if base.in_blocks:
        raise WeightTransferError(
            f"version {version} is an adapter, and {base.directory} holds 8-bit weights: an adapter needs plain ones"
        )
    for name in given:
        weight = adapted_weight(name) or name
        pair = [given.get(half) for half in adapter_names(weight)]
        if weight not in base.specs:
            raise WeightTransferError(f"version {version}: {base.directory} has no {weight} for {name}")
        if pair[0] is None or pair[1] is None:
            raise WeightTransferError(f"version {version}: the adapter has only one half of {weight}")
        low, high, shape = pair[0].shape, pair[1].shape, base.specs[weight][0]
        if len(low) != 2 or len(high) != 2 or low[0] != high[1] or (high[0], low[1]) != shape:
            raise WeightTransferError(
                f"version {version}: {weight} has shape {shape}, its adapter B {tuple(high)} times A {tuple(low)}"
            )
    return base


def _wider(first: str, second: str) -> str:
    return str(torch.promote_types(getattr(torch, first), getattr(torch, second))).removeprefix("torch.")
