from __future__ import annotations

from pathlib import Path

import pytest
from word_tokenizer import write_tokenizer


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")
