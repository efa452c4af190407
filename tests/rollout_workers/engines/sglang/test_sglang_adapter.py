from __future__ import annotations

import json
from typing import Any

import pytest
from sglang_streams import request

from rollout_workers.engines.protocol import KvPolicy, PauseMode
from rollout_workers.engines.servers.adapter import Call, ServerAdapter, ServerAnswerError
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig
from weight_sync.engine_plugin.sglang_messages import PluginState, decode_command, encode_state

ADAPTER = SglangAdapter(SglangConfig())


def paths(calls: list[Call]) -> list[str]:
    return [call.path for call in calls]


def answer(state: PluginState) -> bytes:
    return json.dumps(encode_state(state)).encode()


def test_it_is_an_adapter() -> None:
    adapter: ServerAdapter = ADAPTER
    assert adapter.name == "sglang"


def test_pause_modes() -> None:
    modes = {keep: ADAPTER.pause(keep)[0].body for keep in PauseMode}
    assert modes == {
        PauseMode.KEEP_KV: {"mode": "in_place"},
        PauseMode.KEEP_REQUESTS: {"mode": "retract"},
        PauseMode.ABORT: {"mode": "abort"},
    }


def test_staging_asks_the_plugin_and_waits_for_it() -> None:
    begin, wait = ADAPTER.stage(b"an offer", "engine-0.1")
    assert begin.body is not None
    command = decode_command(begin.body["name"])
    assert (command.kind, command.offer, command.member) == ("stage", b"an offer", "engine-0.1")
    assert (begin.poll_s, wait.poll_s is not None) == (None, True)
    under_way, ready = answer(PluginState(version=4, staging=True)), answer(PluginState(version=4))
    assert ADAPTER.pending(wait, under_way)
    assert not ADAPTER.pending(wait, ready)
    ADAPTER.check(wait, ready)
    with pytest.raises(ServerAnswerError, match="checksum"):
        ADAPTER.check(wait, answer(PluginState(version=4, error="checksum 00 instead of 01")))


def test_a_commit_keeps_requests_and_flushes_only_what_may_go() -> None:
    keep, recompute = ADAPTER.commit(4, KvPolicy.KEEP), ADAPTER.commit(4, KvPolicy.RECOMPUTE)
    update = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
    assert paths(keep) == ["/get_weights_by_name", *update]
    assert paths(recompute) == ["/get_weights_by_name", "/flush_cache", *update]
    body = keep[2].body
    assert body is not None
    assert (body["weight_version"], body["abort_all_requests"], body["flush_cache"]) == ("4", False, False)


def test_no_call_aborts_what_is_in_flight() -> None:
    calls = [*ADAPTER.adopt(0), *ADAPTER.stage(b"o", "m"), *ADAPTER.commit(1, KvPolicy.RECOMPUTE), *ADAPTER.resume()]
    assert not any((call.body or {}).get("abort_all_requests") for call in calls)
    assert not any((call.body or {}).get("mode") == "abort" for call in calls)


def test_every_rank_is_told() -> None:
    split = SglangAdapter(SglangConfig(args={"tp-size": 4}))
    bodies = [call.body for call in split.commit(4, KvPolicy.KEEP) if call.path == "/update_weights_from_tensor"]
    assert [len(body["serialized_named_tensors"]) for body in bodies if body] == [4]


@pytest.mark.parametrize("path", ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"])
def test_an_update_that_failed_is_an_error(path: str) -> None:
    call = Call("POST", path, {})
    ADAPTER.check(call, b'{"success": true, "message": "Success"}')
    with pytest.raises(ServerAnswerError, match="session"):
        ADAPTER.check(call, b'{"success": false, "message": "no session is open"}')
    for garbage in (b"", b"[]", b"\xff", b"{}"):
        with pytest.raises(ServerAnswerError):
            ADAPTER.check(call, garbage)


@pytest.mark.parametrize("body", [b"", b"null", b"[0.5, 1e300]", b'{"parameter": ["a"]}', b"[123.0]", b"\xff"])
def test_answers_that_are_not_the_plugins(body: bytes) -> None:
    with pytest.raises(ServerAnswerError, match="plugin"):
        ADAPTER.check(ADAPTER.stage(b"o", "m")[0], body)


def test_the_served_version() -> None:
    assert ADAPTER.parse_served(b'{"model_path": "/m", "weight_version": "12"}') == 12
    for body in (b'{"weight_version": "default"}', b"{}"):
        with pytest.raises(ServerAnswerError, match="never gave"):
            ADAPTER.parse_served(body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error": {"message": "The input is\\nlonger than 64 tokens", "code": 400}}', "The input is longer than 64"),
        (b'{"object": "error", "message": "Duplicate request ID"}', "Duplicate request ID"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>502</html>", "<html>502"),
    ],
)
def test_refusals_are_one_line(body: bytes, says: str) -> None:
    told = ADAPTER.refusal(400, body)
    assert says in told
    assert "\n" not in told


def test_metrics() -> None:
    page = b"""# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",tp_rank="0"} 3.0
sglang:num_queue_reqs{model_name="m"} 2.0
sglang:token_usage{model_name="m"} 0.25
sglang:prompt_tokens_total{model_name="m"} 100.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 30.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 10.0
sglang:generation_tokens_total{model_name="m"} 55.0
"""
    counters = ADAPTER.parse_metrics(page)
    assert (counters.running, counters.waiting, counters.kv_used) == (3, 2, 0.25)
    assert (counters.generated_tokens, counters.prefill_tokens, counters.cached_tokens) == (55, 60, 40)


@pytest.mark.parametrize("page", [b"<html>", b"\xff\xfe", b"metric not-a-number"])
def test_a_page_that_is_no_metrics_page(page: bytes) -> None:
    with pytest.raises(ServerAnswerError):
        ADAPTER.parse_metrics(page)


def test_what_a_server_says_it_is() -> None:
    info: dict[str, Any] = {"version": "0.5.23", "model_path": "/m", "context_length": 272}
    identity = ADAPTER.parse_identity(json.dumps(info).encode())
    assert (identity.version, identity.model, identity.max_len) == ("0.5.23", "/m", 256)
    assert ADAPTER.parse_identity(b"{}").version is None
    assert ADAPTER.parse_identity(b"{}").max_len is None
    assert ADAPTER.parse_identity(json.dumps({**info, "max_total_num_tokens": 116}).encode()).max_len == 100
    assert ADAPTER.parse_identity(json.dumps({**info, "max_total_num_tokens": 9999}).encode()) == identity
    assert ADAPTER.parse_identity(json.dumps({**info, "sampling_backend": "pytorch"}).encode()) == identity
    with pytest.raises(ServerAnswerError, match="--sampling-backend pytorch"):
        ADAPTER.parse_identity(json.dumps({**info, "sampling_backend": "flashinfer"}).encode())


def test_a_commit_under_way_changes_nothing_in_a_parser() -> None:
    assert ADAPTER.parser(request(), 0).switched(1, 5) == []
