"""What the adapters of all servers share: command lines, event streams, metrics pages."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.servers.arguments import check_arguments, merged, to_command
from rollout_workers.engines.servers.event_stream import EventStream
from rollout_workers.engines.servers.prometheus import first, samples


def test_a_command_line() -> None:
    args: dict[str, Any] = {
        "max_len": 5,
        "eager": True,
        "off": False,
        "unset": None,
        "nested": {"a": [1]},
        "names": ["x", "y"],
        "share": 0.5,
    }
    assert to_command(args) == (
        ["--max-len", "5", "--eager", "--nested", '{"a":[1]}', "--names", '["x","y"]', "--share", "0.5"]
    )
    assert to_command({"names": ["x", "y"]}, lists_as_words=True) == ["--names", "x", "y"]


def test_the_users_arguments_win_in_either_spelling() -> None:
    assert merged({"a-b": 1, "c": 2}, {"a_b": 3, "--d": 4}) == {"a_b": 3, "c": 2, "d": 4}


def test_owned_arguments_are_refused_with_the_reason() -> None:
    owned = {"model_path": "set model.path"}
    check_arguments("engines.x.args", {"other": 1}, owned)
    with pytest.raises(ValueError, match=r"engines\.x\.args\.--model-path: set model\.path"):
        check_arguments("engines.x.args", {"--model-path": 1}, owned)
    with pytest.raises(ValueError, match="no argument name"):
        check_arguments("engines.x.args", {"": 1}, owned)


@given(st.lists(st.dictionaries(st.text(max_size=4), st.integers()), max_size=6), st.data())
def test_events_in_any_cut(objects: list[dict[str, int]], data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n: ping\n"]), min_size=len(objects) + 1))
    lines = [b"data: " + json.dumps(item).encode() + end for item, end in zip(objects, ends, strict=False)]
    stream = b"".join([*lines, b"data: [DONE]\n\n"])
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8))), len(stream)]
    events = EventStream()
    payloads = [payload for begin, end in itertools.pairwise(edges) for payload in events.feed(stream[begin:end])]
    assert [json.loads(payload) for payload in payloads + events.finish()] == objects
    assert events.done


def test_what_is_no_event_stream() -> None:
    with pytest.raises(ServerAnswerError, match="no event"):
        EventStream().feed(b"<html>\n")
    cut = EventStream()
    cut.feed(b"half a li")
    with pytest.raises(ServerAnswerError, match="no event"):
        cut.finish()
    with pytest.raises(ServerAnswerError, match="after the end"):
        EventStream().feed(b"data: [DONE]\ndata: 1\n")
    with pytest.raises(ServerAnswerError, match="more than 10 bytes"):
        EventStream(max_event_bytes=10).feed(b"data: 12345678\n")


def test_a_metrics_page() -> None:
    page = b'# HELP a text\na{x="1"} 2.5\na{x="2",y="}"} 1\nb 3e2 1700000000000\nc NaN\n\n'
    values = samples(page)
    assert (values["a"], values["b"]) == (3.5, 300.0)
    assert first(values, ["absent", "b", "a"]) == 300.0
    assert first(values, ["absent"]) == 0.0


@pytest.mark.parametrize("page", [b"<html>", b"a b c d", b"\xff", b"a x"])
def test_what_is_no_metrics_page(page: bytes) -> None:
    with pytest.raises(ServerAnswerError):
        samples(page)
