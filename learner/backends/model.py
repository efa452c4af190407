"""Loading a Hugging Face causal language model for training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from learner.adapter_files import adapter_settings
from learner.attention import RAGGED_ATTENTION, register_ragged_attention
from learner.errors import ModelError
from learner.fused import fuse_norms


def resolve_device(device: str) -> torch.device:
    """``auto`` takes a GPU when there is one. Raises ModelError for ``cuda`` without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("learner.device=cuda, but torch sees no GPU: use learner.device=auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(path: str | Path, device: torch.device, *, gradient_checkpointing: bool = False) -> Any:
    """The model with float32 weights and ragged attention, in training mode.

    Raises ModelError for a directory that is missing or damaged, that holds no causal language model, or one whose
    attention is not plain causal attention.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"model.path={path}: no such directory; give a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path={path} holds no config.json; give a Hugging Face model directory")
    if adapter_settings(directory) is not None:
        raise ModelError(f"model.path={path} holds a LoRA adapter: merge it into its model with `millrace export`")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils.logging import disable_progress_bar

    register_ragged_attention()
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"model.path={path} holds a {config.model_type} model, which is not a causal language model"
            )
        check_attention(config)
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation=RAGGED_ATTENTION,
            local_files_only=True,
            output_loading_info=True,
        )
        check_complete(path, loading["missing_keys"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model.path={path} cannot be loaded: {error}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = model.to(device).train()
    if device.type == "cpu":
        fuse_norms(model)
    return model


def check_complete(path: str | Path, missing: Iterable[str]) -> None:
    """Raises ModelError when weights were left at random because the files do not hold them."""
    names = sorted(missing)
    if names:
        raise ModelError(
            f"model.path={path}: its weights lack {len(names)} of the tensors that its config.json describes ({names[0]}, "
            "...): config.json and weights belong to different models"
        )


def check_attention(config: Any) -> None:
    """Raises ModelError for layers that attend in another way than to all that came before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or (window and getattr(config, "layer_types", None) is None):
        found = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window}"
        raise ModelError(
            f"a {config.model_type} model with {found} cannot be trained yet: only full causal attention can"
        )
