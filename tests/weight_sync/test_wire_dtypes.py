from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_one_process import Taker, move

from weight_sync.config import WeightsConfig
from weight_sync.engine_plugin.checkpoint import arriving, misfit, takes_fp8
from weight_sync.transports.protocol import decode_offer
from weight_sync.transports.select import AnyReceiver, make_sender
from weight_sync.wire_dtypes import FP8_MAX, dequantise, on_the_wire, quantise


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-12, 4), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_error_of_a_block_is_bounded(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Half a unit in the last of three mantissa bits, or half of the smallest number there is, 2^-9."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    values, scale = quantise(matrix)
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    error = (dequantise(values, scale, torch.float32) - matrix).abs()
    assert (error <= torch.maximum(matrix.abs() / 16, each / 1024) * (1 + 1e-5)).all()


def test_what_eight_bits_hold_exactly_stays_exact() -> None:
    matrix = torch.zeros(256, 128)
    matrix[0, 0], matrix[0, 1], matrix[200, 7] = FP8_MAX, -1.5, FP8_MAX / 2
    values, scale = quantise(matrix)
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.5]]))
    assert torch.equal(dequantise(values, scale, torch.float32), matrix)
    zeros, ones = quantise(torch.zeros(3, 3))
    assert torch.equal(dequantise(zeros, ones), torch.zeros(3, 3, dtype=torch.bfloat16))


NAMED = [
    ("model.embed_tokens.weight", torch.randn(300, 16)),
    ("model.layers.0.self_attn.q_proj.weight", torch.randn(200, 150)),
    ("model.layers.0.mlp.gate.weight", torch.randn(8, 16)),
    ("model.norm.weight", torch.ones(16)),
]
LINEAR = NAMED[1][0]


@pytest.mark.parametrize("delta", [False, True])
def test_blocks_travel_under_the_names_of_checkpoints_and_arrive_plain_where_they_must(
    delta: bool, tmp_path: Path
) -> None:
    config = WeightsConfig(dtype="fp8_block", delta=delta, bucket_mb=0.01)
    sender = make_sender(config, "shared_memory", directory=tmp_path)
    sender.prepare(1, on_the_wire(iter(NAMED), config.dtype), [])
    plain, native = Taker("e0"), Taker("e1", AnyReceiver("e1", fp8=True))
    assert move(sender, [plain, native]) == [1, 1]
    values, scale = quantise(NAMED[1][1])
    assert native.tensors[LINEAR].dtype == torch.float8_e4m3fn
    assert torch.equal(native.tensors[LINEAR].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(native.tensors[LINEAR + "_scale_inv"], scale)
    assert list(plain.tensors) == [name for name, _ in NAMED]
    assert torch.equal(plain.tensors[LINEAR], dequantise(values, scale))
    for name, tensor in NAMED:
        if name != LINEAR:
            assert torch.equal(plain.tensors[name], tensor.to(torch.bfloat16)), name
    sender.close()


def test_an_offer_fits_a_plain_model_and_one_in_blocks(tmp_path: Path) -> None:
    sender = make_sender(WeightsConfig(), "shared_memory", directory=tmp_path)
    manifest = decode_offer(sender.prepare(1, on_the_wire(iter(NAMED), "fp8_block"), [])).manifest
    plain = {name: tuple(tensor.shape) for name, tensor in NAMED}
    blocks = {**plain, LINEAR + "_scale_inv": (2, 2)}
    for expected in (plain, blocks):
        assert misfit(arriving(manifest, expected), expected, False) is None
    assert (takes_fp8(plain), takes_fp8(blocks), takes_fp8(None)) == (False, True, False)
    sender.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_are_converted_and_the_rest_is_not(dtype: str) -> None:
    tied = torch.randn(4, 4)
    found = dict(on_the_wire([("a", tied), ("steps", torch.arange(3)), ("b", tied)], dtype))
    assert list(found) == ["a", "steps"]
    assert (found["a"].dtype, found["steps"].dtype) == (getattr(torch, dtype), torch.int64)
