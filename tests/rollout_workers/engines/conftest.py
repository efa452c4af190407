from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import make_model, make_tokenizer
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def model_directory(tmp_path: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"
