"""A word-level tokenizer with an append-only chat template, written as a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<unk>", ";", "ask", ">", "/", ".", "yes", "no", "look", "red", "blue", "done", "go", "stop"]

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}ask {{ m.content }} /{% elif m.role == 'tool' %} > {{ m.content }} ."
    "{% else %} {{ m.content | trim }} ;{% endif %}{% endfor %}"
)


def write_tokenizer(directory: Path, template: str | None = TEMPLATE) -> Path:
    """Make ``directory`` a tokenizer directory with the words above."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": ";", "pad_token": "<pad>"}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
