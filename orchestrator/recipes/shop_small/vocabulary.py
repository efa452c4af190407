"""The word-level tokenizer and the chat template of the small shop model.

A conversation reads ``ask anna say status / find_user anna ; > order 4 8 2 . find_order 4 8 2 ; ...``: requests between
``ask`` and ``/``, the model's turns ended by ``;`` (its end-of-sequence token), tool results between ``>`` and ``.``.
Every message is written after what stands before it and changes none of it. Decoding joins words by single spaces, so
text and tokens of a conversation correspond one to one.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from env_pool.shop.words import ITEMS, NAMES, NONE_LEFT, NOTES, STATUSES

END_OF_TURN = ";"
PAD = "<pad>"
UNKNOWN = "<unk>"
_TOOLS = ("find_user", "find_order", "check_stock", "refund", "note")
_MARKS = ("ask", "/", ">", ".")
_FUNCTION_WORDS = (
    "order",
    "wants",
    "if",
    "gone",
    "else",
    "say",
    "status",
    "item",
    "stock",
    "done",
    "ok",
    "error",
    "user",
)

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


def words() -> list[str]:
    """All tokens in the order of their ids."""
    digits = tuple("0123456789")
    groups = ((PAD, UNKNOWN, END_OF_TURN), _MARKS, digits, _TOOLS, _FUNCTION_WORDS, (NONE_LEFT,), STATUSES, NOTES)
    every = [word for group in (*groups, NAMES, ITEMS) for word in group]
    return list(dict.fromkeys(every))


def save_tokenizer(directory: Path) -> Tokenizer:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``; returns the tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens([PAD, UNKNOWN, END_OF_TURN])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer
