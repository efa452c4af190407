"""A model whose output layer is its embedding: an update must reach both uses of the one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from contract_engine import Engine, require_environment
from contract_model import VOCABULARY, make_tokenizer, prompt
from transformers import Qwen3Config, Qwen3ForCausalLM

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

KINDS = ["torch", *(pytest.param(kind, marks=pytest.mark.engines) for kind in ("vllm", "sglang"))]


def tied_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(torch.float32).eval()


def logprobs(model: Any, given: npt.NDArray[np.int32], sampled: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    whole = torch.from_numpy(np.concatenate([given, sampled]).astype(np.int64))
    with torch.no_grad():
        logp = torch.log_softmax(model(whole[None], use_cache=False).logits[0].double(), dim=-1)
    found: npt.NDArray[np.float64] = logp[len(given) - 1 : -1].gather(1, whole[len(given) :, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_an_update_reaches_the_output_layer_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_environment(kind)
    tied_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        "contract_engine.named_weights",
        lambda seed: [(name, tensor.detach()) for name, tensor in tied_model(seed).named_parameters()],
    )
    engine = await Engine.start(kind, tmp_path / "model", tmp_path)
    try:
        for seed in (0, 1, 2):
            if seed:
                await engine.publish(seed, "recompute")
            given = prompt(20, seed=seed)
            answer = await engine.one(given, 16, seed=seed)
            expected = logprobs(tied_model(seed), given, answer.tokens)
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-3)
    finally:
        await engine.stop()
