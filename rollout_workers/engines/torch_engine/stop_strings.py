"""Finding the token that completes a stop string."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


class StopStrings:
    """The stop strings of requests, compiled once for each distinct tuple of them.

    A token is looked at only if its own text has the last character of a stop string (or is no whole character); then
    the tail of the generated tokens is decoded, just long enough to hold the longest stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}

    def matcher(self, strings: tuple[str, ...]) -> StopMatcher:
        """Raises ValueError when the model came without a tokenizer."""
        if strings not in self._matchers:
            if self.tokenizer is None:
                raise ValueError(
                    f"stop strings {strings!r} need a tokenizer, and the model has none: use stop_token_ids"
                )
            self._matchers[strings] = StopMatcher(strings, self.tokenizer, self._texts)
        return self._matchers[strings]

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each token alone."""
        assert self.tokenizer is not None
        return self.tokenizer.decode_batch([[token] for token in range(self.vocabulary)], skip_special_tokens=False)


class StopMatcher:
    """One tuple of stop strings."""

    def __init__(self, strings: tuple[str, ...], tokenizer: Tokenizer, texts: list[str]) -> None:
        self.strings = strings
        self.window = max(len(string.encode()) for string in strings) + 8
        """Tokens to decode: a token carries at least one byte, and the first ones may be cut characters."""
        self._tokenizer = tokenizer
        last = {string[-1] for string in strings}
        anywhere = any(character.isspace() for character in last)
        self.may_complete = np.array(
            [anywhere or "\ufffd" in text or not last.isdisjoint(text) for text in texts], np.bool_
        )
        """bool [V]: whether a token can be the one that completes a stop string."""

    def match(self, generated: npt.NDArray[np.int32]) -> str | None:
        """The stop string (the earliest in the text) that the last of these tokens completes, or None."""
        text = self._tokenizer.decode(generated[-self.window :].tolist(), skip_special_tokens=False)
        found = [(text.index(string), string) for string in self.strings if string in text]
        return min(found)[1] if found else None


def eos_mask(model: PreTrainedModel, vocabulary: int) -> npt.NDArray[np.bool_]:
    """bool [V]: the end-of-sequence tokens of the model's generation settings."""
    mask = np.zeros(vocabulary, np.bool_)
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    for token in [ids] if isinstance(ids, int) else ids or []:
        if 0 <= token < vocabulary:
            mask[token] = True
    return mask
