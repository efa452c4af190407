"""Tiny models and shorthands for the tests of the embedded engine."""

from __future__ import annotations

import copy

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest, TokenChunk
from rollout_workers.engines.torch_engine import TorchEngine

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=None)),
}


def make_model(name: str = "qwen3", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = ARCHITECTURES[name]().eval()
    return model


def make_tokenizer() -> Tokenizer:
    """Word level: token 7 is `w7`, except that 0 is the end token and 1 is `</call>`."""
    words = {"<end>": 0, "</call>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def make_engine(model: PreTrainedModel | None = None, **settings: object) -> TorchEngine:
    """Untraced, unlike the default, because tracing takes a quarter of a second."""
    config = EnginesConfig(**({"slots": 16, "max_len": 128, "trace": False} | settings))  # type: ignore[arg-type]
    return TorchEngine(copy.deepcopy(model if model is not None else make_model()), make_tokenizer(), config)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length).astype(np.int32)


def request(name: str = "r", **fields: object) -> GenerateRequest:
    defaults = {"request_id": name, "session_id": f"session of {name}", "prompt": prompt(5), "max_tokens": 8}
    return GenerateRequest(**(defaults | fields))  # type: ignore[arg-type]


class Result:
    """All chunks of a request, joined."""

    def __init__(self, chunks: list[TokenChunk]) -> None:
        self.chunks = chunks
        self.tokens = np.concatenate([chunk.tokens for chunk in chunks])
        self.logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
        self.versions = np.concatenate([chunk.versions for chunk in chunks])
        self.last = chunks[-1]


def drain(engine: TorchEngine, steps: int = 1000) -> dict[str, Result]:
    """Step until nothing is left to do, at most ``steps`` times."""
    chunks: dict[str, list[TokenChunk]] = {}
    for _ in range(steps):
        if not engine.has_work:
            break
        for chunk in engine.step():
            chunks.setdefault(chunk.request_id, []).append(chunk)
    return {name: Result(parts) for name, parts in chunks.items()}


def run_all(engine: TorchEngine, *requests: GenerateRequest) -> dict[str, Result]:
    for each in requests:
        engine.submit(each)
    return drain(engine)


def reference_logits(model: PreTrainedModel, tokens: np.ndarray) -> torch.Tensor:
    """float32 [T, V] of a plain forward over one sequence, without padding or cache."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].float()


def reference_logprobs(model: PreTrainedModel, given: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """Log-probabilities at temperature 1 of ``sampled`` after ``given``."""
    logits = reference_logits(model, np.concatenate([given, sampled]))[len(given) - 1 : -1]
    picked = logits.log_softmax(-1).gather(1, torch.from_numpy(sampled.astype(np.int64))[:, None])
    return picked[:, 0].numpy()
