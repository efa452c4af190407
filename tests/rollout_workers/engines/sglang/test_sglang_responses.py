from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_streams import Answer, encoded, request

from rollout_workers.engines.protocol import FinishReason, TokenChunk
from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.sglang.responses import SglangStreamParser


def parse(data: bytes, cuts: list[int] | None = None, **changes: Any) -> list[TokenChunk]:
    parser = SglangStreamParser(request(**changes), 0)
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
def answers(draw: st.DrawFn) -> Answer:
    length = draw(st.integers(1, 30))
    ids = draw(st.lists(st.integers(0, 383), min_size=length, max_size=length))
    logprobs = [float(np.float32(-0.01 * (token + 1))) for token in ids]
    reports = sorted({*draw(st.lists(st.integers(1, length), max_size=5)), length})
    starts = sorted({0, *draw(st.lists(st.integers(1, length), max_size=3))})
    first = draw(st.integers(0, 5))
    finish = draw(
        st.sampled_from(
            [{"type": "length", "length": length}, {"type": "stop", "matched": 2}, {"type": "stop", "matched": "</a>"}]
        )
    )
    return Answer(
        ids=ids,
        logprobs=logprobs,
        reports=reports,
        switches=[(start, first + step) for step, start in enumerate(starts)],
        finish=finish,
        incremental=draw(st.booleans()),
        cached=draw(st.integers(0, 3)),
    )


@given(answers(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_the_bytes_gives_the_same_tokens(answer: Answer, data: st.DataObject) -> None:
    stream = encoded(answer.events())
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    chunks = parse(stream, cuts)
    assert whole(chunks) == (answer.ids, answer.logprobs, answer.versions())
    assert [chunk.cached_tokens for chunk in chunks] == [answer.cached] + [0] * (len(chunks) - 1)
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    uncut = parse(stream)
    assert [len(chunk.tokens) for chunk in uncut] == [len(chunk.tokens) for chunk in chunks]


@given(answers(), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_one_kind_of_error(answer: Answer, data: st.DataObject) -> None:
    """Bytes changed, lost or put in: the parser yields tokens or raises ServerAnswerError, nothing else."""
    stream = bytearray(encoded(answer.events()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(stream)))
        match data.draw(st.sampled_from(["insert", "delete", "cut"])):
            case "insert":
                stream[place:place] = data.draw(st.binary(max_size=8))
            case "delete":
                del stream[place : place + data.draw(st.integers(1, 60))]
            case _:
                del stream[place:]
    try:
        chunks = parse(bytes(stream))
    except ServerAnswerError:
        return
    ids, logprobs, versions = whole(chunks)
    assert len(ids) == len(logprobs) == len(versions)


def test_finish_reasons() -> None:
    def last(finish: dict[str, Any]) -> TokenChunk:
        answer = Answer([9, 2], [-1.0, -2.0], [2], [(0, 4)], finish=finish)
        return parse(encoded(answer.events()))[-1]

    stopped = last({"type": "stop", "matched": "</a>"})
    assert (stopped.finish_reason, stopped.stop_match, len(stopped.tokens)) == (FinishReason.STOP, "</a>", 2)
    assert last({"type": "stop", "matched": 2}).stop_match is None
    assert last({"type": "length", "length": 2}).finish_reason is FinishReason.LENGTH
    aborted = last({"type": "abort", "message": "Aborted", "status_code": None})
    assert (aborted.finish_reason, aborted.error, len(aborted.tokens)) == (FinishReason.ABORT, None, 2)
    refused = last({"type": "abort", "message": "no memory left", "status_code": 503})
    assert (refused.finish_reason, refused.error) == (FinishReason.ERROR, "no memory left")


def test_abort_before_the_first_token_and_in_the_queue() -> None:
    name = "5:e1.t0"
    finish = {"type": "abort", "message": "Abort before prefill"}
    empty = {"text": "", "output_ids": [], "meta_info": {"id": name, "finish_reason": finish}}
    (chunk,) = parse(encoded([empty]))
    assert (chunk.finish_reason, len(chunk.tokens)) == (FinishReason.ABORT, 0)
    first = Answer([9, 8], [-1.0, -2.0], [2], [(0, 4)]).events()[0]
    first["meta_info"]["finish_reason"] = None
    repeated = {"text": "", "output_ids": [9, 8], "meta_info": {"id": name, "finish_reason": finish}}
    chunks = parse(encoded([first, repeated]))
    assert whole(chunks)[0] == [9, 8]
    assert chunks[-1].finish_reason is FinishReason.ABORT


def test_an_error_event_ends_the_request_with_its_text() -> None:
    (chunk,) = parse(encoded([{"error": {"message": "The input (600 tokens) is longer than the context length"}}]))
    assert chunk.finish_reason is FinishReason.ERROR
    assert chunk.error is not None
    assert "600 tokens" in chunk.error


def test_log_probabilities_that_are_not_finite_are_an_error_of_the_request() -> None:
    event = Answer([9, 8], [-1.0, -2.0], [2], [(0, 4)]).events()[0]
    event["meta_info"]["output_token_logprobs"][1][0] = None
    (chunk,) = parse(encoded([event]))
    assert (chunk.finish_reason, len(chunk.tokens)) == (FinishReason.ERROR, 0)
    assert chunk.error is not None
    assert "not finite" in chunk.error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"output_token_logprobs": [[-1.0, 9, None], [-1.0, 7, None]]}, "other tokens"),
        ({"output_token_logprobs": [[-1.0, 9, None]]}, "2 ids and 1 log-probabilities"),
        ({"completion_tokens": 7}, "7 tokens are said"),
        ({"weight_versions": None}, "which weights sampled"),
        ({"weight_versions": [{"version": "4", "start": 0, "end": 1}]}, "which weights sampled"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "'default'"),
        ({"id": "5:other"}, "'5:other'"),
        ({"finish_reason": {"type": "tired"}}, "'tired'"),
    ],
)
def test_contradictions_in_an_event_are_named(change: dict[str, Any], says: str) -> None:
    event = Answer([9, 8], [-1.0, -2.0], [2], [(0, 4)]).events()[0]
    event["meta_info"] |= change
    with pytest.raises(ServerAnswerError, match=says):
        parse(encoded([event]))


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"", "without a finish reason"),
        (b"<html>Bad gateway</html>\n", "no event of a stream"),
        (b"data: {not json}\n\n", "no answer of /generate"),
        (b'data: {"output_ids": [1]}\n\n', "without meta_info"),
        (b'data: {"output_ids": [1.5], "meta_info": {"id": "5:e1.t0"}}\n\n', "no answer of /generate"),
        (b"data: [DONE]\n\ndata: {}\n\n", "after the end of the stream"),
        (
            encoded(Answer([9], [-1.0], [1], [(0, 4)]).events()).replace(b"data: [DONE]", b"data: {}"),
            "after the finish",
        ),
    ],
)
def test_garbage_is_named(stream: bytes, says: str) -> None:
    with pytest.raises(ServerAnswerError, match=says):
        parse(stream)


def test_an_event_without_end_is_bounded() -> None:
    parser = SglangStreamParser(request(), 0)
    for _ in range(32):
        assert parser.feed(b" " * (1 << 20)) == []
    with pytest.raises(ServerAnswerError, match="more than"):
        parser.feed(b" ")


def test_every_event_is_json_that_the_parser_needs_no_more_of() -> None:
    """Fields that SGLang adds are passed over."""
    event = Answer([9], [-1.0], [1], [(0, 4)]).events()[0]
    event["meta_info"] |= {"e2e_latency": 0.1, "new_field": {"a": [1]}}
    event["routed_experts"] = None
    assert json.loads(json.dumps(event)) == event
    assert len(parse(encoded([event]))) == 1


def test_filtered_requests_take_the_log_probabilities_after_the_filter() -> None:
    event = Answer([9, 8], [-1.0, -2.0], [2], [(0, 4)]).events()[0]
    with pytest.raises(ServerAnswerError, match="top_p=1"):
        parse(encoded([event]), top_p=0.9)
    event["meta_info"]["output_token_sampling_logprobs"] = [-0.5, -0.25]
    (chunk,) = parse(encoded([event]), top_k=3)
    assert chunk.logprobs.tolist() == [-0.5, -0.25]
    (plain,) = parse(encoded([event]))
    assert plain.logprobs.tolist() == [-1.0, -2.0]
    (greedy,) = parse(encoded([event]), top_k=3, temperature=0.0)
    assert greedy.logprobs.tolist() == [-1.0, -2.0]
