"""What Millrace must know of an SGLang server: every call it makes and every answer it reads.

Weights: Millrace's plugin runs in SGLang's scheduler process (`weight_sync.engine_plugin.sglang_loader`), where SGLang
calls it as a custom weight loader. `adopt` lets it in. From then on it answers to names that begin with ``millrace``
asked of ``/get_weights_by_name``, the one route into that process that neither waits for requests nor makes them wait:
that is how `stage` starts a transfer and learns of its end. `commit` is a weight update of SGLang's own between
``begin_weight_update`` and ``end_weight_update``, whose loader takes the staged tensors; SGLang notes the new version for
the requests in flight in the same step. Nothing here aborts a request.
"""

from __future__ import annotations

import msgspec

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy, PauseMode
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAnswerError, ServerCounters, ServerIdentity
from rollout_workers.engines.servers.answers import json_object, served_version
from rollout_workers.engines.servers.event_stream import shown
from rollout_workers.engines.servers.prometheus import first, samples
from rollout_workers.engines.sglang import launch as launching
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.sglang.requests import abort_call, generate_call
from rollout_workers.engines.sglang.responses import SglangStreamParser
from weight_sync.engine_plugin.sglang_messages import (
    Command,
    PluginState,
    carrier,
    decode_reply,
    encode_command,
)

PLUGIN = "/get_weights_by_name"
UPDATE = "/update_weights_from_tensor"
POLL_S = 0.01

MODES = {PauseMode.KEEP_KV: "in_place", PauseMode.KEEP_REQUESTS: "retract", PauseMode.ABORT: "abort"}


class SglangAdapter:
    """The `ServerAdapter` of SGLang."""

    name = "sglang"
    expected_version = "0.5.23"
    distributions: tuple[str, ...] = ("sglang",)
    inner = r"^sglang::"

    def __init__(self, config: SglangConfig) -> None:
        self.config = config

    def command(self, launch: Launch) -> list[str]:
        return launching.command(self.config, launch)

    def environment(self, launch: Launch) -> dict[str, str]:
        return launching.environment(self.config, launch)

    def ready(self) -> Call:
        # /health generates a token and does not answer while paused.
        return Call("GET", "/model_info", timeout_s=5.0)

    def adopt(self, version: int) -> list[Call]:
        attach = self._update(Command(kind="attach"), version)
        return [*self.pause(PauseMode.KEEP_KV), *attach, *self.resume()]

    def generate(self, request: GenerateRequest, served: int) -> Call:
        return generate_call(request, served)

    def parser(self, request: GenerateRequest, served: int) -> SglangStreamParser:
        return SglangStreamParser(request, served)

    def refusal(self, status: int, body: bytes) -> str:
        return f"SGLang refused the request ({status}): {_message(body)}"

    def abort(self, request_id: str) -> Call:
        return abort_call(request_id)

    def pause(self, keep: PauseMode) -> list[Call]:
        return [Call("POST", "/pause_generation", {"mode": MODES[keep]})]

    def resume(self) -> list[Call]:
        return [Call("POST", "/continue_generation", {"torch_empty_cache": False})]

    def stage(self, offer: bytes, member: str) -> list[Call]:
        begin = Command(kind="stage", offer=offer, member=member)
        return [self._ask(begin), self._ask(Command(kind="state"), poll_s=POLL_S)]

    def commit(self, version: int, kv: KvPolicy) -> list[Call]:
        """With KV kept, what the prefix cache holds of older versions is under other keys (`generate`) and ages out."""
        flush = [Call("POST", "/flush_cache")] if kv is not KvPolicy.KEEP else []
        expect = self._ask(Command(kind="expect", version=version))
        return [expect, *flush, *self._update(Command(kind="commit", version=version), version)]

    def boundaries(self, call: Call, body: bytes) -> dict[str, int]:
        return {}  # the end of a stream says which version sampled which token

    def check(self, call: Call, body: bytes) -> None:
        if call.path == PLUGIN:
            state = self._plugin_state(body)
            if state.error:
                raise ServerAnswerError(f"SGLang's side of a weight update: {state.error}")
        elif call.path in (UPDATE, "/begin_weight_update", "/end_weight_update", "/update_weight_version"):
            answer = json_object(body, call.path)
            if answer.get("success") is not True:
                raise ServerAnswerError(f"{call.path}: {answer.get('message', shown(body))}")

    def pending(self, call: Call, body: bytes) -> bool:
        return call.path == PLUGIN and self._plugin_state(body).staging

    def identity(self) -> Call:
        return Call("GET", "/server_info")

    def parse_identity(self, body: bytes) -> ServerIdentity:
        info = json_object(body, "/server_info")
        backend = info.get("sampling_backend", launching.SAMPLING)
        if backend != launching.SAMPLING:
            raise ServerAnswerError(
                f"this SGLang samples with {backend!r}, which heeds no seeds: start it with --sampling-backend "
                f"{launching.SAMPLING}"
            )
        model, version = info.get("model_path"), info.get("version")
        # A sequence that its KV has no room for, SGLang ends early as if its budget were spent.
        room = [size for key in ("context_length", "max_total_num_tokens") if isinstance(size := info.get(key), int)]
        return ServerIdentity(
            version=version if isinstance(version, str) else None,
            model=model if isinstance(model, str) else None,
            max_len=min(room) - launching.HEADROOM if room else None,
        )

    def served(self) -> Call:
        return Call("GET", "/model_info")

    def parse_served(self, body: bytes) -> int:
        return served_version(body, "/model_info", "SGLang")

    def metrics(self) -> Call:
        return Call("GET", "/metrics")

    def parse_metrics(self, body: bytes) -> ServerCounters:
        values = samples(body)
        prompt = first(values, ["sglang:prompt_tokens_total"])
        cached = first(values, ["sglang:cached_tokens_total"])
        return ServerCounters(
            running=int(first(values, ["sglang:num_running_reqs"])),
            waiting=int(first(values, ["sglang:num_queue_reqs"])),
            kv_used=first(values, ["sglang:token_usage"]),
            generated_tokens=int(first(values, ["sglang:generation_tokens_total"])),
            prefill_tokens=max(0, int(prompt - cached)),
            cached_tokens=int(cached),
            preemptions=int(first(values, ["sglang:num_retracted_requests_total", "sglang:num_retracted_reqs"])),
        )

    def _ask(self, command: Command, poll_s: float | None = None) -> Call:
        return Call("POST", PLUGIN, {"name": encode_command(command), "truncate_size": 1}, poll_s=poll_s)

    def _plugin_state(self, body: bytes) -> PluginState:
        try:
            return decode_reply(body)
        except ValueError as error:
            raise ServerAnswerError(f"{error}: {shown(body)}") from None

    def _update(self, command: Command, version: int) -> list[Call]:
        """A weight update of SGLang's whose custom loader is Millrace's plugin; ``version`` is served from there on."""
        body = {
            "serialized_named_tensors": [carrier(command)] * launching.ranks(self.config),
            "load_format": launching.LOADER,
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": str(version),
        }
        return [
            Call("POST", "/begin_weight_update", {}),
            Call("POST", UPDATE, body),
            Call("POST", "/end_weight_update", {}),
        ]


def _message(body: bytes) -> str:
    """What an error answer says, in one line."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return shown(body)
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return " ".join(str(answer).split())
