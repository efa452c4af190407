"""A low-rank adapter in a Hugging Face model: what is trained, published and saved instead of the weights.

peft puts the adapter beside each target (``W x + alpha / rank * B A x``); the model stays the object that it was, so sharding,
attention and prefix sharing apply as they do without. Its tensors go by the names of peft's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from learner.adapter_files import ADAPTER_WEIGHTS
from learner.backends.sharding import as_sharded, whole
from learner.errors import CheckpointError, ModelError
from learner.lora_config import LoraConfig
from weight_sync.adapters import A_SUFFIX, PREFIX, adapter_names, merged

NAME = "default"
BASE = ".base_layer."


class LoraAdapter:
    """Put into ``model``, whose own weights no longer train; ``base`` is the directory that they are from.

    Raises ModelError for targets that the model does not have, or that are no linear modules.
    """

    def __init__(self, model: Any, config: LoraConfig, base: Path) -> None:
        try:
            import peft
        except ImportError as error:
            raise ModelError(f"learner.lora needs peft ({error}): pip install 'millrace[lora]'") from error

        self._model, self._scale = model, config.scale
        self._settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scale * config.rank,
            target_modules=list(config.targets),
            lora_dropout=config.dropout,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base.resolve()),
        )
        missing = sorted(set(config.targets) - set(linear_modules(model)))
        if missing:
            raise ModelError(
                f"learner.lora.targets: {type(model).__name__} has no linear modules {', '.join(missing)}; it has "
                f"{', '.join(linear_modules(model))}"
            )
        peft.inject_adapter_in_model(self._settings, model, adapter_name=NAME)
        model.train()
        self._dropouts = [
            module
            for name, module in model.named_modules()
            if ".lora_dropout." in name and isinstance(module, torch.nn.Dropout)
        ]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters, by the names of peft's files. Ask again after the model was sharded."""
        return {
            PREFIX + name.replace(f".{NAME}.", "."): parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    def load(self, directory: Path) -> None:
        """Take the adapter of a directory. Raises CheckpointError if it does not fit this one."""
        file = directory / ADAPTER_WEIGHTS
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        mine = self.trained()
        strange = sorted(mine.keys() ^ state.keys()) or [n for n, p in mine.items() if p.shape != state[n].shape]
        if strange:
            raise CheckpointError(
                f"{file} holds another adapter than learner.lora describes ({strange[0]} does not match): rank and targets must "
                "be those that it was trained with"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(as_sharded(state[name].to(parameter.device), parameter))

    def published(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter as engines get it (`weight_sync.adapters`): A, and B times ``alpha / rank``."""
        for name, parameter in self.trained().items():
            tensor = parameter.detach()
            yield name, whole((tensor if name.endswith(A_SUFFIX) else tensor * self._scale).to(dtype))

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights of the model with the adapter merged in, float32, by Hugging Face name. All ranks go through it."""
        adapter = {name: parameter.detach() for name, parameter in self.trained().items()}
        for name, parameter in self._model.named_parameters():
            if PREFIX + name.replace(f".{NAME}.", ".") in adapter:
                continue
            plain, weight = name.replace(BASE, "."), whole(parameter.detach())
            first, second = adapter_names(plain)
            if first in adapter:
                weight = merged(weight, whole(adapter[first]), whole(adapter[second]) * self._scale)
            yield plain, weight

    def save_config(self, directory: Path) -> None:
        """Writes ``adapter_config.json``."""
        self._settings.save_pretrained(str(directory))

    def dropping(self, active: bool) -> None:
        """Switch the adapter's dropout."""
        for module in self._dropouts:
            module.train(active)


def linear_modules(model: Any) -> list[str]:
    """The last parts of the names of the model's linear modules."""
    names = {
        name.rsplit(".", 1)[-1]: None
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    return list(names)
