"""The task that TRL and Millrace are compared on. Standard library only: it is imported in the environments of both.

A prompt is eight characters such as ``012+084=``; a completion has a fixed number of tokens and is rewarded by its share
of vowels. Tokens are single bytes (:data:`SPECIAL` first, then the byte-level alphabet in order).
"""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL = ("<pad>", "<bos>", "<eos>")
PROMPT_LENGTH = 8
PROMPTS = 512
"""Different prompts; they repeat after that."""

_FIRST_PRINTABLE = ord("!")
"""The first character of the byte-level alphabet."""

VOWELS = frozenset(len(SPECIAL) + ord(letter) - _FIRST_PRINTABLE for letter in "aeiou")
"""Their token ids."""


def prompt(index: int) -> str:
    """Prompt number ``index``: :data:`PROMPT_LENGTH` characters, which are as many tokens."""
    number = index % PROMPTS
    return f"{number:03d}+{number * 7 % 1000:03d}="


def vowel_share(tokens: Sequence[int]) -> float:
    """The reward: which share of the completion's tokens are vowels; 0 of none."""
    return sum(token in VOWELS for token in tokens) / max(1, len(tokens))
