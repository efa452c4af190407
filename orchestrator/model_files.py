"""What can be told of a model directory without loading it: a second's look before anything is started.

The engine and the learner load the model for real and have the last word; they import torch, which takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.composition import ConfigError
from rollout_workers.chat import ChatTokenizer
from rollout_workers.loops import BUNDLED

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead")
"""How the class names of models that predict the next token end."""

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = "pytorch_model*.bin"


def check_model(path: Path, loop: str, max_len: int) -> None:
    """Whether a directory holds what a run needs of a model: configuration, weights, tokenizer, chat template.

    ``max_len``: tokens of the longest sequence the engine must hold. Raises ConfigError naming the file and the remedy.
    """
    if not path.is_dir():
        raise ConfigError(f"model.path: {path} is not a directory; give the directory of a Hugging Face causal LM")
    config = _read_config(path / "config.json")
    _check_weights(path)
    tokenizer = _load_tokenizer(path, config)
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and max_len > positions:
        raise ConfigError(
            f"engines.max_len={max_len}: the model in {path} has {positions} positions (max_position_embeddings in its "
            f"config.json); set engines.max_len and rollout.max_episode_tokens to {positions} or less"
        )
    if loop in BUNDLED and not tokenizer.has_template:
        raise ConfigError(
            f"model.path: the tokenizer in {path} has no chat template, and rollout.loop={loop} exchanges chat messages; add a "
            "chat_template.jinja to that directory, or use a loop of your own that calls episode.observe_text"
        )


def check_synthetic(path: Path) -> None:
    """Whether a directory holds the model of synthetic runs. Raises ConfigError."""
    from rollout_workers.engines.synthetic.weights import SyntheticModelError, read_vocabulary

    try:
        read_vocabulary(path)
    except SyntheticModelError as error:
        raise ConfigError(f"model.path: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"model.path: {file.parent} has no config.json; give the directory of a Hugging Face causal LM"
        )
    config = _read_json(file)
    names = config.get("architectures") or []
    if not config.get("model_type"):
        raise ConfigError(f"model.path: {file} names no model_type; it is not the config.json of a Hugging Face model")
    if names and not any(str(name).endswith(CAUSAL) for name in names):
        raise ConfigError(
            f"model.path: {file} describes {', '.join(map(str, names))} (model_type {config['model_type']}), which is not a "
            "causal language model; give one whose architecture ends in ForCausalLM"
        )
    return config


def _check_weights(path: Path) -> None:
    """That every safetensors file is whole: its header says how long it must be."""
    index = path / WEIGHTS_INDEX
    if index.is_file():
        names = sorted(set(dict(_read_json(index).get("weight_map") or {}).values()))
    elif (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif any(path.glob(OTHER_WEIGHTS)):
        return
    else:
        raise ConfigError(
            f"model.path: {path} holds no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}; copy them there"
        )
    for name in names:
        _check_safetensors(path / str(name))


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except FileNotFoundError:
        raise ConfigError(f"model.path: {file} is missing, and {WEIGHTS_INDEX} names it; copy it there") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"model.path: {file} is damaged or truncated, or no safetensors file ({error}); copy it again from where it came"
        ) from error


def _load_tokenizer(path: Path, config: dict[str, Any]) -> ChatTokenizer:
    try:
        tokenizer = ChatTokenizer.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error
    size, known = config.get("vocab_size"), tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    largest = max(known.values(), default=-1)
    if isinstance(size, int) and largest >= size:
        raise ConfigError(
            f"model.path: {path / 'tokenizer.json'} has token ids up to {largest}, but the model knows {size} (vocab_size in "
            f"{path / 'config.json'}): tokenizer and weights belong to different models"
        )
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error}; copy it again from where it came") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model.path: {file} does not hold a JSON object; copy it again from where it came")
    return value
