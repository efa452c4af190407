"""A request on a modelled accelerator, and what is left of it when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROUNDING = 1e-6
"""Tokens by which the clock may miss a whole number."""


class Completion(NamedTuple):
    """A request has ended: all its tokens (or, aborted, those it got) in the order in which they were made."""

    request_id: str
    segments: list[tuple[int, int]]
    """(version, tokens): how many tokens each version of the weights sampled."""
    cached_tokens: int
    """Prompt tokens whose KV was there already."""


class Request:
    """A request's way through the accelerator: waiting, prefilling, decoding, gone."""

    __slots__ = (
        "admitted",
        "asked_at",
        "begun",
        "cached",
        "delivered",
        "gone",
        "group",
        "id",
        "mark",
        "output",
        "pinned",
        "prefill",
        "prompt",
        "session",
        "started",
    )

    def __init__(self, request_id: str, session: str, prompt: int, output: int, asked_at: float) -> None:
        self.id, self.session, self.prompt, self.output = request_id, session, prompt, output
        self.asked_at = asked_at
        """Since when it waits for a token."""
        self.pinned: int | None = None
        self.group = ""
        """Its prefix group."""
        self.delivered = 0
        """Prompt tokens whose KV comes with it."""
        self.begun = False
        """It has its first token from elsewhere."""
        self.admitted = False
        self.prefill = 0.0
        """Prompt tokens still to compute, once it is admitted."""
        self.cached = 0
        self.started: float | None = None
        """The clock's depth when decoding began."""
        self.mark = 0
        """How many updates there had been then."""
        self.gone = False

    def made(self, depth: float) -> int:
        """Whole tokens at a depth of the clock, once it decodes."""
        assert self.started is not None, "it decodes"
        return min(self.output, max(0, int(depth - self.started + ROUNDING)))

    def segments(self, made: int, updates: Sequence[tuple[float, int]], version: int) -> list[tuple[int, int]]:
        """Its first ``made`` tokens by the version that sampled them.

        ``updates``: the depth of each update, and the version that served until then; ``version`` serves now.
        """
        if self.pinned is not None:
            return [(self.pinned, made)] if made else []
        segments, before = [], 0
        if self.started is not None:
            for depth, old in updates[self.mark :]:
                upto = min(made, self.made(depth))
                if upto > before:
                    segments.append((old, upto - before))
                    before = upto
        if made > before:
            segments.append((version, made - before))
        return segments
