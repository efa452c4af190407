"""The bodies of generate and abort calls."""

from __future__ import annotations

from typing import Any

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Call

GENERATE = "/generate"

WHOLE_VOCABULARY = 1 << 20
"""More tokens than any vocabulary has. With a sampling mask SGLang wants a finite top-k, also where only top-p filters."""


def request_name(request_id: str) -> str:
    """The name of a request on the server.

    SGLang aborts every request whose name begins with the one given. With its length in front no name is the beginning
    of another.
    """
    return f"{len(request_id)}:{request_id}"


def generate_call(request: GenerateRequest, served: int, **extra: Any) -> Call:
    """Token ids in, token ids with log-probabilities out, streamed.

    ``served`` names the part of the prefix cache that the request may use: what other weights computed lies elsewhere.
    ``extra`` goes into the body (the bootstrap fields of a prefill/decode pair).
    """
    body = {
        "rid": request_name(request.request_id),
        "input_ids": request.prompt.tolist(),
        "sampling_params": sampling(request),
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
        "extra_key": f"version {served}",
        **extra,
    }
    if filtered(request):
        body["return_sampling_mask"] = True
    return Call("POST", GENERATE, body)


def filtered(request: GenerateRequest) -> bool:
    """Whether tokens are drawn from less than the whole distribution.

    SGLang's usual log-probabilities are those before top-k and top-p; those after them come with the sampling mask. That
    they filter one after the other is `weight_sync.engine_plugin.sglang_sampling`'s doing.
    """
    return request.temperature > 0 and (request.top_p < 1 or request.top_k > 0)


def sampling(request: GenerateRequest) -> dict[str, Any]:
    """SGLang's sampling parameters of a request."""
    params: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or (WHOLE_VOCABULARY if filtered(request) else -1),
        "sampling_seed": seed_of(request.seed),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
    }
    if request.stop_token_ids:
        params["stop_token_ids"] = list(request.stop_token_ids)
    if request.stop:
        params["stop"] = list(request.stop)
        params["stop_regex"] = [wide_window(request.stop)]
    return params


def wide_window(stop: tuple[str, ...]) -> str:
    """A pattern that never matches and makes SGLang look at enough of the last tokens for these stop strings.

    By itself it decodes as many tokens as its tokenizer needs for the longest stop string, but a model may write the
    same text with more and smaller ones, down to one for each byte.
    """
    tokens = max(len(string.encode()) for string in stop) + 8
    return f"\\uffff{{{tokens}}}"


def seed_of(seed: int) -> int:
    """A seed of any size as the 31 bits that SGLang takes on every device."""
    folded = seed & (2**64 - 1)
    return (folded ^ folded >> 31 ^ folded >> 62) & (2**31 - 1)


def abort_call(request_id: str) -> Call:
    return Call("POST", "/abort_request", {"rid": request_name(request_id), "abort_all": False})
