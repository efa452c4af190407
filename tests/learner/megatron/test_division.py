"""Settings and shapes: what divides, and what is said where something does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron_fixtures import make_model_of

from learner.backends.megatron.architecture import Architecture, read_architecture
from learner.backends.megatron.settings import MegatronConfig, Sizes
from learner.config import LearnerConfig
from learner.errors import ModelError


def architecture(**changes: Any) -> Architecture:
    values: dict[str, Any] = {
        "model_type": "qwen3", "layers": 6, "hidden": 32, "heads": 8, "kv_heads": 4, "head_width": 8, "feed_forward": 48,
        "vocabulary": 203, "epsilon": 1e-6, "tied": True, "qkv_bias": False, "qk_norm": True,
    }  # fmt: skip
    return Architecture(**{**values, **changes})


def test_what_is_left_of_the_ranks_is_data_parallel() -> None:
    assert MegatronConfig(2, 3, 2).sizes(24) == Sizes(tensor=2, pipeline=3, data=4, expert=2)
    assert MegatronConfig().sizes(5) == Sizes(data=5)
    assert Sizes(2, 3, 4).ranks == 24


@pytest.mark.parametrize(
    ("division", "ranks", "message"),
    [
        ({"tensor_parallel": 0}, 2, "learner.megatron.tensor_parallel=0 must be at least 1"),
        ({"tensor_parallel": 2}, 3, r"learner.ranks=3 is not a multiple of .*tensor_parallel=2 .*: use 2 ranks, or 4"),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 2, r"learner.ranks=2 is not a multiple .*: use 4 ranks"),
        ({"expert_parallel": 3}, 4, r"expert_parallel=3 does not divide the 4 ranks of a pipeline stage"),
    ],
)
def test_settings_that_do_not_fit_the_ranks_are_named(division: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(backend="megatron", ranks=ranks, megatron=MegatronConfig(**division)).validate()  # type: ignore[arg-type]


def test_settings_that_nobody_reads_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"learner\.megatron has settings, and learner\.backend=fsdp does not read them"
    ):
        LearnerConfig(ranks=2, megatron=MegatronConfig(tensor_parallel=2)).validate()
    with pytest.raises(ValueError, match=r"learner\.cpu_offload=true is for learner\.backend=fsdp"):
        LearnerConfig(backend="megatron", cpu_offload=True).validate()
    with pytest.raises(ValueError, match=r"learner\.optimizer=sgd has none: leave it false"):
        LearnerConfig(
            backend="megatron", optimizer="sgd", megatron=MegatronConfig(distributed_optimizer=True)
        ).validate()


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (
            {},
            Sizes(tensor=3),
            r"tensor_parallel=3 does not divide the model's 8 attention heads: use one of \[1, 2, 4, 8\]",
        ),
        ({}, Sizes(tensor=8), "8 does not divide the model's 4 key-value heads"),
        ({"feed_forward": 50}, Sizes(tensor=4), "4 does not divide the model's 50 columns of the feed-forward layer"),
        ({"vocabulary": 3}, Sizes(tensor=2), "too much for the model's vocabulary of 3 tokens"),
        ({}, Sizes(pipeline=4), r"pipeline_parallel=4 does not divide the model's 6 layers: use one of \[1, 2, 3, 6\]"),
        ({}, Sizes(expert=2), "expert_parallel=2, and this Qwen3 model has no experts"),
        ({"experts": 6}, Sizes(expert=4), "expert_parallel=4 does not divide the model's 6 experts"),
    ],
)
def test_models_that_cannot_be_divided_so_are_refused(shape: dict[str, int], sizes: Sizes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        architecture(**shape).check(sizes)


def test_a_vocabulary_need_not_be_divisible() -> None:
    architecture().check(Sizes(tensor=4, pipeline=3, data=2))


def test_an_unsupported_architecture_is_told_with_those_that_are_supported() -> None:
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    with pytest.raises(
        ModelError, match=r"cannot train a gpt2 model; it trains llama, qwen2, qwen3, qwen3_moe .*backend=fsdp"
    ):
        read_architecture(GPT2Config())
    with pytest.raises(ModelError, match="llama model with attention_bias=True"):
        read_architecture(LlamaConfig(attention_bias=True))
    with pytest.raises(ModelError, match=r"qwen3_moe model with mlp_only_layers=\[0\]"):
        read_architecture(Qwen3MoeConfig(mlp_only_layers=[0]))


def test_without_megatron_core_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from learner.backends.megatron import parallel

    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.setattr(parallel, "make_cpu_ready", lambda: None)
    with pytest.raises(ModelError, match=r"pip install 'millrace\[megatron\]'"):
        parallel.require_megatron()


def test_the_configuration_and_other_backends_import_no_megatron(tmp_path: Path) -> None:
    import subprocess
    import sys

    make_model_of("qwen3", tmp_path)
    program = (
        "import sys, torch; real = torch.zeros\n"
        "import learner.backends.rank_actor, learner.actor, orchestrator.config, orchestrator.cli\n"
        "from learner.backends.make import make_backend; from learner.config import LearnerConfig\n"
        f"make_backend({str(tmp_path)!r}, LearnerConfig(device='cpu'), 'float32', None)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] == 'megatron'] and torch.zeros is real"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
