"""The adapter of the tiny server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvPolicy, PauseMode, TokenChunk
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAnswerError, ServerCounters, ServerIdentity

PROGRAM = Path(__file__).with_name("tiny_server.py")


class TinyParser:
    def __init__(self, request: GenerateRequest) -> None:
        self._request_id = request.request_id
        self._rest = b""
        self.switches: list[tuple[int, int | None]] = []

    def feed(self, data: bytes) -> list[TokenChunk]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [self._chunk(line) for line in lines]

    def finish(self) -> list[TokenChunk]:
        if self._rest:
            raise ServerAnswerError(f"no event: {self._rest[:40]!r}")
        return []

    def switched(self, version: int, tokens: int | None) -> list[TokenChunk]:
        self.switches.append((version, tokens))
        return []

    def _chunk(self, line: bytes) -> TokenChunk:
        try:
            event = json.loads(line)
            tokens = [] if event["token"] is None else [event["token"]]
            return TokenChunk(
                request_id=self._request_id,
                tokens=np.array(tokens, np.int32),
                logprobs=np.full(len(tokens), -1.0, np.float32),
                versions=np.full(len(tokens), event["version"], np.int32),
                finish_reason=FinishReason(event["finish"]) if event["finish"] else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ServerAnswerError(f"no event: {line[:40]!r}") from error


class TinyAdapter:
    name = "tiny"
    expected_version = "1.0"
    distributions = ("msgspec",)
    inner = r" tiny::core$"

    def __init__(self, program: list[str] | None = None, gap_s: float = 0.002) -> None:
        self.program = program or [sys.executable, str(PROGRAM), "{port}"]
        self.gap_s = gap_s

    def command(self, launch: Launch) -> list[str]:
        return [word.replace("{port}", str(launch.port)) for word in self.program]

    def environment(self, launch: Launch) -> dict[str, str]:
        return {"TINY_MEMBER": launch.member}

    def ready(self) -> Call:
        return Call("GET", "/ready")

    def adopt(self, version: int) -> list[Call]:
        return [Call("POST", "/adopt", {"version": version})]

    def generate(self, request: GenerateRequest, served: int) -> Call:
        body = {"id": request.request_id, "prompt": request.prompt.tolist(), "max_tokens": request.max_tokens}
        return Call("POST", "/generate", body | {"gap_s": self.gap_s, "served": served})

    def parser(self, request: GenerateRequest, served: int) -> TinyParser:
        return TinyParser(request)

    def refusal(self, status: int, body: bytes) -> str:
        return f"the tiny server said {status}: {body.decode()}"

    def abort(self, request_id: str) -> Call:
        return Call("POST", "/abort", {"id": request_id})

    def pause(self, keep: PauseMode) -> list[Call]:
        return [Call("POST", "/pause", {"keep": keep.value})]

    def resume(self) -> list[Call]:
        return [Call("POST", "/resume", {})]

    def stage(self, offer: bytes, member: str) -> list[Call]:
        from weight_sync.transports.protocol import decode_offer

        version = decode_offer(offer).manifest.version
        return [Call("POST", "/stage", {"version": version, "member": member}, poll_s=0.01)]

    def commit(self, version: int, kv: KvPolicy) -> list[Call]:
        return [Call("POST", "/commit", {"version": version, "kv": kv.value})]

    def boundaries(self, call: Call, body: bytes) -> dict[str, int]:
        return {}

    def check(self, call: Call, body: bytes) -> None:
        if _json(body).get("ok") is not True:
            raise ServerAnswerError(f"{call.path}: {_json(body).get('why')}")

    def pending(self, call: Call, body: bytes) -> bool:
        return bool(_json(body).get("pending"))

    def identity(self) -> Call:
        return Call("GET", "/identity")

    def parse_identity(self, body: bytes) -> ServerIdentity:
        return ServerIdentity(version=_json(body)["version"], max_len=_json(body)["max_len"])

    def served(self) -> Call:
        return Call("GET", "/served")

    def parse_served(self, body: bytes) -> int:
        return int(_json(body)["version"])

    def metrics(self) -> Call:
        return Call("GET", "/metrics")

    def parse_metrics(self, body: bytes) -> ServerCounters:
        return ServerCounters(running=_json(body)["running"])


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise ServerAnswerError(f"no JSON: {body[:40]!r}") from error
