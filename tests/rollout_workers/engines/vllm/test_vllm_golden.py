"""Of what was recorded from a real vLLM server (`record_golden.py`): what only vLLM does."""

from __future__ import annotations

import pytest
from golden_answers import Golden

from rollout_workers.engines.protocol import FinishReason
from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig

GOLDEN = Golden(VllmAdapter(VllmConfig()))


def test_what_was_found_in_the_prefix_cache_is_counted() -> None:
    assert GOLDEN.chunks("cached")[-1].cached_tokens >= 64
    assert GOLDEN.chunks("greedy")[-1].cached_tokens == 0


@pytest.mark.parametrize(("name", "reason"), [("too-long", "maximum"), ("no-token", "vocabulary")])
def test_what_cannot_be_served_is_refused_with_the_reason(name: str, reason: str) -> None:
    """A streamed answer begins with 200 and brings the refusal as an event."""
    assert GOLDEN.record(name)["status"] == 200
    (failed,) = GOLDEN.chunks(name)
    assert (failed.finish_reason, len(failed.tokens)) == (FinishReason.ERROR, 0)
    assert reason in (failed.error or "")


def test_a_budget_beyond_the_model_s_length_is_cut_in_silence() -> None:
    """So Millrace refuses such a request before a server is asked."""
    assert GOLDEN.chunks("budget-too-long")[-1].finish_reason is FinishReason.LENGTH
    assert len(GOLDEN.tokens("budget-too-long")) < GOLDEN.asked("budget-too-long").max_tokens


def test_a_refused_offer_is_an_error_of_the_plugin() -> None:
    name = "control-begin-refused"
    with pytest.raises(ServerAnswerError, match="not an offer of weights"):
        GOLDEN.adapter.check(GOLDEN.call(name), GOLDEN.answer(name))
