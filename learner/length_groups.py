"""Which sequences share a padded attention call: those of similar length."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 1.25
"""Sequences share a padded group while it has at most this many times the tokens of its sequences, ..."""

MAX_PADDED = 640
"""... and at most so many tokens more: long sequences gain nothing by sharing an attention call."""

GROUP_OVERHEAD = 256
"""Padded tokens that are worth saving another attention call."""


def spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Which sequences, sorted longest first, share a padded group: ``first:last`` of each."""
    found, first = [], 0
    while first < len(lengths):
        last = _end_of_group(lengths, first)
        found.append((first, last))
        first = last
    return found


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens of the padded groups of sequences of these lengths, sorted longest first."""
    return sum(lengths[first] * (last - first) for first, last in spans(lengths))


def _end_of_group(lengths: Sequence[int], first: int) -> int:
    longest, tokens = lengths[first], 0
    for index in range(first, len(lengths)):
        padded = longest * (index - first + 1)
        inside = tokens + lengths[index]
        if padded - inside > min(inside * (MAX_PADDING - 1), MAX_PADDED) + GROUP_OVERHEAD:
            return index
        tokens += lengths[index]
    return len(lengths)
