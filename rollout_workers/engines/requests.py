"""Which requests an engine refuses, and with what words; the chunk that ends one without tokens."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk


def refusal(request: GenerateRequest, vocabulary: int, max_len: int, pinned: Set[int]) -> str | None:
    """Why a request by itself cannot be served, or None."""
    prompt, size = request.prompt, len(request.prompt)
    if size == 0:
        return "the prompt is empty; give at least one token"
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        return f"the prompt has token ids outside 0..{vocabulary - 1}"
    if request.max_tokens < 1:
        return f"max_tokens={request.max_tokens}: must be at least 1"
    if size + request.max_tokens > max_len:
        return (
            f"prompt of {size} + max_tokens={request.max_tokens} exceed engines.max_len={max_len}; shorten one or "
            "raise engines.max_len"
        )
    if not (request.temperature >= 0 and 0 < request.top_p <= 1 and request.top_k >= 0):
        return (
            f"temperature={request.temperature}, top_p={request.top_p}, top_k={request.top_k}: must be at least 0, in "
            "(0, 1] and at least 0"
        )
    if not 0 <= request.generated <= size:
        return f"generated={request.generated}: must be between 0 and the prompt's {size} tokens"
    if "" in request.stop:
        return "an empty stop string; remove it"
    if request.pinned_version is not None and request.pinned_version not in pinned:
        return f"version {request.pinned_version} is not pinned here (pinned: {sorted(pinned)})"
    return None


def empty_chunk(request_id: str, reason: FinishReason, error: str | None = None) -> TokenChunk:
    """The last chunk of a request that gets no (further) tokens."""
    return TokenChunk(
        request_id=request_id,
        tokens=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int32),
        finish_reason=reason,
        error=error,
    )
