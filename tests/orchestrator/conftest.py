from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's model before its warm-up, with tokenizer and chat template."""
    from orchestrator.recipes.shop_small.build import make_model
    from orchestrator.recipes.shop_small.vocabulary import save_tokenizer

    directory = tmp_path_factory.mktemp("tiny-model")
    save_tokenizer(directory)
    make_model(0).save_pretrained(directory)
    return directory
