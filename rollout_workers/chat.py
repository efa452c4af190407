"""Text to tokens and back for rollout loops: tokenizer and chat template of a Hugging Face directory.

Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` with the `tokenizers` and `jinja2` libraries
alone: importing `transformers` would bring torch (seconds and hundreds of megabytes) into every rollout worker.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from rollout_workers.errors import ChatTemplateMissing

Message = dict[str, Any]

CONTEXT_OF_DECODING = 8
"""How many of the tokens before it decide how a token is written."""


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return environment.from_string(template)


def _token_text(entry: Any) -> str | None:
    """A special token stands in tokenizer_config.json as a string or as ``{"content": ...}``."""
    if isinstance(entry, dict):
        return entry.get("content")
    return entry if isinstance(entry, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


class ChatTokenizer:
    """Encodes, decodes and renders conversations. ``decode`` keeps special tokens: history must be exact."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special_tokens: dict[str, str], source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.special_tokens = special_tokens
        self._template = _compile(template) if template else None
        self._encode_cached = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def load(cls, directory: str | Path) -> ChatTokenizer:
        """Load from a Hugging Face model directory; FileNotFoundError names what is missing, ValueError the damaged file."""
        path = Path(directory)
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{path} holds no tokenizer.json: give the directory of a Hugging Face model with a fast tokenizer "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(directory) writes one)"
            )
        settings = _read_json(path / "tokenizer_config.json")
        template_file = path / "chat_template.jinja"
        template = (
            template_file.read_text(encoding="utf-8") if template_file.exists() else settings.get("chat_template")
        )
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("tool_use") or named.get("default")
        special = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(settings.get(name))) is not None
        }
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path / 'tokenizer.json'} is damaged or no tokenizer: {error}") from error
        try:
            return cls(tokenizer, template, special, str(path))
        except jinja2.TemplateError as error:
            file = template_file if template_file.exists() else path / "tokenizer_config.json"
            raise ValueError(f"the chat template in {file} is not valid: {error}") from error

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of ``text``; no special token is added."""
        return self._encode_cached(text)

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text of ``tokens``, special tokens included, as it continues the text of the tokens ``after`` which it stands."""
        if not after:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))
        tail = list(after[-CONTEXT_OF_DECODING:])
        before = self.tokenizer.decode(tail, skip_special_tokens=False)
        both = self.tokenizer.decode(tail + list(tokens), skip_special_tokens=False)
        return str(both[len(before) :])

    def without_end_token(self, text: str, tokens: Sequence[int]) -> str:
        """``text`` of a turn without the end-of-turn token, which was its last."""
        end = self.tokenizer.id_to_token(tokens[-1]) if tokens else None
        return text[: -len(end)] if end and text.endswith(end) else text

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, generation_prompt: bool) -> str:
        """The conversation as the model's chat template writes it.

        Raises ChatTemplateMissing when the tokenizer has none, ValueError when the template refuses the messages.
        """
        if self._template is None:
            raise ChatTemplateMissing(
                f"the tokenizer in {self.source} has no chat template, and this loop exchanges messages: add a "
                "chat_template.jinja to that directory, or write a loop that observes plain text"
            )
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=generation_prompt, **self.special_tokens
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.source} refused the conversation: {error}") from error
