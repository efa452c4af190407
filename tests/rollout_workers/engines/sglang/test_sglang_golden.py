"""Of what was recorded from a real SGLang server (`record_golden.py`): what only SGLang does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_answers import Golden

from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

GOLDEN = Golden(SglangAdapter(SglangConfig()))


def test_what_was_found_in_the_prefix_cache_is_counted() -> None:
    chunks = GOLDEN.chunks("cached")
    assert chunks[-1].cached_tokens + chunks[0].cached_tokens >= 64


@pytest.mark.parametrize("name", ["filtered", "top-p"])
def test_log_probabilities_of_filtered_requests_are_those_after_the_filters(name: str) -> None:
    """Of what the server says twice, the parser takes the other one."""
    lines = GOLDEN.answer(name).decode().split("\n\n")
    said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    before = [entry[0] for event in said for entry in event["meta_info"]["output_token_logprobs"]]
    after = np.concatenate([chunk.logprobs for chunk in GOLDEN.chunks(name)])
    assert len(before) == len(after) == 20
    assert (after >= np.array(before, np.float32) - 1e-6).all()
    assert after.sum() > sum(before) + 0.5


@pytest.mark.parametrize("name", ["too-long", "budget-too-long"])
def test_what_cannot_be_served_is_refused_with_the_reason(name: str) -> None:
    status, answer = GOLDEN.record(name)["status"], GOLDEN.answer(name)
    told = str(GOLDEN.chunks(name)[-1].error) if status == 200 else GOLDEN.adapter.refusal(status, answer)
    assert "context length" in told


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("control-stage-refused", "not an offer of weights"),
        ("control-commit-refused", "version 99"),
        ("control-update-outside", "begin_weight_update"),
    ],
)
def test_refused_updates_are_errors_with_the_reason(name: str, reason: str) -> None:
    told = GOLDEN.answer(name).decode()
    if GOLDEN.record(name)["status"] == 200:
        with pytest.raises(ServerAnswerError) as raised:
            GOLDEN.adapter.check(GOLDEN.call(name), GOLDEN.answer(name))
        told = str(raised.value)
    assert reason in told
