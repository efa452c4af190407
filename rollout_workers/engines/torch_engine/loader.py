"""Loading a Hugging Face causal LM for the engine, and refusing what it cannot run, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rollout_workers.engines.torch_engine.attention import ATTENTION_NAME, register

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(ValueError):
    """A model that is missing, damaged or not supported by the torch engine."""


def resolve_device(device: str) -> torch.device:
    """``auto`` takes a GPU when there is one; ``cuda`` without one is a ModelError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("engines.device=cuda, but torch sees no GPU; use engines.device=auto or cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[dtype]


def load_model(path: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, Tokenizer | None]:
    """Load a model directory with the engine's attention, ready to generate.

    Returns the model and its fast tokenizer (None when the directory holds none: stop strings then do not work).
    Raises ModelError for a directory that is missing, incomplete or holds an architecture that is not supported.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"model.path={path}: no such directory; give a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path={path}: no config.json in it; give a Hugging Face model directory")
    target = resolve_device(device)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{directory / 'config.json'} cannot be used: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model.path={path}: {config.model_type!r} is not a causal language model")
    check_config(config)
    register()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=resolve_dtype(dtype, target),
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.path={path}: cannot be loaded: {error}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path={path}: its weights lack {len(missing)} of the tensors that its config.json describes "
            f"({missing[0]}, ...): config.json and weights belong to different models"
        )
    return model.to(target).eval(), load_tokenizer(directory)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a model directory, or None when it has no ``tokenizer.json``."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def check_config(config: Any) -> None:
    """Raise ModelError if the architecture is not plain causal attention, or depends on the batch it runs in."""
    name = f"{config.model_type} model"
    other = {kind for kind in getattr(config, "layer_types", None) or ()} - {"full_attention", "sliding_attention"}
    if other:
        raise ModelError(f"{name}: layers of type {', '.join(sorted(other))} are not supported, only full attention")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ModelError(f"{name}: rope type {rope!r} depends on the lengths in a batch and is not supported")


def check_lengths(config: Any, max_len: int) -> None:
    """Raise ModelError if sequences of ``max_len`` tokens exceed the model's positions or its attention window."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_len > positions:
        raise ModelError(f"engines.max_len={max_len}: the model has {positions} positions; lower engines.max_len")
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    window: int | None = getattr(config, "sliding_window", None) if slides else None
    if window is not None and max_len > window:
        raise ModelError(
            f"engines.max_len={max_len}: the {config.model_type} model's attention window of {window} tokens would "
            f"slide, which is not supported; set engines.max_len to {window} or less"
        )


def attach_attention(model: PreTrainedModel) -> None:
    """Make a model that was loaded otherwise use the engine's attention. Raises ModelError if it cannot."""
    check_config(model.config)
    if not model._supports_attention_backend:
        raise ModelError(f"{type(model).__name__} does not support transformers' attention interface")
    register()
    model.set_attn_implementation(ATTENTION_NAME)
