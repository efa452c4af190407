"""Makes the model of the quickstart: random weights, demonstrations, supervised warm-up; no downloads."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from env_pool.shop.clerk import ClumsyClerk
from learner.warm_up import Progress, WarmUpSettings, warm_up
from orchestrator.recipes.shop_small.demonstrations import demonstrate
from orchestrator.recipes.shop_small.vocabulary import END_OF_TURN, PAD, save_tokenizer, words

VERSION = 1
"""Raise it whenever the same seed would give another model."""

logger = logging.getLogger(__name__)

CLERK = ClumsyClerk()
SETTINGS = WarmUpSettings()


def build(
    directory: Path,
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
    settings: WarmUpSettings = SETTINGS,
) -> Path:
    """Write a Hugging Face model directory, decided by ``seed`` and the number of torch ``threads``.

    One thread by default: the same weights whatever the machine, and no spinning threads when it is busy.

    The weights are about 320 thousand float32 numbers. Deep chains it can only get right by chance: see
    :class:`env_pool.shop.clerk.ClumsyClerk`. ``seed`` takes the place of the one in ``settings``.
    """
    torch.set_num_threads(threads)
    tokenizer = save_tokenizer(directory)
    model = make_model(seed)
    settings = replace(settings, seed=seed)
    demonstrations = demonstrate(tokenizer, CLERK, settings.steps * settings.batch_size, seed)
    losses = warm_up(model, demonstrations, settings, progress)
    logger.info("warm-up of %d steps: loss %.3f to %.3f", settings.steps, losses[0], losses[-1])
    model.save_pretrained(directory)
    return directory


def make_model(seed: int) -> Qwen3ForCausalLM:
    """The untrained model. A wide initialisation (0.06) makes so small a model learn to copy quickly."""
    vocabulary = words()
    ends = {"eos_token_id": vocabulary.index(END_OF_TURN), "pad_token_id": vocabulary.index(PAD)}
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            rope_theta=10_000.0,
            initializer_range=0.06,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            dtype="float32",
            **ends,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ends)
    return model
