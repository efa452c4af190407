"""Streams as vLLM's token endpoint writes them, for the tests of what reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout_workers.engines.protocol import GenerateRequest


def request(**changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {
        "request_id": "episode-3/0/turn-1",
        "session_id": "episode-3/0",
        "prompt": np.array([5, 6, 7, 8], np.int32),
        "max_tokens": 64,
        "seed": 11,
    }
    return GenerateRequest(**values | changes)


@dataclass
class Answer:
    """One answer: ``reports`` are the numbers of tokens after which an event is written, ``switches`` (token, version)."""

    ids: list[int]
    logprobs: list[float]
    reports: list[int]
    switches: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    finish: str | None = "length"
    cached: int = 0

    def versions(self) -> list[int]:
        """Which version sampled each token."""
        versions = [0] * len(self.ids)
        for start, version in self.switches:
            versions[start:] = [version] * (len(self.ids) - start)
        return versions

    def spans(self) -> list[dict[str, Any]]:
        starts = [*(start for start, _ in self.switches if start < len(self.ids)), len(self.ids)]
        return [
            {"version": str(version), "start": start, "end": end}
            for (_, version), start, end in zip(self.switches, starts, starts[1:], strict=False)
            if end > start
        ]

    def events(self) -> list[dict[str, Any]]:
        made, before = [], 0
        for upto in self.reports:
            last = upto == self.reports[-1]
            content = [
                {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
                for token, logprob in zip(self.ids[before:upto], self.logprobs[before:upto], strict=True)
            ]
            choice = {
                "index": 0,
                "finish_reason": self.finish if last else None,
                "token_ids": self.ids[before:upto],
                "logprobs": {"content": content},
                "weight_versions": self.spans() if last and self.finish else None,
            }
            made.append({"request_id": "generate-tokens-x", "choices": [choice], "usage": None})
            before = upto
        usage = {"prompt_tokens": 4, "prompt_tokens_details": {"cached_tokens": self.cached}}
        made.append({"request_id": "generate-tokens-x", "choices": [], "usage": usage})
        return made


def encoded(events: list[dict[str, Any]], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()
