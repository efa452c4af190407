from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weight_sync.engine_plugin.checkpoint import checkpoint_shapes, misfit, tied
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, make_plan

SHAPES = {"embed.weight": (6, 4), "norm.weight": (4,), "lm_head.weight": (6, 4)}


def manifest(shapes: dict[str, tuple[int, ...]]) -> Manifest:
    return make_plan(7, [(name, shape, "float32") for name, shape in shapes.items()], 1 << 20)


def test_names_and_shapes_come_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(())}, tmp_path / "model-2.safetensors", metadata={"format": "pt"})
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert checkpoint_shapes(tmp_path) == {"a": (2, 3), "b": (5,), "c": ()}


def test_a_directory_without_such_files_says_nothing(tmp_path: Path) -> None:
    assert checkpoint_shapes(tmp_path) is None
    assert checkpoint_shapes(tmp_path / "gone") is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x08\0\0\0\0\0\0\0[1, 2] ", b'\x0b\0\0\0\0\0\0\0{"a": true}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightTransferError, match=r"model\.safetensors"):
        checkpoint_shapes(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_tied_heads_are_known_from_the_configuration(tmp_path: Path, config: object, expected: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tied(tmp_path) is expected


def test_an_offer_of_the_same_tensors_fits() -> None:
    assert misfit(manifest(SHAPES), SHAPES, False) is None


def test_a_tied_head_may_be_there_or_not() -> None:
    without = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    assert misfit(manifest(without), SHAPES, True) is None
    assert misfit(manifest(SHAPES), without, True) is None
    assert "lm_head.weight missing" in (misfit(manifest(without), SHAPES, False) or "")


def test_what_does_not_fit_is_named() -> None:
    assert "no other.weight" in (misfit(manifest({**SHAPES, "other.weight": (1,)}), SHAPES, False) or "")
    without = {name: shape for name, shape in SHAPES.items() if name != "norm.weight"}
    assert "norm.weight missing" in (misfit(manifest(without), SHAPES, False) or "")
    reason = misfit(manifest({**SHAPES, "norm.weight": (5,)}), SHAPES, False)
    assert reason is not None
    assert "norm.weight has shape (5,), the model's is (4,)" in reason


def test_buffers_of_older_files_are_no_weights() -> None:
    assert misfit(manifest(SHAPES), {**SHAPES, "layer.rotary_emb.inv_freq": (2,)}, False) is None
