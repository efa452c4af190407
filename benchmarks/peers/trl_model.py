"""The model of the comparison with TRL: a directory that both sides load, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.trl_task import SPECIAL


def save_model(directory: Path, seed: int, layers: int = 2, hidden: int = 64) -> int:
    """Write a Qwen3 with random float32 weights and a byte-level tokenizer; returns its number of parameters.

    Its generation settings name no end-of-sequence token, so the embedded engine always generates ``max_tokens`` tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary = _save_tokenizer(directory)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=SPECIAL.index("<pad>"),
            dtype="float32",
        )
    )
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def _save_tokenizer(directory: Path) -> int:
    """Write the tokenizer's files; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(words)
