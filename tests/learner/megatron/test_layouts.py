"""Cutting and joining are inverse, bit by bit, and every tensor of a Hugging Face model has one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron_fixtures import ARCHITECTURES
from safetensors import safe_open

from learner.backends.megatron.architecture import read_architecture
from learner.backends.megatron.files import INDEX, WeightFiles, read_config, write_weights
from learner.backends.megatron.layouts import Copied, Divided, Interleaved, Layout, PaddedRows, Stacked
from learner.backends.megatron.settings import Sizes
from learner.backends.megatron.slots import fused, fused_names, make_slots, unfused
from learner.errors import ModelError


def tensors(shapes: list[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(ranks=st.sampled_from([1, 2, 4]), scale=st.integers(1, 3), repeats=st.integers(1, 3), seed=st.integers(0, 99))
def test_cut_and_join_are_inverse(ranks: int, scale: int, repeats: int, seed: int) -> None:
    heads, width, hidden = 4 * scale, 2, 3
    rows = [heads * repeats * width, heads * width, heads * width]
    odd = 4 * scale + seed % 4 + 13
    cases: list[tuple[Layout, list[tuple[int, ...]]]] = [
        (Copied(), [(5,)]),
        (Divided(0), [(4 * scale, 3)]),
        (Divided(1), [(3, 4 * scale)]),
        (PaddedRows(odd), [(odd, 3)]),
        (Stacked(), [(4 * scale, 3), (4 * scale, 3)]),
        (Stacked(divided=False), [(3, 3), (3, 3)]),
        (Interleaved(heads * repeats, heads, width), [(row, hidden) for row in rows]),
        (Interleaved(heads * repeats, heads, width), [(row,) for row in rows]),
    ]
    for layout, shapes in cases:
        whole = tensors(shapes, seed)
        shards = [layout.cut(whole, rank, ranks) for rank in range(ranks)]
        assert len({shard.shape for shard in shards}) == 1
        for before, after in zip(whole, layout.join(shards), strict=True):
            assert torch.equal(before, after), layout


def test_each_rank_has_its_key_value_heads_with_their_queries() -> None:
    query, key, value = (torch.arange(count)[:, None] + start for count, start in ((8, 0), (4, 100), (4, 200)))
    found = Interleaved(heads=4, kv_heads=2, width=2).cut([query, key, value], 1, 2)
    assert found[:, 0].tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tensor=2), Sizes(pipeline=2), Sizes(data=2)])
def test_every_tensor_of_the_files_has_one_slot(models: dict[str, Path], architecture: str, sizes: Sizes) -> None:
    slots = make_slots(read_architecture(read_config(models[architecture])), sizes)
    with safe_open(models[architecture] / "model.safetensors", framework="pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found = {n: s for slot in slots if not slot.copy for n, s in zip(slot.names, slot.shapes, strict=True)}
    assert found == expected
    places = [(slot.stage, slot.expert_rank, slot.local) for slot in slots]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_loaded_model(models: dict[str, Path], architecture: str) -> None:
    """Experts of a layer are one tensor there, and several in files."""
    from transformers import AutoModelForCausalLM

    path = models[architecture]
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    expected = dict(model.named_parameters())
    described = read_architecture(read_config(path))
    slots = make_slots(described, Sizes())
    assert sorted(fused_names(slots)) == sorted(expected)
    with WeightFiles(path) as files:
        named = ((name, files.read(name)) for slot in slots for name in slot.names)
        found = dict(fused(named, described.experts))
        find = unfused(found)
        for slot in slots:
            for name in slot.names:
                assert torch.equal(find(name), files.read(name)), name
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_weights_go_to_files_of_bounded_size(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = models["qwen3"]
    read_config(path).save_pretrained(tmp_path)
    with WeightFiles(path) as files:
        names = [name for slot in make_slots(read_architecture(read_config(path)), Sizes()) for name in slot.names]
        write_weights(tmp_path, ((name, files.read(name)) for name in names), keep=True, file_bytes=20_000)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) > 1
    assert (tmp_path / INDEX).is_file()
    assert all(file.stat().st_size < 30_000 for file in written)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(path).state_dict().items():
        assert torch.equal(mine[name], tensor), name


def test_files_that_lack_a_tensor_or_are_none_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    with WeightFiles(models["qwen3"]) as files, pytest.raises(ModelError, match=r"its weights lack lm_tail\.weight"):
        files.read("lm_tail.weight")
    with pytest.raises(ModelError, match="holds no weights in safetensors files"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        WeightFiles(tmp_path)
