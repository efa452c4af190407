"""Updates of models whose files differ from the model that is loaded.

An output layer that is the embedding: an update must reach both uses of the one tensor. Experts: each has tensors of its own,
which engines put together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_engine import Engine, require_environment
from contract_model import VOCABULARY, logprobs, make_tokenizer, prompt
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from weight_sync.file_names import FileNames

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

KINDS = ["torch", *(pytest.param(kind, marks=pytest.mark.engines) for kind in ("vllm", "sglang"))]


SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}


def tied_model(seed: int) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)).to(torch.float32).eval()


def model_of_experts(seed: int) -> Any:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)).to(torch.float32).eval()


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    """As a learner publishes them."""
    names = FileNames.of(model.config.model_type)
    return [part for name, tensor in model.named_parameters() for part in names.split(name, tensor.detach())]


@pytest.mark.parametrize("make", [tied_model, model_of_experts])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_update_reaches_every_use_of_every_tensor(
    kind: str, make: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_environment(kind)
    make(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("contract_engine.named_weights", lambda seed: named(make(seed)))
    engine = await Engine.start(kind, tmp_path / "model", tmp_path)
    try:
        for seed in (0, 1, 2):
            if seed:
                await engine.publish(seed, "recompute")
            given = prompt(20, seed=seed)
            answer = await engine.one(given, 16, seed=seed)
            expected = logprobs(make(seed), given, answer.tokens)
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-3)
    finally:
        await engine.stop()
