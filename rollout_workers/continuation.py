"""Requests that go on elsewhere: what is left of one, how its parts are put together, when all of an engine's have a place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import msgspec
import numpy as np

from rollout_workers.engines.protocol import GenerateRequest, TokenChunk


def remaining(request: GenerateRequest, chunks: list[TokenChunk]) -> GenerateRequest:
    """What is left of a request after ``chunks``: they become context and count against its budget."""
    done = sum(len(chunk.tokens) for chunk in chunks)
    if not done:
        return request
    return msgspec.structs.replace(
        request,
        prompt=np.concatenate([request.prompt, *(chunk.tokens for chunk in chunks)]),
        max_tokens=request.max_tokens - done,
        generated=request.generated + done,
    )


def joined(chunks: list[TokenChunk]) -> TokenChunk:
    """The chunks of one request as one; the last one's ending, the cache count that came first."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    return TokenChunk(
        request_id=last.request_id,
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        logprobs=np.concatenate([chunk.logprobs for chunk in chunks]),
        versions=np.concatenate([chunk.versions for chunk in chunks]),
        finish_reason=last.finish_reason,
        stop_match=last.stop_match,
        cached_tokens=next((chunk.cached_tokens for chunk in chunks if chunk.cached_tokens), 0),
        error=last.error,
    )


class Relocation:
    """The requests of an engine that was lost, until each of them has a new place."""

    def __init__(self, noticed_at: float, request_ids: Iterable[str]) -> None:
        self.noticed_at = noticed_at
        """When this client noticed (Unix seconds)."""
        self.placed_at = noticed_at
        """When the last of them had been taken by another engine."""
        self.placed = asyncio.Event()
        self._waiting = set(request_ids)
        self.requests = len(self._waiting)
        if not self._waiting:
            self.placed.set()

    def took(self, request_ids: Iterable[str]) -> None:
        """Some engine has these requests now."""
        if self._waiting:
            self._waiting.difference_update(request_ids)
            if not self._waiting:
                self.placed_at = time.time()
                self.placed.set()

    def ended(self, request_id: str) -> None:
        """A request ended without another engine (it had all its tokens, or was given up)."""
        if request_id in self._waiting:
            self.took([request_id])
