"""The tiny model of the contract suite, in as many versions as are asked for, and what its tokens should be."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from weight_sync.adapters import adapter_names

VOCABULARY = 384
MAX_LEN = 512
END = "<|im_end|>"
TEXT = "the mill wheel turns while water runs over it; 7 + 5 = 12, and nobody waits for the miller to come home."
LOUD, SILENCE = 1.0, 100.0
"""The first channel of every embedding, which no layer changes, and by which the head never gives the end token."""
SHARP = 3.0
"""Scale of attention: what comes next depends on what was before, so that greedy answers do not repeat one token."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that it can write any text; small."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", END, "<pad>"],
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token="<pad>", bos_token="<|endoftext|>")


@cache
def make_model(seed: int) -> Qwen3ForCausalLM:
    """The weights of one version; different seeds disagree about almost every token."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = LOUD
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(SHARP)
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight *= 2
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[tokenizer.eos_token_id] = 0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -SILENCE
    return model


def write_model(directory: Path, seed: int = 0) -> Path:
    """A Hugging Face directory."""
    make_model(seed).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def named_weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach()) for name, tensor in make_model(seed).state_dict().items()]


def prompt(length: int, seed: int) -> npt.NDArray[np.int32]:
    """Ordinary tokens, none of the special ones."""
    return np.random.default_rng(seed).integers(4, 256, length).astype(np.int32)


def greedy(seed: int, given: npt.NDArray[np.int32], count: int) -> list[int]:
    """The tokens that version ``seed`` finds most likely after ``given``."""
    with torch.no_grad():
        ids = torch.from_numpy(given.astype(np.int64))[None]
        made = make_model(seed).generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [int(token) for token in made[0, len(given) :]]


def logits_of(seed: int, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
    """float32 [T, V] of a plain forward pass."""
    with torch.no_grad():
        return make_model(seed)(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].float()


def logprobs(model: Any, given: npt.NDArray[np.int32], sampled: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Of the sampled tokens after those given, by a plain forward pass."""
    whole = torch.from_numpy(np.concatenate([given, sampled]).astype(np.int64))
    with torch.no_grad():
        logp = torch.log_softmax(model(whole[None], use_cache=False).logits[0].double(), dim=-1)
    found: npt.NDArray[np.float64] = logp[len(given) - 1 : -1].gather(1, whole[len(given) :, None])[:, 0].numpy()
    return found


def make_adapter(seed: int, rank: int = 4) -> list[tuple[str, torch.Tensor]]:
    """Pairs for the linear layers of version 0, as they travel."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for name, weight in named_weights(0):
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            low, high = adapter_names(name)
            pairs.append((low, torch.randn(rank, weight.shape[1], generator=generator) * 0.1))
            pairs.append((high, torch.randn(weight.shape[0], rank, generator=generator) * 0.1))
    return pairs


def adapted_logits(adapter: list[tuple[str, torch.Tensor]], tokens: npt.NDArray[np.int32]) -> torch.Tensor:
    """float32 [T, V] of version 0 with an adapter, whose part is computed beside the weights."""
    given, model = dict(adapter), copy.deepcopy(make_model(0))
    for name, _ in named_weights(0):
        low, high = adapter_names(name)
        if low in given:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_hook(
                lambda _module, inputs, output, a=given[low], b=given[high]: output + inputs[0] @ a.T @ b.T
            )
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].float()


def mixed_logits(seeds: list[int], given: npt.NDArray[np.int32], sampled: npt.NDArray[np.int32]) -> torch.Tensor:
    """float32 [n, V]: what each sampled token was drawn from when the KV before it was never computed again.

    ``seeds``: the version of each sampled token. When a version takes over, the KV of all but the last token is there.
    """
    tokens = torch.from_numpy(np.concatenate([given, sampled]).astype(np.int64))
    past, filled, rows = DynamicCache(), 0, []
    starts = [index for index in range(len(seeds)) if index == 0 or seeds[index] != seeds[index - 1]]
    for start, end in zip(starts, [*starts[1:], len(seeds)], strict=True):
        until = len(given) + end - 1
        with torch.no_grad():
            logits = make_model(seeds[start])(tokens[None, filled:until], past_key_values=past, use_cache=True).logits
        rows.append(logits[0, len(given) + start - 1 - filled :].float())
        filled = until
    return torch.cat(rows)


def logprobs_of(
    logits: torch.Tensor,
    sampled: npt.NDArray[np.int32],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> npt.NDArray[np.float32]:
    """Log-probabilities [n] of ``sampled`` under rows [n, V] after temperature, top-k and top-p."""
    scaled = logits / temperature
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scaled.softmax(-1).sort(descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p
        scaled = scaled.masked_fill(beyond.gather(1, order.argsort(1)), -torch.inf)
    picked = scaled.log_softmax(-1).gather(1, torch.from_numpy(sampled.astype(np.int64))[:, None])
    return picked[:, 0].numpy()
