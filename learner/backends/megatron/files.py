"""Hugging Face directories: tensors read one at a time, written in files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.backends.megatron.slots import parts_of_fused
from learner.backends.model import check_attention
from learner.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 4 << 30
"""A file of weights is closed once it holds so many."""


def read_config(path: str | Path) -> Any:
    """The configuration of a Hugging Face directory. Raises ModelError if there is none or it cannot be read."""
    from transformers import AutoConfig

    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"model.path={path}: no such directory; give a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path={path} holds no config.json; give a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path={path} cannot be loaded: {error}") from error
    check_attention(config)
    return config


class WeightFiles:
    """The tensors of a directory, read when asked for. Raises ModelError for what is missing or damaged. Close it after use."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for name in self._file_names():
                opened = self._open.enter_context(safe_open(self._path / name, framework="pt"))
                self._files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError, ValueError) as error:
            self._open.close()
            raise ModelError(f"model.path={path} cannot be loaded: {error}") from error

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str) -> Tensor:
        """Of an expert also where all experts of a layer are one tensor."""
        found = self._read(name)
        if found is None:
            parts = parts_of_fused(name)
            whole = self._read(parts.name) if parts is not None else None
            found = parts.take(whole) if parts is not None and whole is not None else None
        if found is None:
            raise ModelError(
                f"model.path={self._path}: its weights lack {name}, which its config.json describes: config.json and weights "
                "belong to different models"
            )
        return found

    def _read(self, name: str) -> Tensor | None:
        return self._files[name].get_tensor(name) if name in self._files else None

    def _file_names(self) -> list[str]:
        if (self._path / INDEX).is_file():
            weights: dict[str, str] = json.loads((self._path / INDEX).read_text())["weight_map"]
            return sorted(set(weights.values()))
        if (self._path / WEIGHTS).is_file():
            return [WEIGHTS]
        raise ModelError(
            f"model.path={self._path} holds no weights in safetensors files, which learner.backend=megatron reads"
        )


def write_weights(
    directory: Path, named: Iterable[tuple[str, Tensor]], *, keep: bool, file_bytes: int = FILE_BYTES
) -> None:
    """Write tensors as they come. Ranks that do not ``keep`` only help to gather them."""
    held: dict[str, Tensor] = {}
    written: list[list[str]] = []
    total = size = 0

    def close() -> None:
        save_file(held, directory / _numbered(len(written)), metadata={"format": "pt"})
        written.append(list(held))
        held.clear()

    for name, tensor in named:
        if not keep:
            continue
        if held and size + tensor.nbytes > file_bytes:
            close()
            size = 0
        held[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if keep:
        close()
        _name_files(directory, written, total)


def _name_files(directory: Path, written: list[list[str]], total: int) -> None:
    """Give the files the names that go with their number, and write the index if there are several."""
    if len(written) == 1:
        (directory / _numbered(0)).rename(directory / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(written):
        final = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (directory / _numbered(number)).rename(directory / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _numbered(number: int) -> str:
    return f".weights-{number:05d}.safetensors"
