"""Calls and answers as they were exchanged with a real SGLang server (`record_golden.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "sglang"
ADAPTER = SglangAdapter(SglangConfig())
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"nothing is recorded in {GOLDEN}: run record_golden.py")
GENERATIONS = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("control-"))


def golden(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return record


def asked(record: dict[str, Any]) -> GenerateRequest:
    fields = {**record["request"], "prompt": np.array(record["request"]["prompt"], np.int32)}
    return msgspec.convert(
        fields, GenerateRequest, dec_hook=lambda kind, value: value if isinstance(value, np.ndarray) else kind(value)
    )


def chunks(name: str) -> list[TokenChunk]:
    record = golden(name)
    parser = ADAPTER.parser(asked(record), 0)
    return [*parser.feed(record["answer"].encode()), *parser.finish()]


def tokens(name: str) -> list[int]:
    return [int(token) for chunk in chunks(name) for token in chunk.tokens]


def call_of(name: str) -> Call:
    return Call(**golden(name)["call"])


@pytest.mark.parametrize("name", GENERATIONS)
def test_requests_are_built_as_they_were_sent(name: str) -> None:
    record = golden(name)
    call = ADAPTER.generate(asked(record), 0)
    assert record["call"] == {"method": call.method, "path": call.path, "body": call.body}


@pytest.mark.parametrize("name", [name for name in GENERATIONS if name != "too-long"])
def test_answers_have_ids_log_probabilities_and_versions(name: str) -> None:
    parts = chunks(name)
    for part in parts:
        assert len(part.tokens) == len(part.logprobs) == len(part.versions)
        assert (part.logprobs <= 0).all()
    assert parts[-1].finish_reason is not None
    assert sum(len(part.tokens) for part in parts) <= asked(golden(name)).max_tokens


def test_how_they_ended() -> None:
    last = {name: chunks(name)[-1] for name in GENERATIONS if name != "too-long"}
    ends = {name: chunk.finish_reason for name, chunk in last.items()}
    assert ends["greedy"] is FinishReason.LENGTH
    assert ends["stop-id"] is ends["stop-string"] is FinishReason.STOP
    assert ends["aborted"] is ends["aborted-before-the-first-token"] is FinishReason.ABORT
    assert len(tokens("greedy")) == 20
    assert len(tokens("one-token")) == 1
    assert 0 < len(tokens("aborted")) < 150
    assert tokens("aborted-before-the-first-token") == []


def test_the_tokens_of_a_stop_string_are_kept() -> None:
    record = golden("stop-string")
    assert chunks("stop-string")[-1].stop_match == record["request"]["stop"][0]
    greedy = tokens("greedy")
    assert tokens("stop-string") == greedy[: len(tokens("stop-string"))]
    assert 1 <= len(tokens("stop-string")) <= 4
    assert tokens("stop-id") == greedy[:1]


def test_a_version_that_changes_midway() -> None:
    versions = np.concatenate([chunk.versions for chunk in chunks("two-versions")])
    assert set(versions) == {0, 1}
    assert (np.diff(versions) >= 0).all()
    assert len(versions) == 120


def test_too_long_is_refused_with_the_reason() -> None:
    record = golden("too-long")
    told = (
        ADAPTER.refusal(record["status"], record["answer"].encode())
        if record["status"] != 200
        else str(chunks("too-long")[-1].error)
    )
    assert "context length" in told


def test_control_answers() -> None:
    for name in ("pause", "resume", "begin", "update", "end", "state"):
        record = golden(f"control-{name}")
        assert record["status"] == 200, name
        ADAPTER.check(call_of(f"control-{name}"), record["answer"].encode())
    assert not ADAPTER.pending(call_of("control-state"), golden("control-state")["answer"].encode())
    assert ADAPTER.parse_served(golden("control-served")["answer"].encode()) == 0
    identity = ADAPTER.parse_identity(golden("control-identity")["answer"].encode())
    assert identity.version == ADAPTER.expected_version
    assert identity.max_len is not None
    counters = ADAPTER.parse_metrics(golden("control-metrics")["answer"].encode())
    assert counters.generated_tokens > 0
    assert counters.prefill_tokens > 0
