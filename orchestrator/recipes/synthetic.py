"""The model of synthetic runs: a vocabulary of plain words, a chat template, and a few kilobytes of weights.

Nothing computes with the weights; the weight protocol moves them like any others. A word is one token, so a text of n
words is n tokens, and decoding joins words by single spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from rollout_workers.engines.synthetic.weights import MODEL_TYPE, STAMP

VERSION = 1
"""Raise it whenever the same seed would give another model."""

SPECIAL = ("<pad>", "<unk>", ";")
MARKS = ("ask", "/", ">", ".")
WORDS = 61
"""Words ``w0`` to ``w60`` that the engine samples."""
WIDTH = 16

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if not loop.first %}{{ ' ' }}{% endif %}
{%- if message.role == 'assistant' %}
{%- if message.content | trim %}{{ message.content | trim }} {% endif %}{{ ';' }}
{%- elif message.role == 'tool' %}{{ '> ' }}{{ message.content | trim }}{{ ' .' }}
{%- else %}{{ 'ask ' }}{{ message.content | trim }}{{ ' /' }}
{%- endif %}
{%- endfor %}
"""


def vocabulary() -> list[str]:
    """All tokens in the order of their ids; what is sampled stands last."""
    return [*SPECIAL, *MARKS, *(f"w{number}" for number in range(WORDS))]


def build(
    directory: Path,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Write a model directory, decided by ``seed`` alone, in no time."""
    del threads, progress
    directory.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    _save_tokenizer(directory, words)
    config = {
        "architectures": ["SyntheticForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": len(words),
        "first_word_id": len(SPECIAL) + len(MARKS),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = np.random.default_rng(seed).standard_normal((len(words), WIDTH)).astype(np.float32)
    save_file({"model.embed_tokens.weight": weights, STAMP: np.zeros(1)}, directory / "model.safetensors")
    return directory


def _save_tokenizer(directory: Path, words: list[str]) -> None:
    pad, unknown, end = SPECIAL
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": pad,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
