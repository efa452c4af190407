from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_streams import request

from rollout_workers.engines.protocol import KvPolicy, PauseMode
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAnswerError
from rollout_workers.engines.servers.desk import ServerHandoff
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import OWNED, VllmConfig
from rollout_workers.engines.vllm.requests import generate_call, sampling, seed_at
from rollout_workers.engines.vllm.split import decode_call, parse_prefill, prefill_call

LAUNCH = Launch(
    model_path="/models/tiny", host="127.0.0.1", port=8123, member="engine-0.0", device="cpu", python="/env/bin/python"
)
ADAPTER = VllmAdapter(VllmConfig())


def option(words: list[str], name: str) -> str | None:
    """The word after ``--name``; empty for a flag, None if it is not there."""
    if name not in words:
        return None
    at = words.index(name) + 1
    return "" if at == len(words) or words[at].startswith("--") else words[at]


def results(*answers: dict[str, Any]) -> bytes:
    return json.dumps({"results": list(answers)}).encode()


# Requests


def test_a_request_travels_as_token_ids() -> None:
    call = generate_call(request(temperature=0.5, top_p=0.9, top_k=20), served=4)
    body = call.body
    assert body is not None
    assert (call.method, call.path, body["stream"]) == ("POST", "/inference/v1/generate", True)
    assert body["token_ids"] == [5, 6, 7, 8]
    assert {
        key: body["sampling_params"][key] for key in ("temperature", "top_p", "top_k", "max_tokens", "logprobs")
    } == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 64,
        "logprobs": 0,
    }
    json.dumps(body)


def test_versions_do_not_share_a_prefix_cache() -> None:
    salts = [(generate_call(request(), served).body or {})["cache_salt"] for served in (4, 5, 4)]
    assert salts[0] == salts[2] != salts[1]


def test_text_is_made_only_where_stop_strings_need_it() -> None:
    assert sampling(request())["detokenize"] is False
    params = sampling(request(stop=("</a>",), stop_token_ids=(3,)))
    assert (params["detokenize"], params["stop"], params["stop_token_ids"]) == (True, ["</a>"], [3])
    assert params["skip_special_tokens"] is False, "a stop string may be a special token's text"


@given(st.integers(0, 2**64 - 1), st.integers(0, 5000), st.integers(1, 5000))
def test_a_request_that_goes_on_elsewhere_draws_other_numbers(seed: int, position: int, further: int) -> None:
    assert seed_at(seed, position) != seed_at(seed, position + further)
    assert 0 <= seed_at(seed, position) < 2**63


def test_the_same_request_draws_the_same_numbers() -> None:
    assert sampling(request())["seed"] == sampling(request())["seed"] != sampling(request(seed=12))["seed"]


def test_an_abort_names_the_request_as_the_server_does() -> None:
    assert ADAPTER.abort("e/0/1").body == {"request_ids": ["generate-tokens-e/0/1"]}


# The life of a server


def test_what_millrace_sets_is_on_the_command_line() -> None:
    words = ADAPTER.command(LAUNCH)
    assert words[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(words, "--logprobs-mode") == "processed_logprobs"
    assert option(words, "--worker-extension-cls") == "weight_sync.engine_plugin.vllm_extension.MillraceWorker"
    assert option(words, "--dtype") == "float32"
    assert option(words, "--stream-interval") == "16"
    assert option(words, "--enable-scale-out") == ""
    assert option(words, "--enforce-eager") == ""
    assert option(words, "--kv-transfer-config") is None


def test_arguments_pass_through_and_win_over_defaults() -> None:
    config = VllmConfig(args={"enforce_eager": False, "block-size": 64, "compilation_config": {"level": 0}})
    config.validate()
    words = VllmAdapter(config).command(LAUNCH)
    assert option(words, "--enforce-eager") is None
    assert option(words, "--block-size") == "64"
    assert option(words, "--compilation-config") == '{"level":0}'


@pytest.mark.parametrize("name", sorted(OWNED))
def test_arguments_that_millrace_owns_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"engines\.vllm\.args\.{name}: \w+"):
        VllmConfig(args={name: 1}).validate()


def test_every_argument_that_millrace_sets_is_refused_from_others() -> None:
    plain = {word.removeprefix("--").replace("-", "_") for word in ADAPTER.command(LAUNCH) if word.startswith("--")}
    open_to_others = {"enforce_eager", "block_size", "uvicorn_log_level"}
    assert plain - open_to_others <= set(OWNED)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (VllmConfig(urls=["127.0.0.1:80"]), "http://host:port"),
        (VllmConfig(startup_timeout_s=0), "startup_timeout_s=0"),
        (VllmConfig(request_timeout_s=-1), "request_timeout_s=-1"),
        (VllmConfig(args={"a b": 1}), "no argument name"),
    ],
)
def test_bad_settings_are_named(config: VllmConfig, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config.validate()


def test_the_environment_opens_the_control_routes_and_the_configuration_wins() -> None:
    config = VllmConfig(env={"VLLM_CPU_KVCACHE_SPACE": "6"})
    launch = Launch(**{**LAUNCH.__dict__, "threads": 3, "plugin_path": "/repository"})
    variables = VllmAdapter(config).environment(launch)
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "6"
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["PYTHONPATH"] == "/repository"


@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "kv-cache-memory-bytes", "gpu_memory_utilization"])
def test_an_argument_about_the_size_of_the_kv_is_not_overruled_by_a_variable(name: str) -> None:
    assert VllmAdapter(VllmConfig()).environment(LAUNCH)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in VllmAdapter(VllmConfig(args={name: 1})).environment(LAUNCH)


def test_pauses_keep_or_abort() -> None:
    def modes(keep: PauseMode) -> list[tuple[str, dict[str, str] | None]]:
        return [(call.path, call.query) for call in ADAPTER.pause(keep)]

    assert modes(PauseMode.KEEP_KV) == [("/pause", {"mode": "keep", "clear_cache": "false"})]
    assert modes(PauseMode.ABORT) == [("/pause", {"mode": "abort", "clear_cache": "false"})]
    assert modes(PauseMode.KEEP_REQUESTS) == [
        ("/pause", {"mode": "keep", "clear_cache": "false"}),
        ("/reset_prefix_cache", {"reset_running_requests": "true"}),
    ]


def test_a_stage_is_asked_after_until_it_has_ended() -> None:
    begin, ask = ADAPTER.stage(b"\x00offer", "engine-0.0")
    assert begin.body == {"method": "millrace_stage", "args": [base64.b64encode(b"\x00offer").decode(), "engine-0.0"]}
    assert ask.poll_s is not None
    assert ADAPTER.pending(ask, results({"ok": True, "phase": "ready"}, {"ok": True, "phase": "fetching"}))
    assert not ADAPTER.pending(ask, results({"ok": True, "phase": "ready"}))
    assert not ADAPTER.pending(begin, results({"ok": True, "version": 1}))


def test_a_failure_in_any_worker_is_an_error() -> None:
    begin = ADAPTER.stage(b"", "e")[0]
    ADAPTER.check(begin, results({"ok": True}, {"ok": True}))
    with pytest.raises(ServerAnswerError, match="no embed"):
        ADAPTER.check(
            begin, results({"ok": True}, {"ok": False, "error": "WeightTransferError: the model has no embed"})
        )
    for garbage in (b"", b"[]", b'{"results": []}', b'{"results": ["x"]}', b"\xff"):
        with pytest.raises(ServerAnswerError):
            ADAPTER.check(begin, garbage)


def test_a_commit_loads_then_names_the_version_and_tells_where_requests_stood() -> None:
    load, name = ADAPTER.commit(7, KvPolicy.KEEP)
    assert load.body == {"method": "millrace_commit", "args": ["7"]}
    assert (name.path, name.body) == ("/update_weight_version", {"new_version": "7"})
    sampled = {"generate-tokens-e/0-1-0badcafe": 12, "cmpl-other": 3}
    assert ADAPTER.boundaries(load, results({"ok": True, "sampled": sampled})) == {"e/0-1": 12}
    assert ADAPTER.boundaries(name, b"{}") == {}


def test_a_kv_cache_that_was_not_forgotten_is_an_error() -> None:
    forget = ADAPTER.pause(PauseMode.KEEP_REQUESTS)[-1]
    ADAPTER.check(forget, b"")
    ADAPTER.check(forget, b'{"success": true}')
    with pytest.raises(ServerAnswerError, match="did not forget"):
        ADAPTER.check(forget, b'{"success": false}')


def test_the_served_version_is_a_number_that_millrace_gave() -> None:
    assert ADAPTER.parse_served(b'{"weight_version": "12"}') == 12
    for answer in (b'{"weight_version": "default"}', b"{}", b"nothing", b"[1]"):
        with pytest.raises(ServerAnswerError):
            ADAPTER.parse_served(answer)


def test_the_plugin_says_what_the_server_is() -> None:
    body = results({"ok": True, "engine": "0.32.0", "model": "/models/tiny", "max_len": 512, "workers": 1})
    identity = ADAPTER.parse_identity(body)
    assert (identity.version, identity.model, identity.max_len) == ("0.32.0", "/models/tiny", 512)


def test_load_comes_from_the_metrics_page() -> None:
    page = b"""# HELP vllm:num_requests_running now
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:generation_tokens_total{engine="0"} 120.0
vllm:prompt_tokens_total{engine="0"} 100.0
vllm:prefix_cache_hits_total{engine="0"} 64.0
vllm:num_preemptions_total{engine="0"} 1.0
"""
    counters = ADAPTER.parse_metrics(page)
    assert (counters.running, counters.waiting, counters.kv_used, counters.preemptions) == (3, 2, 0.25, 1)
    assert (counters.generated_tokens, counters.prefill_tokens, counters.cached_tokens) == (120, 36, 64)


# Prefill and decode apart


def test_servers_with_a_role_share_a_connector() -> None:
    with pytest.raises(ValueError, match="needs a port"):
        ADAPTER.environment(Launch(**{**LAUNCH.__dict__, "role": "decode"}))
    launch = Launch(**{**LAUNCH.__dict__, "role": "prefill", "kv_port": 5601})
    transfer = json.loads(option(ADAPTER.command(launch), "--kv-transfer-config") or "")
    assert transfer["kv_connector"] == "NixlConnector"
    assert transfer["kv_buffer_device"] == "cpu"
    other = VllmAdapter(VllmConfig(args={"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1"}}))
    assert option(other.command(launch), "--kv-transfer-config") == '{"kv_connector":"LMCacheConnectorV1"}'
    variables = ADAPTER.environment(launch)
    assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5601"
    on_gpu = Launch(**{**launch.__dict__, "device": "cuda"})
    assert json.loads(option(ADAPTER.command(on_gpu), "--kv-transfer-config") or "")["kv_buffer_device"] == "cuda"
    assert "UCX_TLS" not in ADAPTER.environment(on_gpu)


def test_a_prefill_samples_one_token_and_keeps_the_kv() -> None:
    call = prefill_call(request(stop=("</a>",), stop_token_ids=(3,), prompt=np.arange(40, dtype=np.int32)), served=2)
    body = call.body or {}
    assert body["stream"] is False
    assert "stream_options" not in body
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    params = body["sampling_params"]
    assert (params["max_tokens"], params["ignore_eos"]) == (1, True)
    assert not [key for key in params if key.startswith("stop")]


def prefilled(versions: list[str], params: dict[str, Any] | None) -> bytes:
    spans = [{"version": version, "start": 0, "end": 1} for version in versions]
    return json.dumps({"choices": [{"weight_versions": spans}], "kv_transfer_params": params}).encode()


def test_kv_is_handed_over_within_one_version_only() -> None:
    params = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [[1, 2]]}
    handoff = parse_prefill(prefilled(["4"], params))
    assert handoff == ServerHandoff(version=4, params=params)
    assert (decode_call(request(), 4, handoff).body or {})["kv_transfer_params"] == params
    assert decode_call(request(), 5, handoff) == generate_call(request(), 5)


@pytest.mark.parametrize(
    "body", [prefilled(["4"], None), prefilled(["4", "5"], {"a": 1}), prefilled(["default"], {"a": 1}), b"", b"[]"]
)
def test_a_prefill_that_hands_over_nothing_usable_is_an_error(body: bytes) -> None:
    with pytest.raises(ServerAnswerError):
        parse_prefill(body)


def test_control_calls_are_plain_data() -> None:
    calls: list[Call] = [
        ADAPTER.ready(),
        *ADAPTER.adopt(3),
        *ADAPTER.resume(),
        ADAPTER.served(),
        ADAPTER.metrics(),
        ADAPTER.identity(),
    ]
    assert [(call.method, call.path) for call in calls] == [
        ("GET", "/health"),
        ("POST", "/collective_rpc"),
        ("POST", "/update_weight_version"),
        ("POST", "/resume"),
        ("GET", "/weight_info"),
        ("GET", "/metrics"),
        ("POST", "/collective_rpc"),
    ]
    for call in calls:
        json.dumps(call.body)
