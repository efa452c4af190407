"""Event streams as SGLang sends them, made from a short description (the recorded ones are under ``golden/sglang``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.sglang.requests import request_name


def request(request_id: str = "e1.t0", **changes: Any) -> GenerateRequest:
    settings: dict[str, Any] = {
        "request_id": request_id,
        "session_id": "e1",
        "prompt": np.array([5, 6, 7], np.int32),
        "max_tokens": 16,
        **changes,
    }
    return GenerateRequest(**settings)


@dataclass
class Answer:
    """An answer of some tokens, reported in steps, sampled by versions that switch at some lengths."""

    ids: list[int]
    logprobs: list[float]
    reports: list[int]
    """Lengths at which the server reports; the last one is the whole length."""
    switches: list[tuple[int, int]]
    """(first token, version), ascending, from token 0."""
    finish: dict[str, Any] = field(default_factory=lambda: {"type": "length", "length": 1})
    incremental: bool = True
    cached: int = 0

    def versions(self) -> list[int]:
        return [max((s for s in self.switches if s[0] <= i), key=lambda s: s[0])[1] for i in range(len(self.ids))]

    def events(self, request_id: str = "e1.t0") -> list[dict[str, Any]]:
        events, sent = [], 0
        for index, length in enumerate(self.reports):
            begin = sent if self.incremental else 0
            last = index == len(self.reports) - 1
            events.append(
                {
                    "text": "",
                    "output_ids": self.ids[begin:length],
                    "meta_info": {
                        "id": request_name(request_id),
                        "finish_reason": self.finish if last else None,
                        "prompt_tokens": 3,
                        "completion_tokens": length,
                        "cached_tokens": self.cached,
                        "output_token_logprobs": [
                            [lp, token, None]
                            for lp, token in zip(self.logprobs[begin:length], self.ids[begin:length], strict=True)
                        ],
                        "weight_versions": self.spans(length),
                    },
                }
            )
            sent = length
        return events

    def spans(self, length: int) -> list[dict[str, Any]]:
        ends = [start for start, _ in self.switches[1:]] + [len(self.ids)]
        spans = [
            {"version": str(version), "start": start, "end": min(end, length)}
            for (start, version), end in zip(self.switches, ends, strict=True)
        ]
        return [span for span in spans if span["start"] < length or span["start"] == 0]


def encoded(events: Sequence[dict[str, Any]]) -> bytes:
    lines = [b"data: " + json.dumps(event).encode() for event in events]
    return b"\n\n".join([*lines, b"data: [DONE]", b""])
