"""Calls and answers as they were exchanged with a real SGLang server (`record_golden.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Call, ServerAnswerError
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "sglang"
ADAPTER = SglangAdapter(SglangConfig())
REFUSED = {"too-long": "context length", "budget-too-long": "context length"}
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"nothing is recorded in {GOLDEN}: run record_golden.py")
GENERATIONS = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("control-"))
ANSWERED = [name for name in GENERATIONS if name not in REFUSED]


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
    if name == "two-versions":
        parser.switched(1, None)
    return [*parser.feed(record["answer"].encode()), *parser.finish()]


def tokens(name: str) -> list[int]:
    return [int(token) for chunk in chunks(name) for token in chunk.tokens]


def call_of(name: str) -> Call:
    return Call(**golden(name)["call"])


def test_all_were_recorded() -> None:
    assert len(ANSWERED) >= 11
    assert set(REFUSED) <= set(GENERATIONS)


@pytest.mark.parametrize("name", GENERATIONS)
def test_requests_are_built_as_they_were_sent(name: str) -> None:
    record = golden(name)
    call = ADAPTER.generate(asked(record), 0)
    assert record["call"] == {"method": call.method, "path": call.path, "body": call.body}


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_have_ids_log_probabilities_and_versions(name: str) -> None:
    parts = chunks(name)
    for part in parts:
        assert len(part.tokens) == len(part.logprobs) == len(part.versions)
        assert (part.logprobs <= 0).all()
    assert parts[-1].finish_reason is not None
    assert sum(len(part.tokens) for part in parts) <= asked(golden(name)).max_tokens


def test_how_they_ended() -> None:
    ends = {name: chunks(name)[-1].finish_reason for name in ANSWERED}
    assert ends["greedy"] is FinishReason.LENGTH
    assert ends["stop-id"] is ends["stop-string"] is FinishReason.STOP
    assert ends["aborted"] is ends["aborted-before-the-first-token"] is FinishReason.ABORT
    assert len(tokens("greedy")) == 20
    assert len(tokens("one-token")) == 1
    assert 0 < len(tokens("aborted")) < 400
    assert tokens("aborted-before-the-first-token") == []


def test_the_tokens_of_a_stop_string_are_kept() -> None:
    record = golden("stop-string")
    assert chunks("stop-string")[-1].stop_match == record["request"]["stop"][0]
    unstopped = tokens("sampled")
    assert tokens("stop-string") == unstopped[: len(tokens("stop-string"))]
    assert 1 <= len(tokens("stop-string")) < len(unstopped)
    assert tokens("stop-id") == tokens("greedy")[:1]


def test_tokens_come_in_portions() -> None:
    sizes = [len(part.tokens) for part in chunks("greedy")]
    assert len(sizes) > 1
    assert max(sizes) <= 16


def test_what_was_found_in_the_prefix_cache_is_counted() -> None:
    assert chunks("cached")[-1].cached_tokens + chunks("cached")[0].cached_tokens >= 64


def test_log_probabilities_of_filtered_requests_are_those_after_the_filters() -> None:
    """Of what the server says twice, the parser takes the other one."""
    for name in ("filtered", "top-p"):
        said = [json.loads(line[6:]) for line in golden(name)["answer"].split("\n\n") if line.startswith("data: {")]
        before = [entry[0] for event in said for entry in event["meta_info"]["output_token_logprobs"]]
        after = np.concatenate([chunk.logprobs for chunk in chunks(name)])
        assert len(before) == len(after) == 20
        assert (after >= np.array(before, np.float32) - 1e-6).all()
        assert after.sum() > sum(before) + 0.5


def test_a_version_that_changes_midway() -> None:
    versions = np.concatenate([chunk.versions for chunk in chunks("two-versions")])
    assert set(versions) == {0, 1}
    assert (np.diff(versions) >= 0).all()
    assert len(versions) == 400


@pytest.mark.parametrize(("name", "reason"), sorted(REFUSED.items()))
def test_what_cannot_be_served_is_refused_with_the_reason(name: str, reason: str) -> None:
    record = golden(name)
    told = (
        ADAPTER.refusal(record["status"], record["answer"].encode())
        if record["status"] != 200
        else str(chunks(name)[-1].error)
    )
    assert reason in told


def test_control_answers() -> None:
    for name in ("ready", "pause", "ready-while-paused", "begin", "update", "end", "resume", "state"):
        record = golden(f"control-{name}")
        assert record["status"] == 200, name
        ADAPTER.check(call_of(f"control-{name}"), record["answer"].encode())
    assert not ADAPTER.pending(call_of("control-state"), golden("control-state")["answer"].encode())
    assert ADAPTER.parse_served(golden("control-served")["answer"].encode()) == 0
    identity = ADAPTER.parse_identity(golden("control-identity")["answer"].encode())
    assert (identity.version, identity.model) == (ADAPTER.expected_version, "/model")
    assert identity.max_len is not None
    counters = ADAPTER.parse_metrics(golden("control-metrics")["answer"].encode())
    assert counters.generated_tokens > 0
    assert counters.prefill_tokens > 0
    assert counters.cached_tokens >= 64


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stage-refused", "not an offer of weights"),
        ("commit-refused", "version 99"),
        ("update-outside", "begin_weight_update"),
    ],
)
def test_refused_updates_are_errors_with_the_reason(name: str, reason: str) -> None:
    record = golden(f"control-{name}")
    told = record["answer"]
    if record["status"] == 200:
        with pytest.raises(ServerAnswerError) as raised:
            ADAPTER.check(call_of(f"control-{name}"), record["answer"].encode())
        told = str(raised.value)
    assert reason in told
