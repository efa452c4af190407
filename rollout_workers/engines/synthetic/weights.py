"""The weights of the synthetic model: a few kilobytes, so that the real protocol moves, checks and switches something."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]

MODEL_TYPE = "synthetic"
STAMP = "millrace.version"
"""Name of the tensor (float64 [1]) that holds the version which the weights belong to."""


class SyntheticModelError(ValueError):
    """A directory or an update that is not of the synthetic model."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids that the engine may sample: ``first`` to ``size - 1`` (what comes before is special)."""

    first: int
    size: int

    @property
    def logprob(self) -> float:
        """Log-probability of each, all being equally likely."""
        return -math.log(self.size - self.first)

    def sample(self, seed: int, start: int, count: int) -> npt.NDArray[np.int32]:
        """Tokens at positions ``start`` to ``start + count - 1`` of a sequence: a function of seed and position alone."""
        positions = np.arange(start, start + count, dtype=np.uint64) + np.uint64(seed & 0xFFFFFFFF)
        mixed = (positions * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
        return (mixed % np.uint64(self.size - self.first)).astype(np.int32) + np.int32(self.first)


def read_vocabulary(directory: Path) -> Vocabulary:
    """From the ``config.json`` of a model directory. Raises SyntheticModelError when it is not a synthetic model."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("model_type") != MODEL_TYPE:
            raise SyntheticModelError(
                f"{file} describes a model of type {config.get('model_type')!r}; synthetic engines and learners need the "
                "one that model.recipe=synthetic makes (leave model.path null)"
            )
        return Vocabulary(int(config["first_word_id"]), int(config["vocab_size"]))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise SyntheticModelError(f"{file} is not the config.json of a synthetic model: {error}") from error


def read_weights(directory: Path) -> Tensors:
    """The tensors of a model directory, by name. Raises SyntheticModelError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = directory / "model.safetensors"
    try:
        tensors: Tensors = load_file(file)
    except (OSError, SafetensorError, KeyError) as error:
        raise SyntheticModelError(f"{file} cannot be read: {error}") from error
    if STAMP not in tensors:
        raise SyntheticModelError(f"{file} holds no tensor {STAMP!r}; make the model again by model.recipe=synthetic")
    return tensors


class VersionedWeights:
    """Which version an engine serves, stages and keeps pinned; a staged one must be whole and of its version."""

    def __init__(self, tensors: Tensors, version: int) -> None:
        self.version = version
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._staging: Tensors = {}
        self._staging_version: int | None = None
        self._staged: int | None = None
        self.pinned: set[int] = set()
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def begin(self, version: int) -> None:
        """Forget what was staged before."""
        self._staging, self._staging_version, self._staged = {}, version, None

    def take(self, name: str, tensor: npt.NDArray[Any]) -> None:
        """One tensor of the version being staged."""
        if self._shapes.get(name) != tensor.shape:
            raise SyntheticModelError(f"tensor {name!r} {tensor.shape} is not one of the model's: {self._shapes}")
        self._staging[name] = tensor.copy()

    def end(self) -> None:
        """Check that all tensors are there, and that they are those of the version that was announced."""
        version = self._staging_version
        missing = self._shapes.keys() - self._staging.keys()
        if missing:
            raise SyntheticModelError(f"version {version}: tensors missing: {', '.join(sorted(missing))}")
        stamped = int(self._staging[STAMP][0])
        if stamped != version:
            raise SyntheticModelError(f"the weights offered as version {version} are those of version {stamped}")
        self._staged = version

    def commit(self, version: int) -> None:
        if self._staged != version:
            raise SyntheticModelError(f"cannot commit version {version}: staged is {self._staged}")
        self.version, self._staged = version, None

    def pin(self, version: int) -> None:
        if version not in self.pinned and version != self.version:
            raise SyntheticModelError(f"cannot pin version {version}: the engine serves version {self.version}")
        self.pinned.add(version)
