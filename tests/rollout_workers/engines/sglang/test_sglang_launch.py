from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf
from sglang_streams import request

from rollout_workers.engines.servers.adapter import Launch
from rollout_workers.engines.sglang.config import OWNED, SglangConfig
from rollout_workers.engines.sglang.disaggregation import (
    PrefillAddress,
    check_split,
    pair_calls,
    router_command,
)
from rollout_workers.engines.sglang.launch import command, environment

CPU = Launch(model_path="/m", host="127.0.0.1", port=8001, member="engine-0.0", device="cpu", max_len=256, slots=8)
GPU = replace(CPU, device="cuda")


def arguments(config: SglangConfig, launch: Launch) -> dict[str, Any]:
    """A command line as a mapping: flags are True, several words a list."""
    python, dash_m, module, *words = command(config, launch)
    assert (python, dash_m, module) == (launch.python, "-m", "sglang.launch_server")
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = True
        elif found[name] is True:
            found[name] = word
        else:
            found[name] = [*found[name], word] if isinstance(found[name], list) else [found[name], word]
    return found


def test_on_a_cpu() -> None:
    found = arguments(SglangConfig(), CPU)
    assert found["device"] == "cpu"
    assert found["attention-backend"] == "torch_native"
    assert found["dtype"] == "float32"
    assert found["disable-overlap-schedule"] is True
    assert int(found["context-length"]) >= 256
    assert int(found["max-total-tokens"]) >= 8 * 256
    assert found["max-running-requests"] == "8"
    assert found["stream-interval"] == "16"
    assert found["weight-version"] == "0"
    variables = environment(SglangConfig(), replace(CPU, threads=1, plugin_path="/repo"))
    assert variables["SGLANG_USE_CPU_ENGINE"] == "1"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["PYTHONPATH"] == "/repo"
    assert variables["MILLRACE_MODEL_PATH"] == "/m"


def test_on_a_gpu_sglang_chooses() -> None:
    found = arguments(SglangConfig(), GPU)
    assert (found["device"], found["dtype"]) == ("cuda", "bfloat16")
    assert not {"attention-backend", "max-total-tokens", "disable-cuda-graph", "mem-fraction-static"} & set(found)
    assert "SGLANG_USE_CPU_ENGINE" not in environment(SglangConfig(), GPU)


def test_arguments_pass_through_and_win_over_defaults() -> None:
    args = {"mem-fraction-static": 0.2, "disable_cuda_graph": None, "tp_size": 2, "log_level": "debug"}
    found = arguments(SglangConfig(args=args), CPU)
    assert found["mem-fraction-static"] == "0.2"
    assert "disable-cuda-graph" not in found
    assert (found["tp-size"], found["log-level"]) == ("2", "debug")


def test_variables_pass_through_and_win() -> None:
    config = SglangConfig(env={"HF_HUB_OFFLINE": "0", "SGLANG_X": "1"})
    assert environment(config, CPU) | {"HF_HUB_OFFLINE": "0", "SGLANG_X": "1"} == environment(config, CPU)


@pytest.mark.parametrize("name", sorted(OWNED))
def test_arguments_that_millrace_sets_are_refused_with_the_reason(name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        with pytest.raises(ValueError, match=r"engines\.sglang\.args\.") as refused:
            SglangConfig(args={spelling: 1}).validate()
        assert OWNED[name] in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"urls": ["localhost:8000"]}, "write http://"),
        ({"startup_timeout_s": 0.0}, "startup_timeout_s"),
        ({"request_timeout_s": -1.0}, "request_timeout_s"),
        ({"args": {"two words": 1}}, "no argument name"),
    ],
)
def test_bad_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SglangConfig(**changes).validate()


def test_the_settings_can_be_read_from_a_file() -> None:
    read = OmegaConf.merge(
        OmegaConf.structured(SglangConfig), OmegaConf.create("args: {tp_size: 2}\nurls: ['http://a']")
    )
    config = OmegaConf.to_object(read)
    assert config == SglangConfig(args={"tp_size": 2}, urls=["http://a"])


def test_roles() -> None:
    prefill = arguments(SglangConfig(), replace(CPU, role="prefill", kv_port=9001))
    assert (prefill["disaggregation-mode"], prefill["disaggregation-bootstrap-port"]) == ("prefill", "9001")
    assert prefill["disaggregation-transfer-backend"] == "nixl"
    decode = replace(CPU, role="decode", kv_port=9001)
    assert arguments(SglangConfig(), decode)["disaggregation-decode-retraction-backup"] == "cpu_tensor"
    assert environment(SglangConfig(), decode)["UCX_TLS"] == "tcp,sm,self"
    on_gpu = arguments(SglangConfig(), replace(decode, device="cuda"))
    assert on_gpu["disaggregation-transfer-backend"] == "mooncake"
    assert "disaggregation-decode-retraction-backup" not in on_gpu
    chosen = SglangConfig(args={"disaggregation_transfer_backend": "mori"})
    assert arguments(chosen, decode)["disaggregation-transfer-backend"] == "mori"
    with pytest.raises(ValueError, match="needs a port"):
        command(SglangConfig(), replace(CPU, role="prefill"))
    with pytest.raises(ValueError, match="'both'"):
        command(SglangConfig(), replace(CPU, role="both"))


def test_contradictory_splits_are_refused() -> None:
    check_split({"disaggregation_transfer_backend": "nixl"}, 1, 2)
    check_split({}, 0, 0)
    with pytest.raises(ValueError, match="fake: must be one of"):
        check_split({"disaggregation_transfer_backend": "fake"}, 1, 1)
    with pytest.raises(ValueError, match="at least one server of each role"):
        check_split({}, 1, 0)
    with pytest.raises(ValueError, match=r"set engines\.prefill and engines\.decode"):
        check_split({"disaggregation-ib-device": "mlx5_0"}, 0, 0)


def test_a_pair_gets_the_same_room() -> None:
    prefill, decode = pair_calls(request(), 3, PrefillAddress("10.0.0.1", 8998), room=17)
    assert prefill == decode
    assert prefill.body is not None
    fields = {key: prefill.body[key] for key in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
    assert fields == {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 17}
    with pytest.raises(ValueError, match="room"):
        pair_calls(request(), 3, PrefillAddress("10.0.0.1", 8998), room=-1)


def test_the_router_of_sglang_over_a_split_fleet() -> None:
    prefill = [("http://a:1", 8998), ("http://b:1", 8999)]
    words = router_command("py", "127.0.0.1", 8700, prefill, ["http://c:1"], metrics_port=8701)
    assert " ".join(words) == (
        "py -m sglang_router.launch_router --pd-disaggregation --prefill http://a:1 8998 --prefill http://b:1 8999 "
        "--decode http://c:1 --host 127.0.0.1 --port 8700 --prometheus-host 127.0.0.1 --prometheus-port 8701"
    )
    with pytest.raises(ValueError, match="at least one prefill and one decode"):
        router_command("py", "127.0.0.1", 8700, [], ["http://c:1"], metrics_port=8701)
