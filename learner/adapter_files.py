"""A directory with an adapter in it, as peft writes them: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_settings(directory: str | Path) -> dict[str, Any] | None:
    """What `ADAPTER_CONFIG` says; None for a directory without an adapter. Raises ModelError if it cannot be read."""
    file = Path(directory) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        float(settings["lora_alpha"]) / int(settings["r"])
        str(settings["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{file} describes no LoRA adapter: {error}") from error
    return settings


def adapter_scale(settings: dict[str, Any]) -> float:
    """``alpha / rank``."""
    return float(settings["lora_alpha"]) / int(settings["r"])


def base_of(directory: str | Path, initial: str | Path | None = None) -> Path:
    """The model that an adapter belongs to: ``initial``, or the one that it names. A directory without adapter is its own.

    Raises ModelError if that model is not there.
    """
    settings = adapter_settings(directory)
    if settings is None:
        return Path(directory)
    base = Path(initial if initial is not None else settings["base_model_name_or_path"])
    if not base.is_dir():
        raise ModelError(f"{directory} is an adapter of the model in {base}, which is not there")
    return base
