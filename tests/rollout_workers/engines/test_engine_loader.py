from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_helpers import SHAPE, make_engine, make_model, request, run_all
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.torch_engine import ModelError, build_engine, load_model
from rollout_workers.engines.vllm.config import VllmConfig


def test_a_directory_is_loaded_and_generates_as_its_model_does(model_directory: Path) -> None:
    config = EnginesConfig(slots=4, max_len=64)
    engine = build_engine(config, model_directory, dtype="float32", threads=1, version=7)
    loaded = run_all(engine, request(stop=("nothing",)))["r"]
    assert loaded.tokens.tolist() == run_all(make_engine(), request())["r"].tokens.tolist()
    assert set(loaded.versions.tolist()) == {7}


def test_the_data_type_is_as_asked_for(model_directory: Path) -> None:
    model, tokenizer = load_model(str(model_directory), "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    assert tokenizer is not None


def test_a_model_without_a_tokenizer_loads(model_directory: Path) -> None:
    (model_directory / "tokenizer.json").unlink()
    assert load_model(str(model_directory))[1] is None


def test_what_is_missing_is_named(tmp_path: Path, model_directory: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (model_directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(model_directory))
    (model_directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_model(str(model_directory))


def test_truncated_weights_are_an_error(model_directory: Path) -> None:
    weights = model_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(model_directory))


def test_models_that_are_not_plain_causal_attention_are_refused(model_directory: Path) -> None:
    file = model_directory / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"model_type": "t5"}))
    with pytest.raises(ModelError, match="not a causal language model"):
        load_model(str(model_directory))
    file.write_text(json.dumps(plain | {"layer_types": ["linear_attention", "full_attention"]}))
    with pytest.raises(ModelError, match="linear_attention"):
        load_model(str(model_directory))


def test_a_window_that_would_slide_is_refused_and_one_that_cannot_is_not() -> None:
    window = MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=64)).eval()
    with pytest.raises(ModelError, match=r"set engines\.max_len to 64 or less"):
        make_engine(window, max_len=65)
    assert len(run_all(make_engine(window, max_len=64), request())["r"].tokens) == 8


def test_soft_capped_attention_is_refused() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, sliding_window=512)).eval()
    with pytest.raises(ModelError, match="softcap"):
        make_engine(capped)


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ModelError, match="the model has 512 positions"):
        make_engine(make_model(), max_len=513)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named(model_directory: Path) -> None:
    with pytest.raises(ModelError, match="torch sees no GPU"):
        load_model(str(model_directory), device="cuda")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "vlm"}, "must be one of torch, vllm"),
        ({"kind": "sglang", "prefill": 1, "decode": 1}, "set both to 0 for sglang"),
        ({"kind": "vllm", "vllm": VllmConfig(urls=["http://a:1"]), "replicas": 2}, "names 1 servers for 2 engines"),
        ({"kind": "sglang", "sglang": SglangConfig(urls=["http://a:1"] * 2), "replicas": 2}, "names a server twice"),
        ({"kind": "sglang", "sglang": SglangConfig(args={"model_path": "x"})}, "set model.path"),
        ({"prefill": 1}, "set both to at least 1"),
        ({"prefill": 1, "decode": 1, "replicas": 2}, "leave engines.replicas at 1"),
        ({"roles": "auto"}, "changes the roles of a split"),
        ({"park_mb": -1}, "engines.park_mb=-1: must be at least 0"),
        ({"slots": 0}, "engines.slots=0: must be at least 1"),
        ({"threads": 0}, "engines.threads=0"),
        ({"dtype": "int8"}, "engines.dtype=int8"),
        ({"device": "tpu"}, "engines.device=tpu"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EnginesConfig(**settings).validate()  # type: ignore[arg-type]
