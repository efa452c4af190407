"""Calls and answers as they were exchanged with real servers (`golden_answers`): what holds for every kind of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from golden_answers import SERVED, Golden, described

from rollout_workers.engines.protocol import FinishReason
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig

OF_EVERY_KIND = (
    "aborted",
    "aborted-before-the-first-token",
    "budget-too-long",
    "cached",
    "filtered",
    "greedy",
    "one-token",
    "sampled",
    "stop-id",
    "stop-string",
    "temperature",
    "too-long",
    "two-versions",
)


@dataclass(frozen=True)
class Kind:
    golden: Golden
    refused: tuple[str, ...]
    """Generations that the server refuses."""
    own: tuple[str, ...]
    """Those that are not recorded of every kind."""
    control: tuple[str, ...]
    """Control calls that succeed; the last one asks whether weights are still being staged."""

    @property
    def answered(self) -> list[str]:
        return [name for name in self.golden.generations if name not in self.refused]


KINDS = {
    "vllm": Kind(
        Golden(VllmAdapter(VllmConfig())),
        refused=("too-long", "no-token"),
        own=("no-token",),
        control=("ready", "ready-while-paused", "pause", "forget", "resume", "prepare", "adopt", "staged"),
    ),
    "sglang": Kind(
        Golden(SglangAdapter(SglangConfig())),
        refused=("too-long", "budget-too-long"),
        own=("top-p",),
        control=("ready", "pause", "ready-while-paused", "begin", "update", "end", "resume", "state"),
    ),
}
GENERATIONS = [(kind, name) for kind, recorded in KINDS.items() for name in recorded.golden.generations]
ANSWERED = [(kind, name) for kind, recorded in KINDS.items() for name in recorded.answered]


@pytest.fixture(params=KINDS)
def recorded(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def golden(recorded: Kind) -> Golden:
    return recorded.golden


def test_all_were_recorded(recorded: Kind) -> None:
    assert set(recorded.golden.generations) == {*OF_EVERY_KIND, *recorded.own}
    assert set(recorded.refused) <= set(recorded.golden.generations)


@pytest.mark.parametrize(("kind", "name"), GENERATIONS)
def test_requests_are_built_as_they_were_sent(kind: str, name: str) -> None:
    golden = KINDS[kind].golden
    assert described(golden.adapter.generate(golden.asked(name), SERVED)) == described(golden.call(name))


@pytest.mark.parametrize(("kind", "name"), ANSWERED)
def test_answers_have_ids_log_probabilities_and_versions(kind: str, name: str) -> None:
    golden = KINDS[kind].golden
    parts = golden.chunks(name)
    for part in parts:
        assert len(part.tokens) == len(part.logprobs) == len(part.versions)
        assert (part.logprobs <= 0).all()
    assert parts[-1].finish_reason is not None
    assert sum(len(part.tokens) for part in parts) <= golden.asked(name).max_tokens


def test_how_they_ended(recorded: Kind) -> None:
    golden = recorded.golden
    ends = {name: golden.chunks(name)[-1].finish_reason for name in recorded.answered}
    assert ends["greedy"] is FinishReason.LENGTH
    assert ends["stop-id"] is ends["stop-string"] is FinishReason.STOP
    assert ends["aborted"] is ends["aborted-before-the-first-token"] is FinishReason.ABORT
    assert len(golden.tokens("greedy")) == 20
    assert len(golden.tokens("one-token")) == 1
    assert 0 < len(golden.tokens("aborted")) < 400
    assert golden.tokens("aborted-before-the-first-token") == []


def test_tokens_come_in_portions(golden: Golden) -> None:
    sizes = [len(part.tokens) for part in golden.chunks("greedy")]
    assert len(sizes) > 1
    assert max(sizes) <= 16


def test_the_tokens_of_a_stop_string_are_kept(golden: Golden) -> None:
    assert golden.chunks("stop-string")[-1].stop_match == golden.asked("stop-string").stop[0]
    stopped, unstopped = golden.tokens("stop-string"), golden.tokens("sampled")
    assert stopped == unstopped[: len(stopped)]
    assert 1 <= len(stopped) < len(unstopped)
    assert golden.tokens("stop-id") == golden.tokens("greedy")[:1]


def test_a_version_that_changes_midway(golden: Golden) -> None:
    versions = np.concatenate([chunk.versions for chunk in golden.chunks("two-versions")])
    assert set(versions) == {SERVED, SERVED + 1}
    assert (np.diff(versions) >= 0).all()
    assert len(versions) == 400


def test_control_answers(recorded: Kind) -> None:
    golden, adapter = recorded.golden, recorded.golden.adapter
    for name in (f"control-{name}" for name in recorded.control):
        assert golden.record(name)["status"] == 200, name
        adapter.check(golden.call(name), golden.answer(name))
    staged = f"control-{recorded.control[-1]}"
    assert not adapter.pending(golden.call(staged), golden.answer(staged))
    assert adapter.parse_served(golden.answer("control-served")) == SERVED
    identity = adapter.parse_identity(golden.answer("control-identity"))
    assert (identity.version, identity.model) == (adapter.expected_version, "/model")
    assert identity.max_len is not None
    counters = adapter.parse_metrics(golden.answer("control-metrics"))
    assert counters.generated_tokens > 0
    assert counters.prefill_tokens > 0
    assert counters.cached_tokens >= 64
