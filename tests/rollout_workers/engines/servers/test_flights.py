"""What is kept of a request on its way: nothing lost, nothing twice, budgets kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.servers.errors import ServerAnswerError, ServerFailed, ServerRefused, ServerUnreachable
from rollout_workers.engines.servers.flights import (
    ATTEMPTS,
    FINAL_FAILURES,
    Flight,
    Patience,
    Verdict,
    choose_kv,
    delay_before,
)


def request(prompt: int = 3, max_tokens: int = 100) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", session_id="s", prompt=np.arange(prompt, dtype=np.int32), max_tokens=max_tokens
    )


def chunk(tokens: list[int], finish: FinishReason | None = None, cached: int = 0) -> TokenChunk:
    return TokenChunk(
        request_id="whatever the server calls it",
        tokens=np.array(tokens, np.int32),
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.zeros(len(tokens), np.int32),
        finish_reason=finish,
        cached_tokens=cached,
    )


@given(
    parts=st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=12),
    failures=st.sets(st.integers(0, 12)),
    every=st.integers(1, 6),
)
def test_what_is_reported_is_what_came_whatever_failed_in_between(
    parts: list[list[int]], failures: set[int], every: int
) -> None:
    flight = Flight(request(), "client", every, 0.0)
    asked = flight.begin(0.0)
    came: list[int] = []
    reported: list[TokenChunk] = []
    for index, part in enumerate(parts):
        reported += flight.take([chunk(part, cached=5)])
        came += part
        assert len(came) - sum(len(each.tokens) for each in reported) < every
        if index in failures:
            asked = flight.begin(float(index))
            if asked is None:
                assert len(came) >= 100
                break
            assert asked.prompt.tolist() == [0, 1, 2, *came]
            assert asked.max_tokens == 100 - len(came)
            assert asked.request_id == flight.server_id != "r"
    reported.append(flight.end(FinishReason.ABORT))
    assert [token for each in reported for token in each.tokens.tolist()] == came
    assert {each.request_id for each in reported} == {"r"}
    assert [each.finish_reason for each in reported[:-1]] == [None] * (len(reported) - 1)
    assert sum(each.cached_tokens for each in reported) == (5 if parts else 0)


def test_a_finished_request_reports_all_it_held() -> None:
    flight = Flight(request(), "client", 16, 0.0)
    assert flight.take([chunk([1]), chunk([2])]) == []
    (last,) = flight.take([chunk([3], FinishReason.STOP)])
    assert last.tokens.tolist() == [1, 2, 3]
    assert last.finish_reason is FinishReason.STOP
    assert flight.flush() == []


def test_nothing_is_left_to_ask_for_when_the_budget_is_spent() -> None:
    flight = Flight(request(max_tokens=2), "client", 16, 0.0)
    flight.begin(0.0)
    flight.take([chunk([1, 2])])
    assert flight.begin(1.0) is None
    assert flight.end(FinishReason.LENGTH).tokens.tolist() == [1, 2]


def test_a_refusal_is_final_and_no_mark_against_the_server() -> None:
    patience = Patience()
    for _ in range(FINAL_FAILURES + 1):
        assert patience.judge(ServerRefused("too long"), 1) is Verdict.FAIL


@pytest.mark.parametrize("error", [ServerFailed("500"), ServerAnswerError("garbage")])
def test_failures_are_tried_again_then_fail_then_end_the_server(error: Exception) -> None:
    patience = Patience()
    verdicts = []
    for _ in range(FINAL_FAILURES):
        verdicts += [patience.judge(error, attempt) for attempt in range(1, ATTEMPTS + 1)]
    each = [Verdict.AGAIN] * (ATTEMPTS - 1)
    assert verdicts == [*each, Verdict.FAIL] * (FINAL_FAILURES - 1) + [*each, Verdict.DEAD]


def test_a_request_that_was_served_wipes_the_slate() -> None:
    patience = Patience()
    for _ in range(FINAL_FAILURES * 2):
        assert patience.judge(ServerFailed("500"), ATTEMPTS) is Verdict.FAIL
        patience.served()


def test_a_server_that_cannot_be_reached_is_dead() -> None:
    patience = Patience()
    assert patience.judge(ServerUnreachable("refused"), 1) is Verdict.AGAIN
    assert patience.judge(ServerUnreachable("refused"), ATTEMPTS) is Verdict.DEAD


def test_later_attempts_wait_longer() -> None:
    delays = [delay_before(attempt) for attempt in range(2, ATTEMPTS + 1)]
    assert delays == sorted(delays)
    assert delays[0] > 0


def test_auto_recomputes_short_contexts_and_keeps_long_ones_near_their_end() -> None:
    young, old = Flight(request(10, 100), "c", 1, 0.0), Flight(request(3000, 100), "c", 1, 0.0)
    old.take([chunk(list(range(90)))])
    assert choose_kv(KvPolicy.AUTO, [young]) is KvPolicy.RECOMPUTE
    assert choose_kv(KvPolicy.AUTO, [old]) is KvPolicy.KEEP
    assert choose_kv(KvPolicy.AUTO, []) is KvPolicy.RECOMPUTE
    assert choose_kv(KvPolicy.KEEP, [young]) is KvPolicy.KEEP
