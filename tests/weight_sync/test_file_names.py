"""The names that tensors travel by are those of Hugging Face's files, which transformers itself writes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from weight_sync.file_names import FileNames

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 8,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen2Moe", "Qwen3"])
def test_a_loaded_model_gives_what_its_files_have(kind: str, tmp_path: Path) -> None:
    shape = {key: value for key, value in SHAPE.items() if kind != "Qwen3" or not key.startswith(("moe", "num_exp"))}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    model.save_pretrained(tmp_path)
    names, found = FileNames.of(model.config.model_type), dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        found |= names.split(name, parameter.detach())
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert any(".experts.2.up_proj" in name for name in found) == (kind != "Qwen3")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3", "no such", ""])
def test_what_is_changed_otherwise_keeps_its_names(model_type: str) -> None:
    assert FileNames.of(model_type) == FileNames()


def test_parts_are_views() -> None:
    whole = torch.zeros(2, 4, 3)
    for _, part in FileNames({"experts.up": ("experts.*.a", "experts.*.b")}).split("x.experts.up", whole):
        part.fill_(1.0)
    assert whole.sum() == whole.numel()
