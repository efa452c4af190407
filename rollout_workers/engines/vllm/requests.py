"""The bodies of generate and abort calls."""

from __future__ import annotations

from typing import Any

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Call

GENERATE = "/inference/v1/generate"
NAME_PREFIX = "generate-tokens-"
"""vLLM puts this before the ids of requests that come by `GENERATE`."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def generate_call(request: GenerateRequest, served: int, **extra: Any) -> Call:
    """Token ids in, token ids with log-probabilities out, streamed.

    ``served`` salts the prefix cache: what other weights computed is not found. ``extra`` goes into the body.
    """
    body = {
        "request_id": request.request_id,
        "token_ids": request.prompt.tolist(),
        "sampling_params": sampling(request),
        "cache_salt": f"version {served}",
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    return Call("POST", GENERATE, body)


def sampling(request: GenerateRequest) -> dict[str, Any]:
    """vLLM's sampling parameters of a request."""
    params: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": seed_at(request.seed, len(request.prompt)),
        "logprobs": 0,
        "detokenize": bool(request.stop),
    }
    if request.stop_token_ids:
        params["stop_token_ids"] = list(request.stop_token_ids)
    if request.stop:
        params["stop"] = list(request.stop)
        params["skip_special_tokens"] = False
        params["spaces_between_special_tokens"] = False
    return params


def seed_at(seed: int, position: int) -> int:
    """A seed for the tokens from ``position`` on, 63 bits.

    vLLM draws from a generator that starts anew with each request. A request that goes on elsewhere begins further back
    in the sequence and must not draw the same numbers again, so the position is mixed in (the finaliser of SplitMix64).
    """
    value = (seed + _GOLDEN * (position + 1)) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return (value ^ value >> 31) >> 1


def server_name(request_id: str) -> str:
    """The name that ``/abort_requests`` knows a request by; under its bare id nothing would be aborted."""
    return NAME_PREFIX + request_id


def abort_call(request_id: str) -> Call:
    return Call("POST", "/abort_requests", {"request_ids": [server_name(request_id)]})
