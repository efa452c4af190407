"""A checkpoint's weights as a Hugging Face directory, without what only training needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learner.backends.checkpoint_files import OPTIMIZER_DIRECTORY, WEIGHTS_INDEX
from learner.checkpoint import STATE_FILE, read_checkpoint
from learner.errors import CheckpointError


def export_checkpoint(checkpoint: Path, directory: Path, dtype: str = "float32", *, overwrite: bool = False) -> int:
    """Write ``directory``, one file of weights in memory at a time; returns the bytes of the weights.

    Raises CheckpointError for a damaged checkpoint, and if ``directory`` is there (without ``overwrite``) or cannot be written.
    """
    read_checkpoint(checkpoint)
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{directory} is there already: give another directory, or --overwrite")
    if directory.exists() and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json, so it is no export: it is not replaced")
    if directory.resolve() == checkpoint.resolve():
        raise CheckpointError(f"{directory} is the checkpoint itself: give another directory")
    temporary = directory.with_name(directory.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        nbytes = _write(checkpoint, temporary, getattr(torch, dtype))
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot export to {directory}: {error}") from error
    return nbytes


def _write(checkpoint: Path, target: Path, dtype: torch.dtype) -> int:
    nbytes = 0
    for source in sorted(checkpoint.iterdir()):
        if source.suffix == ".safetensors":
            tensors = _converted(source, dtype)
            nbytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            save_file(tensors, target / source.name, metadata={"format": "pt"})
        elif source.name == WEIGHTS_INDEX:
            continue
        elif source.name == "config.json":
            config: dict[str, Any] = json.loads(source.read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            (target / source.name).write_text(json.dumps(config, indent=2) + "\n")
        elif source.name not in (STATE_FILE, OPTIMIZER_DIRECTORY):
            shutil.copyfile(source, target / source.name)
    index = checkpoint / WEIGHTS_INDEX
    if index.exists():
        content = json.loads(index.read_text())
        (target / WEIGHTS_INDEX).write_text(
            json.dumps({**content, "metadata": {"total_size": nbytes}}, indent=2) + "\n"
        )
    return nbytes


def _converted(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
