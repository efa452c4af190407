"""The model of `shop_small` before its warm-up: made at once, knows nothing. For examples, tests and trying things."""

from __future__ import annotations

from pathlib import Path

from learner.warm_up import Progress
from orchestrator.recipes.shop_small.build import make_model
from orchestrator.recipes.shop_small.vocabulary import save_tokenizer

VERSION = 1
"""Raise it whenever the same seed would give another model."""


def build(directory: Path, seed: int = 0, threads: int | None = None, progress: Progress | None = None) -> Path:
    """Write a Hugging Face model directory with random weights, decided by ``seed`` alone."""
    del threads, progress
    save_tokenizer(directory)
    make_model(seed).save_pretrained(directory)
    return directory
