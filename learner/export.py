"""A checkpoint's weights as a Hugging Face directory, without what only training needs.

A checkpoint of an adapter becomes the model with the adapter merged in, or peft's directory of the adapter alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learner.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_scale, adapter_settings, base_of
from learner.backends.checkpoint_files import OPTIMIZER_DIRECTORY, WEIGHTS_INDEX
from learner.checkpoint import STATE_FILE, read_checkpoint
from learner.errors import CheckpointError, ModelError
from weight_sync.adapters import adapter_names, merged
from weight_sync.base_weights import POINTER, BaseWeights
from weight_sync.errors import WeightTransferError


def export_checkpoint(
    checkpoint: Path, directory: Path, dtype: str = "float32", *, overwrite: bool = False, adapter: bool = False
) -> int:
    """Write ``directory``, one file of weights in memory at a time; returns the bytes of the weights.

    ``adapter``: the adapter alone, where the checkpoint has one (else it is merged into its model).
    Raises CheckpointError for a damaged checkpoint, and if ``directory`` is there (without ``overwrite``) or cannot be written.
    """
    read_checkpoint(checkpoint)
    has_adapter = holds_adapter(checkpoint)
    if adapter and not has_adapter:
        raise CheckpointError(f"{checkpoint} holds whole weights and no adapter: export it without --adapter")
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
        if has_adapter and not adapter:
            nbytes = _write_merged(checkpoint, temporary, getattr(torch, dtype))
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except (OSError, SafetensorError, ModelError, WeightTransferError) as error:
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


def export_served(checkpoint: Path, model: Path, directory: Path, dtype: str) -> None:
    """Write what an engine begins with that goes on from the checkpoint of an adapter of ``model``, again if it is there.

    Later versions of the adapter are merged into the weights of ``model``, to which the directory points. Raises CheckpointError.
    """
    export_checkpoint(checkpoint, directory, dtype, overwrite=True)
    try:
        (directory / POINTER).write_text(json.dumps({"base_model": str(model.resolve())}) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {directory / POINTER}: {error}") from error


def holds_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint is of an adapter alone."""
    return (checkpoint / ADAPTER_CONFIG).is_file()


def _write_merged(checkpoint: Path, target: Path, dtype: torch.dtype) -> int:
    """The files of the adapter's model, the adapter merged in, instead of the adapter's."""
    settings = adapter_settings(checkpoint)
    assert settings is not None
    base = BaseWeights(base_of(checkpoint))
    with safe_open(checkpoint / ADAPTER_WEIGHTS, framework="pt") as opened:
        adapter = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    index, nbytes = {}, 0
    for file, names in base.files().items():
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            low, high = (adapter.get(half) for half in adapter_names(name))
            tensor = base.tensor(name)
            if low is not None and high is not None:
                tensor = merged(tensor, low, high * adapter_scale(settings))
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            index[name] = file
            nbytes += tensors[name].nbytes
        save_file(tensors, target / file, metadata={"format": "pt"})
    (target / ADAPTER_CONFIG).unlink()
    (target / ADAPTER_WEIGHTS).unlink()
    if len(base.files()) > 1:
        content = {"metadata": {"total_size": nbytes}, "weight_map": index}
        (target / WEIGHTS_INDEX).write_text(json.dumps(content, indent=2) + "\n")
    return nbytes


def _converted(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
