"""The weights of a model directory, tensor by tensor, as its safetensors files hold them."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weight_sync.errors import WeightTransferError

if TYPE_CHECKING:
    import torch

Specs = dict[str, tuple[tuple[int, ...], str]]

POINTER = "base_model.json"
"""In a directory whose weights have an adapter merged in: ``{"base_model": DIRECTORY}``, where the weights without it are."""

NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of names that older files hold and no model has as a parameter."""

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Names of dtypes in safetensors files, and torch's."""


@dataclass(frozen=True)
class _File:
    path: Path
    opened: Any


class BaseWeights:
    """Opened when first asked. Tensors are mapped from files that stay open: what is read stays the same from then on,
    whatever becomes of the directory. Raises WeightTransferError for files that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._named = directory
        self._specs: Specs | None = None
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()

    @cached_property
    def directory(self) -> Path:
        """Where the files are."""
        return base_directory(self._named)

    @property
    def specs(self) -> Specs:
        """Shape and dtype of every tensor, by name; none for a directory without safetensors files."""
        with self._lock:
            if self._specs is None:
                folder, found = self.directory, Specs()
                # A directory may hold the same weights a second time, in one file and under other names.
                for file in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
                    found |= self._open(file)
                self._specs = found
            return self._specs

    def _open(self, file: Path) -> Specs:
        from safetensors import SafetensorError, safe_open

        specs: Specs = {}
        try:
            opened: Any = safe_open(str(file), framework="pt").__enter__()
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                if not name.endswith(NOT_WEIGHTS):
                    stored = opened.get_slice(name)
                    specs[name] = (tuple(stored.get_shape()), DTYPES[stored.get_dtype()])
                    self._files[name] = _File(file, opened)
        except (OSError, SafetensorError, KeyError) as error:
            raise WeightTransferError(f"{file} is no readable safetensors file: {error}") from error
        return specs

    def files(self) -> dict[str, list[str]]:
        """The names of the tensors in each file, by the name of the file."""
        names: dict[str, list[str]] = {}
        for name in self.specs:
            names.setdefault(self._files[name].path.name, []).append(name)
        return names

    @property
    def in_blocks(self) -> bool:
        """Whether the model's matrices are in blocks of 8 bits, with a scale for each."""
        return any(name.endswith("_scale_inv") for name in self.specs)

    def tensor(self, name: str) -> torch.Tensor:
        """As the file has it. Raises WeightTransferError if there is none of that name."""
        if name not in self.specs:
            raise WeightTransferError(f"{self.directory} has no tensor {name}")
        with self._lock:
            found: torch.Tensor = self._files[name].opened.get_tensor(name)
        return found


def base_directory(directory: str | Path) -> Path:
    """Where the weights of a model without its adapter are: the directory itself, or the one that it names.

    Raises WeightTransferError if what it names cannot be read.
    """
    folder = Path(directory)
    file = folder / POINTER
    if not file.is_file():
        return folder
    try:
        return Path(json.loads(file.read_text())["base_model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightTransferError(f"{file} does not name a model directory: {error}") from error
