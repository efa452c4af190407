"""Calls and answers as they were exchanged with a real vLLM server (`record_golden.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Call, ServerAnswerError
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "vllm"
ADAPTER = VllmAdapter(VllmConfig())
REFUSED = {"too-long": "maximum", "no-token": "vocabulary"}
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
    assert len(ANSWERED) >= 10
    assert set(REFUSED) <= set(GENERATIONS)


@pytest.mark.parametrize("name", GENERATIONS)
def test_requests_are_built_as_they_were_sent(name: str) -> None:
    record = golden(name)
    call = ADAPTER.generate(asked(record), 0)
    assert record["call"] == {"method": call.method, "path": call.path, "body": call.body, "query": call.query}


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


def test_tokens_come_in_portions() -> None:
    sizes = [len(part.tokens) for part in chunks("greedy")]
    assert len(sizes) > 1
    assert max(sizes) <= 16


def test_the_tokens_of_a_stop_string_are_kept() -> None:
    record = golden("stop-string")
    assert chunks("stop-string")[-1].stop_match == record["request"]["stop"][0]
    unstopped = tokens("sampled")
    assert tokens("stop-string") == unstopped[: len(tokens("stop-string"))]
    assert 1 <= len(tokens("stop-string")) < len(unstopped)
    assert tokens("stop-id") == tokens("greedy")[:1]


def test_a_version_that_changes_midway() -> None:
    versions = np.concatenate([chunk.versions for chunk in chunks("two-versions")])
    assert set(versions) == {0, 1}
    assert (np.diff(versions) >= 0).all()
    assert len(versions) == 400


def test_what_was_found_in_the_prefix_cache_is_counted() -> None:
    assert chunks("cached")[-1].cached_tokens >= 64
    assert chunks("greedy")[-1].cached_tokens == 0


@pytest.mark.parametrize(("name", "reason"), sorted(REFUSED.items()))
def test_what_cannot_be_served_is_refused_with_the_reason(name: str, reason: str) -> None:
    """A streamed answer begins with 200 and brings the refusal as an event."""
    assert golden(name)["status"] == 200
    (failed,) = chunks(name)
    assert (failed.finish_reason, len(failed.tokens)) == (FinishReason.ERROR, 0)
    assert reason in (failed.error or "")


def test_a_budget_beyond_the_model_s_length_is_cut_in_silence() -> None:
    """So Millrace refuses such a request before a server is asked."""
    assert chunks("budget-too-long")[-1].finish_reason is FinishReason.LENGTH
    assert len(tokens("budget-too-long")) < asked(golden("budget-too-long")).max_tokens


def test_control_answers() -> None:
    for name in ("ready", "ready-while-paused", "pause", "forget", "resume", "prepare", "adopt", "staged"):
        record = golden(f"control-{name}")
        assert record["status"] == 200, name
        ADAPTER.check(call_of(f"control-{name}"), record["answer"].encode())
    assert not ADAPTER.pending(call_of("control-staged"), golden("control-staged")["answer"].encode())
    assert ADAPTER.parse_served(golden("control-served")["answer"].encode()) == 0
    identity = ADAPTER.parse_identity(golden("control-identity")["answer"].encode())
    assert (identity.version, identity.model) == (ADAPTER.expected_version, "/model")
    assert identity.max_len is not None
    counters = ADAPTER.parse_metrics(golden("control-metrics")["answer"].encode())
    assert counters.generated_tokens > 0
    assert counters.prefill_tokens > 0
    assert counters.cached_tokens >= 64


def test_a_refused_offer_is_an_error_of_the_plugin() -> None:
    record = golden("control-begin-refused")
    with pytest.raises(ServerAnswerError, match="not an offer of weights"):
        ADAPTER.check(call_of("control-begin-refused"), record["answer"].encode())
