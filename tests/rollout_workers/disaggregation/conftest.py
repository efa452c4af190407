from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import make_model, make_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, for engines that load it."""
    directory = tmp_path_factory.mktemp("split") / "model"
    make_model().save_pretrained(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
