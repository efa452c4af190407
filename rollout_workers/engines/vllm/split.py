"""Prefill and decode on separate vLLM servers, over its NIXL connector.

Two calls a request. The prefill server computes the prompt and samples one token, which is not used; its answer says
where the KV lies (`ServerHandoff`). The decode server gets that with the request, fetches the KV and samples all tokens. A
hand-off belongs to one policy version: KV of other weights than the decode server serves is left where it is, and the
decode server computes the prompt itself.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAnswerError
from rollout_workers.engines.servers.desk import ServerHandoff
from rollout_workers.engines.servers.event_stream import shown
from rollout_workers.engines.vllm.requests import generate_call

CONNECTOR = "NixlConnector"

_AWAIT_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def role_arguments(launch: Launch, cpu: bool) -> dict[str, Any]:
    """Arguments of a server with a role; none for ``mixed``."""
    if launch.role == "mixed":
        return {}
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",  # each server can do either, so roles may change
        "kv_buffer_device": "cpu" if cpu else "cuda",
        "kv_load_failure_policy": "recompute",
    }
    return {"kv_transfer_config": transfer}


def role_environment(launch: Launch, cpu: bool) -> dict[str, str]:
    """Variables of a server with a role. Raises ValueError if it has no port for the hand-off."""
    if launch.role == "mixed":
        return {}
    if launch.kv_port <= 0:
        raise ValueError(
            f"a {launch.role} server of vLLM needs a port for the hand-off of KV (kv_port={launch.kv_port})"
        )
    variables = {"VLLM_NIXL_SIDE_CHANNEL_HOST": launch.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(launch.kv_port)}
    if cpu:
        variables["UCX_TLS"] = "tcp,sm,self"  # what UCX may use without a GPU and without InfiniBand
    return variables


def prefill_call(request: GenerateRequest, served: int) -> Call:
    """Have a prefill server compute the prompt and keep its KV for a decode server. Not streamed."""
    call = generate_call(request, served, kv_transfer_params=_AWAIT_REMOTE_DECODE, stream=False)
    assert call.body is not None
    body = {key: value for key, value in call.body.items() if key != "stream_options"}
    # Without stop strings: the one token must not end the request before its KV is kept.
    params = {key: value for key, value in body["sampling_params"].items() if not key.startswith("stop")}
    body["sampling_params"] = params | {"max_tokens": 1, "ignore_eos": True, "detokenize": False}
    return Call(call.method, call.path, body)


def parse_prefill(body: bytes) -> ServerHandoff:
    """The answer to `prefill_call`. Raises ServerAnswerError if it offers no KV, or of more than one version."""
    try:
        answer = _ANSWER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ServerAnswerError(f"no answer to a prefill ({error}): {shown(body)}") from None
    if not answer.kv_transfer_params:
        raise ServerAnswerError(f"the prefill server keeps no KV for a decode server: {shown(body)}")
    versions = {span.version for choice in answer.choices for span in choice.weight_versions or []}
    if len(versions) != 1 or not next(iter(versions)).lstrip("-").isdigit():
        raise ServerAnswerError(f"the prefill server does not say which weights computed its KV: {sorted(versions)}")
    return ServerHandoff(version=int(versions.pop()), params=answer.kv_transfer_params)


def decode_call(request: GenerateRequest, served: int, handoff: ServerHandoff) -> Call:
    """The streamed call to the decode server; KV of another version than ``served`` is not used."""
    if handoff.version != served:
        return generate_call(request, served)
    return generate_call(request, served, kv_transfer_params=handoff.params)


class _Span(msgspec.Struct):
    version: str


class _Choice(msgspec.Struct):
    weight_versions: list[_Span] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    kv_transfer_params: dict[str, Any] | None = None


_ANSWER = msgspec.json.Decoder(_Answer)
