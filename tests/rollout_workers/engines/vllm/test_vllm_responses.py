from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from vllm_streams import Answer, encoded, request

from rollout_workers.engines.protocol import FinishReason, TokenChunk
from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.vllm.responses import VllmStreamParser, error_text
from rollout_workers.engines.vllm.stops import Stops


def parse(data: bytes, cuts: list[int] | None = None, served: int = 0, **changes: Any) -> list[TokenChunk]:
    parser = VllmStreamParser(request(**changes), served)
    edges = [0, *sorted(cuts or []), len(data)]
    chunks = [chunk for begin, end in itertools.pairwise(edges) for chunk in parser.feed(data[begin:end])]
    return chunks + parser.finish()


def whole(chunks: list[TokenChunk]) -> tuple[list[int], list[float], list[int]]:
    return (
        [int(token) for chunk in chunks for token in chunk.tokens],
        [float(logprob) for chunk in chunks for logprob in chunk.logprobs],
        [int(version) for chunk in chunks for version in chunk.versions],
    )


@st.composite
def answers(draw: st.DrawFn, switched: bool = False) -> Answer:
    length = draw(st.integers(1, 30))
    ids = draw(st.lists(st.integers(0, 383), min_size=length, max_size=length))
    later = draw(st.lists(st.integers(0, length), max_size=3, unique=True)) if switched else []
    first = draw(st.integers(0, 5))
    return Answer(
        ids=ids,
        logprobs=[float(np.float32(-0.01 * (token + 1))) for token in ids],
        reports=sorted({*draw(st.lists(st.integers(1, length), max_size=5)), length}),
        switches=[(0, first), *((start, first + 1 + step) for step, start in enumerate(sorted(later)))],
        finish=draw(st.sampled_from(["length", "stop", "abort"])),
        cached=draw(st.integers(0, 3)),
    )


@given(answers(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_the_bytes_gives_the_same_tokens(answer: Answer, data: st.DataObject) -> None:
    stream = encoded(answer.events())
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    chunks = parse(stream, cuts, served=answer.switches[0][1])
    assert whole(chunks) == (answer.ids, answer.logprobs, answer.versions())
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == answer.finish
    assert chunks[-1].cached_tokens == answer.cached
    assert {chunk.request_id for chunk in chunks} == {request().request_id}


@given(answers(switched=True), st.data())
@settings(max_examples=300, deadline=None)
def test_commits_in_the_stream_stamp_every_token_with_what_sampled_it(answer: Answer, data: st.DataObject) -> None:
    """Events of tokens sampled before a commit may arrive before or after the parser hears of it."""
    parser = VllmStreamParser(request(), answer.switches[0][1])
    events, chunks, sent = answer.events(), list[TokenChunk](), 0
    said = data.draw(st.booleans(), label="the server says how many tokens each request has")
    for start, version in answer.switches[1:]:
        arrivable = [index for index in range(sent, len(answer.reports)) if answer.reports[index] <= start]
        ahead = data.draw(st.integers(0, len(arrivable)))
        chunks += parser.feed(encoded(events[sent : sent + ahead], done=False))
        sent += ahead
        chunks += parser.switched(version, start if said else None)
    early = whole(chunks)
    chunks += parser.feed(encoded(events[sent:]))
    chunks += parser.finish()
    assert whole(chunks) == (answer.ids, answer.logprobs, answer.versions())
    assert early[2] == answer.versions()[: len(early[2])]
    if said:
        due = answer.reports[-2] if len(answer.reports) > 1 else 0
        assert sum(len(chunk.tokens) for chunk in chunks[:-1]) >= due, "what is certain is not held back"


def test_tokens_that_two_versions_may_have_sampled_wait_for_the_server_s_word() -> None:
    answer = Answer([1, 2, 3, 4], [-0.5] * 4, reports=[1, 2, 4], switches=[(0, 7), (2, 8)])
    events = answer.events()
    parser = VllmStreamParser(request(), 7)
    assert [len(chunk.tokens) for chunk in parser.feed(encoded(events[:1], done=False))] == [1]
    assert parser.switched(8, None) == []
    assert parser.feed(encoded(events[1:2], done=False)) == []
    (last,) = parser.feed(encoded(events[2:]))
    assert last.versions.tolist() == [7, 8, 8]


def test_a_version_reported_wrongly_is_an_error_and_not_a_wrong_record() -> None:
    answer = Answer([1, 2, 3], [-0.5] * 3, reports=[2, 3], switches=[(0, 7), (1, 8)])
    with pytest.raises(ServerAnswerError, match="token 1 was reported with version 7; in the end the server says 8"):
        parse(encoded(answer.events()), served=7)


def test_fewer_sampled_than_arrived_is_a_contradiction() -> None:
    parser = VllmStreamParser(request(), 0)
    parser.feed(encoded(Answer([1, 2, 3], [-0.5] * 3, reports=[2, 3]).events()[:1], done=False))
    with pytest.raises(ServerAnswerError, match="2 tokens arrived of which the server says that it sampled 1"):
        parser.switched(1, 1)


def test_an_abort_without_new_tokens_has_no_event_of_its_own() -> None:
    events = Answer([1, 2], [-0.5] * 2, reports=[2], finish=None).events()
    chunks = parse(encoded(events), served=3)
    assert whole(chunks) == ([1, 2], [-0.5, -0.5], [3, 3])
    assert chunks[-1].finish_reason is FinishReason.ABORT
    assert [chunk.finish_reason for chunk in parse(encoded([]))] == [FinishReason.ABORT]


def test_an_abort_in_the_moment_of_a_commit_leaves_out_what_nobody_says_the_version_of() -> None:
    events = Answer([1, 2, 3], [-0.5] * 3, reports=[1, 3], finish=None).events()
    parser = VllmStreamParser(request(), 0)
    chunks = parser.feed(encoded(events[:1], done=False)) + parser.switched(1, None)
    chunks += parser.feed(encoded(events[1:]))
    assert whole(chunks) == ([1], [-0.5], [0])
    assert chunks[-1].finish_reason is FinishReason.ABORT


def test_an_answer_that_breaks_off_is_an_error() -> None:
    events = Answer([1, 2], [-0.5] * 2, reports=[1, 2]).events()
    with pytest.raises(ServerAnswerError, match="after 1 tokens without a finish reason"):
        parse(encoded(events[:1], done=False))


def test_the_end_of_the_stream_may_stand_for_its_last_line() -> None:
    events = Answer([1, 2], [-0.5] * 2, reports=[2]).events()
    assert parse(encoded(events, done=False))[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"finish_reason": "tired"}, "unknown finish reason"),
        ({"token_ids": [1, 2, 3]}, "log-probabilities that are not of the 3 tokens"),
        ({"logprobs": None}, "0 log-probabilities"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "'default', which is no number"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 1}]}, "does not say which weights sampled"),
        ({"weight_versions": [{"version": str(2**40), "start": 0, "end": 2}]}, "no number that Millrace gave"),
        ({"token_ids": ["x"]}, "no answer of"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], named: str) -> None:
    events = Answer([1, 2], [-0.5] * 2, reports=[2]).events()
    events[0]["choices"][0] |= change
    with pytest.raises(ServerAnswerError, match=named):
        parse(encoded(events))


def test_more_tokens_than_asked_for_are_refused() -> None:
    with pytest.raises(ServerAnswerError, match="more than the 2 tokens"):
        parse(encoded(Answer([1, 2, 3], [-0.5] * 3, reports=[3]).events()), max_tokens=2)


def test_tokens_after_the_finish_reason_are_refused() -> None:
    events = Answer([1], [-0.5], reports=[1]).events()
    with pytest.raises(ServerAnswerError, match="after the finish reason"):
        parse(encoded([events[0], events[0]]))


@pytest.mark.parametrize("logprob", [None, -9999.0])
def test_probabilities_that_are_no_numbers_end_the_request(logprob: float | None) -> None:
    events = Answer([1, 2], [-0.5] * 2, reports=[1, 2]).events()
    events[1]["choices"][0]["logprobs"]["content"][0]["logprob"] = logprob
    chunks = parse(encoded(events))
    assert whole(chunks)[0] == [1]
    assert chunks[-1].finish_reason is FinishReason.ERROR
    assert "damaged weights" in (chunks[-1].error or "")


def test_a_refusal_in_the_stream_ends_the_request_and_a_failure_of_the_server_is_one() -> None:
    refused = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}
    (chunk,) = parse(encoded([refused]))
    assert (chunk.finish_reason, chunk.error) == (FinishReason.ERROR, "too long")
    with pytest.raises(ServerAnswerError, match="EngineCore"):
        parse(encoded([{"error": {"message": "EngineCore encountered an issue", "code": 500}}]))


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda data: b"data: " + data + b"\n\n"),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["choices", "error", "usage", "token_ids", "logprobs"]), inner, max_size=3
            )
        ),
        max_leaves=10,
    ).map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n"),
)


@given(st.lists(GARBAGE, max_size=4), answers(), st.data())
@settings(max_examples=300, deadline=None)
def test_garbage_raises_the_one_error_or_ends_the_request(
    garbage: list[bytes], answer: Answer, data: st.DataObject
) -> None:
    stream = encoded(answer.events())
    at = data.draw(st.integers(0, len(stream)))
    try:
        chunks = parse(stream[:at] + b"".join(garbage) + stream[at:], served=answer.switches[0][1])
    except ServerAnswerError:
        return
    assert sum(chunk.finish_reason is not None for chunk in chunks) == 1
    assert whole(chunks)[0] == answer.ids[: len(whole(chunks)[0])]


def byte_tokenizer() -> Tokenizer:
    """One token for each character of ``<>/abc``, in that order."""
    vocabulary = {character: index for index, character in enumerate("<>/abc")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def ids(text: str) -> list[int]:
    return ["<>/abc".index(character) for character in text]


def stopped(text: str, strings: tuple[str, ...], reports: list[int], before: str = "") -> list[TokenChunk]:
    tokens = ids(text)
    answer = Answer(tokens, [-0.5] * len(tokens), reports=reports, finish="stop")
    parser = VllmStreamParser(request(stop=strings), 0, Stops(byte_tokenizer(), strings, ids(before)))
    return parser.feed(encoded(answer.events())) + parser.finish()


def test_the_stop_string_that_ended_a_request_is_named() -> None:
    chunks = stopped("ab</a>", ("</b>", "</a>"), [2, 6])
    assert chunks[-1].stop_match == "</a>"
    assert whole(chunks)[0] == ids("ab</a>")
    assert stopped("abc", ("</b>", "</a>"), [3])[-1].stop_match is None, "it ended with an end-of-sequence token"


def test_a_stop_string_that_began_elsewhere_ends_the_request_where_it_is_complete() -> None:
    chunks = stopped("a>bc", ("</a>",), [1, 2, 4], before="c</")
    assert whole(chunks)[0] == ids("a>")
    assert (chunks[-1].finish_reason, chunks[-1].stop_match) == (FinishReason.STOP, "</a>")


def test_a_stop_string_wholly_in_what_came_before_does_not_count_twice() -> None:
    chunks = stopped("bc</a>", ("</a>",), [6], before="ab<")
    assert whole(chunks)[0] == ids("bc</a>")


def test_without_a_tokenizer_a_single_stop_string_must_have_been_it() -> None:
    assert Stops(None, ("x",)).completed_by([1, 2]) == "x"
    assert Stops(None, ("x", "y")).completed_by([1, 2]) is None
    assert Stops(None, ()).completed_by([1]) is None


def test_what_an_error_answer_says_is_one_line() -> None:
    assert error_text(b'{"error": {"message": "too\\nlong", "code": 400}}') == "too long"
    assert error_text(b'{"detail": "Not Found"}') == "Not Found"
    assert error_text(b"<html>") == "'<html>'"
