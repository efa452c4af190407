"""The versions of the weights that an engine holds: one served, one being staged, and those that are pinned.

A version is a set of tensors by the model's parameter names (tied ones once); they arrive by the names of Hugging Face's
files. Switching moves no bytes: the model's parameters are pointed at another set. A pinned version is therefore free until
the next stage, which then fills new tensors instead of re-using the old ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weight_sync.file_names import FileNames

Tensors = dict[str, Tensor]


class WeightError(ValueError):
    """A weight update that does not fit: unknown or missing names, wrong shapes, a version that is not there."""


class WeightStore:
    """Owns the parameter storage of ``model``. All methods run between two forward passes."""

    def __init__(self, model: nn.Module, version: int) -> None:
        self.version = version
        """The version now served."""
        self._parameters = dict(model.named_parameters())
        self._name_of = _canonical_names(model)
        self._names = FileNames.of(str(getattr(getattr(model, "config", None), "model_type", "")))
        self._places: Tensors = {}
        """Of the shadow copy, by the names under which tensors arrive."""
        self._served: Tensors = {name: parameter.data for name, parameter in self._parameters.items()}
        self._active = self._served
        self._spare: Tensors | None = None
        self._shadow: Tensors = {}
        self._shadow_version: int | None = None
        self._missing: set[str] = set()
        self._pinned: dict[int, Tensors] = {}

    @property
    def pinned(self) -> frozenset[int]:
        return frozenset(self._pinned)

    @property
    def staged(self) -> int | None:
        """The version that is completely staged and may be committed."""
        return None if self._missing else self._shadow_version

    def nbytes(self) -> int:
        """Size of one version."""
        return sum(tensor.nbytes for tensor in self._served.values())

    def stage_begin(self, version: int) -> None:
        """Begin to fill the shadow copy; an unfinished earlier stage is forgotten."""
        if self._spare is None:
            self._spare = {name: torch.empty_like(tensor) for name, tensor in self._served.items()}
        self._shadow, self._shadow_version = self._spare, version
        self._places = {
            part: place for name, whole in self._shadow.items() for part, place in self._names.split(name, whole)
        }
        self._missing = set(self._places)

    def stage_tensor(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor (any dtype, any device) into the shadow copy."""
        if self._shadow_version is None:
            raise WeightError(f"stage_tensor({name!r}) before stage_begin")
        canonical = self._name_of.get(name, name)
        target = self._places.get(canonical)
        if target is None:
            raise WeightError(f"version {self._shadow_version}: the model has no parameter {name!r}")
        if target.shape != tensor.shape:
            raise WeightError(
                f"version {self._shadow_version}: {name!r} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)
        self._missing.discard(canonical)

    def stage_end(self) -> None:
        """Check that every parameter has arrived."""
        if self._shadow_version is None:
            raise WeightError("stage_end before stage_begin")
        if self._missing:
            names = ", ".join(sorted(self._missing)[:5])
            raise WeightError(f"version {self._shadow_version}: {len(self._missing)} parameters missing: {names}")

    def commit(self, version: int) -> None:
        """Serve the staged version."""
        if self.staged != version:
            staged = "none is" if self.staged is None else f"version {self.staged} is"
            raise WeightError(f"cannot commit version {version}: {staged} staged")
        still_pinned = any(tensors is self._served for tensors in self._pinned.values())
        self._spare = None if still_pinned else self._served
        self._served, self.version = self._shadow, version
        self._shadow, self._places, self._shadow_version = {}, {}, None
        self.activate(None)

    def pin(self, version: int) -> None:
        """Keep the served version, which must be ``version``, until it is unpinned."""
        if version in self._pinned:
            return
        if version != self.version:
            raise WeightError(f"cannot pin version {version}: the engine serves version {self.version}")
        self._pinned[version] = self._served

    def unpin(self, version: int) -> None:
        """Forget a pinned version; unknown ones are ignored."""
        self._pinned.pop(version, None)

    def activate(self, version: int | None) -> None:
        """Point the model's parameters at a pinned version, or (None) at the served one."""
        wanted = self._served if version is None else self._pinned[version]
        if wanted is self._active:
            return
        for name, parameter in self._parameters.items():
            parameter.data = wanted[name]
        self._active = wanted


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of each parameter, mapped to the first one (tied parameters have several)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names
