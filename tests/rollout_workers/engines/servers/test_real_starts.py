"""Real servers that cannot start, or not with what is asked of them: the error names the cause, the log's end follows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from contract_engine import Engine
from contract_model import MAX_LEN, write_model

from rollout_workers.engines.servers.errors import EnvironmentUnfit, ServerNotStarted
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.vllm.config import VllmConfig

pytestmark = [pytest.mark.engines_slow, pytest.mark.timeout(600)]
SETTINGS = {"vllm": VllmConfig, "sglang": SglangConfig}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("starts") / "model")


async def refusal(kind: str, model: Path, logs: Path, **settings: Any) -> str:
    """The first line of what the start of a server ends with; the end of its log is below."""
    with pytest.raises(ServerNotStarted) as caught:
        await Engine.start(kind, model, logs, **{kind: SETTINGS[kind](startup_timeout_s=300.0, **settings)})
    first, heading, *log = str(caught.value).splitlines()
    assert heading == f"the last lines of {logs / f'engine-0.0-{kind}.log'}:"
    assert len(log) >= 5
    return first


async def test_vllm_without_kv_for_one_sequence_says_so(sound: Path, tmp_path: Path) -> None:
    first = await refusal("vllm", sound, tmp_path, args={"kv_cache_memory_bytes": 128 << 10})
    assert first.startswith(f"vllm did not start with {sound}: ")
    assert f"ValueError: To serve at least one request with the model's max seq len ({MAX_LEN})" in first


async def test_vllm_with_more_kv_than_there_is_memory_says_so(sound: Path, tmp_path: Path) -> None:
    first = await refusal("vllm", sound, tmp_path, env={"VLLM_CPU_KVCACHE_SPACE": "1000000"})
    assert "is less than requested memory for kv" in first
    assert "VLLM_CPU_KVCACHE_SPACE" in first


async def test_sglang_without_kv_for_one_sequence_is_refused(sound: Path, tmp_path: Path) -> None:
    """By itself it starts, and ends sequences where its KV does, as if their budget were spent."""
    config = SglangConfig(args={"max_total_tokens": 64}, startup_timeout_s=300.0)
    with pytest.raises(EnvironmentUnfit, match=f"sequences of at most 48 tokens, and engines.max_len={MAX_LEN}"):
        await Engine.start("sglang", sound, tmp_path, sglang=config)


@pytest.mark.parametrize("kind", SETTINGS)
async def test_truncated_weights_are_named(kind: str, sound: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    first = await refusal(kind, model, tmp_path / "logs")
    assert first.startswith(f"{kind} did not start with {model}: ")
    assert "SafetensorError: Error while deserializing header: incomplete metadata" in first


async def test_a_model_of_no_known_kind_is_named(sound: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"], "model_type": "unheard"}))
    first = await refusal("vllm", model, tmp_path / "logs")
    assert "model type `unheard`" in first


async def test_weights_of_another_shape_than_the_configuration_says_are_named(sound: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    config = json.loads((model / "config.json").read_text())
    wide = 2 * config["intermediate_size"]
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": wide}))
    first = await refusal("vllm", model, tmp_path / "logs")
    assert first.startswith(f"vllm did not start with {model}: ")
    assert f"length ({wide}) exceeds dimension size ({wide // 2})" in first
