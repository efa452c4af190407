"""Which stop string a request ended with: the server's token endpoint does not say.

The server decides where a request ends, by the same rule: at the first token whose text completes a stop string. Its
tokens are kept as sampled, the last one included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SLACK = 8
"""Tokens before the window of a stop string: the first ones of a cut may be parts of a character."""


class Stops:
    """The stop strings of one request. ``before``: its tokens that were sampled elsewhere, where one may begin."""

    def __init__(self, tokenizer: Tokenizer | None, strings: tuple[str, ...], before: Sequence[int] = ()) -> None:
        self.strings = strings
        self._tokenizer = tokenizer
        self._window = max((len(string.encode()) for string in strings), default=0) + SLACK
        self._before = list(before[-self._window :]) if strings else []

    def completed_by(self, tokens: Sequence[int]) -> str | None:
        """The stop string (the earliest in the text) in the last of these tokens, or None.

        Without a tokenizer the only one there is, where there is one: the caller knows that the request was stopped.
        """
        if not self.strings:
            return None
        if self._tokenizer is None:
            return self.strings[0] if len(self.strings) == 1 else None
        text = self._tokenizer.decode([*self._before, *tokens][-self._window :], skip_special_tokens=False)
        found = [(text.index(string), string) for string in self.strings if string in text]
        return min(found)[1] if found else None

    def straddling(self, tokens: Sequence[int], known: int) -> int | None:
        """Where a stop string that began before these tokens ends: how many of them to keep; None if there is none.

        The server sees only what it sampled itself. ``known`` of the tokens have been looked at before.
        """
        if not self._before or self._tokenizer is None:
            return None
        for size in range(known + 1, min(len(tokens), self._window) + 1):
            if self.completed_by(tokens[:size]) is not None:
                return size
        return None


def tokenizer_of(model_path: str | Path | None) -> Tokenizer | None:
    """The tokenizer of a model directory; None where there is none."""
    file = Path(model_path) / "tokenizer.json" if model_path is not None else None
    if file is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))
