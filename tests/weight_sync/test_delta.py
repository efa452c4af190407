from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_sync.delta import DeltaChain, apply_delta, changed_share, decode_delta, encode_delta
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, make_plan

DTYPES = ["bfloat16", "float32", "float8_e4m3fn", "int64"]


def layout(sizes: list[tuple[int, str]], version: int = 1) -> Manifest:
    return make_plan(version, [(f"t{i}", (n,), dtype) for i, (n, dtype) in enumerate(sizes)], 1 << 20)


@given(
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from(DTYPES)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
)
@settings(max_examples=60)
def test_what_comes_out_is_the_new_version_bit_for_bit(sizes: list[tuple[int, str]], seed: int, share: float) -> None:
    manifest, rng = layout(sizes), np.random.default_rng(seed)
    old = rng.integers(0, 256, manifest.total_bytes, dtype=np.uint8)
    new = np.where(rng.random(len(old)) < share, rng.integers(0, 256, len(old), dtype=np.uint8), old)
    for spec, following in zip(manifest.tensors, [*manifest.tensors[1:], None], strict=True):
        end = following.offset if following else manifest.total_bytes
        new[spec.offset + spec.nbytes : end] = old[spec.offset + spec.nbytes : end]  # the padding never changes
    delta = decode_delta(encode_delta(manifest, 0, old, new))
    flat = old.copy()
    apply_delta(manifest, delta, flat, 0)
    assert np.array_equal(flat, new)


@pytest.mark.parametrize("distance", [1, 254, 255, 256, 510, 511, 5000])
def test_distances_around_the_escape_byte(distance: int) -> None:
    manifest = layout([(6000, "bfloat16")])
    old = np.zeros(manifest.total_bytes, np.uint8)
    new = old.copy()
    new.view(np.uint16)[[0, distance, 5999]] = [1, 65535, 7]
    delta = decode_delta(encode_delta(manifest, 0, old, new))
    assert delta.tensors[0].count == 3
    apply_delta(manifest, delta, old, 0)
    assert np.array_equal(old, new)


def test_small_changes_take_two_bytes_a_word() -> None:
    manifest = layout([(100_000, "bfloat16")])
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, manifest.total_bytes, dtype=np.uint8)
    new = old.copy()
    where = rng.choice(100_000, 1000, replace=False)
    new.view(np.uint16)[where] += rng.choice([1, -1], 1000).astype(np.uint16)
    encoded = encode_delta(manifest, 0, old, new)
    assert len(encoded) < 2.2 * 1000
    assert changed_share(decode_delta(encoded), manifest) == pytest.approx(0.01)


def test_a_tensor_that_changed_everywhere_travels_whole() -> None:
    manifest = layout([(1000, "bfloat16"), (1000, "bfloat16")])
    rng = np.random.default_rng(0)
    old, new = (rng.integers(0, 256, manifest.total_bytes, dtype=np.uint8) for _ in range(2))
    new[manifest.tensors[1].offset :] = old[manifest.tensors[1].offset :]
    new[2000:2048] = old[2000:2048]
    delta = decode_delta(encode_delta(manifest, 0, old, new))
    assert [tensor.count for tensor in delta.tensors] == [-1, 0]


def test_it_is_refused_by_anything_but_its_base() -> None:
    manifest = layout([(100, "float32")], version=5)
    old, new = np.zeros(manifest.total_bytes, np.uint8), np.ones(manifest.total_bytes, np.uint8)
    new[400:] = 0
    delta = decode_delta(encode_delta(manifest, 4, old, new))
    with pytest.raises(WeightTransferError, match="a change of version 4, and version 3 is here: ask for a full copy"):
        apply_delta(manifest, delta, old, 3)
    other = old.copy()
    other[17] = 1
    before = other.copy()
    with pytest.raises(WeightTransferError, match="is here as version 4, and not what version 5 was made from"):
        apply_delta(manifest, delta, other, 4)
    assert np.array_equal(other, before)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=40)
def test_damage_never_goes_unnoticed(place: int, flip: int) -> None:
    manifest = layout([(300, "bfloat16"), (50, "float32")])
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, manifest.total_bytes, dtype=np.uint8)
    new = old.copy()
    new[:400:7] ^= 1
    encoded = bytearray(encode_delta(manifest, 0, old, new))
    encoded[place % len(encoded)] ^= flip
    flat = old.copy()
    try:
        apply_delta(manifest, decode_delta(bytes(encoded)), flat, 0)
    except WeightTransferError:
        return
    assert np.array_equal(flat, new)


def test_a_chain_has_a_whole_version_at_intervals_and_when_tensors_change() -> None:
    chain, rng = DeltaChain(snapshot_every=3), np.random.default_rng(0)
    flats = [rng.integers(0, 256, 256, dtype=np.uint8) for _ in range(6)]
    whole = [chain.take(layout([(128, "bfloat16")], v), flat) is None for v, flat in enumerate(flats)]
    assert whole == [True, False, False, True, False, False]
    assert chain.take(layout([(64, "float32")], 6), flats[0]) is None
    with pytest.raises(ValueError, match="must be at least 1"):
        DeltaChain(0)


def test_a_chain_of_many_versions_ends_where_the_sender_is() -> None:
    chain, rng = DeltaChain(snapshot_every=50), np.random.default_rng(0)
    current = rng.integers(0, 256, 2048, dtype=np.uint8)
    held = np.zeros_like(current)
    for version in range(120):
        manifest = layout([(1024, "bfloat16")], version)
        encoded = chain.take(manifest, current.copy())
        if encoded is None:
            held = current.copy()
        else:
            apply_delta(manifest, decode_delta(encoded), held, version - 1)
        assert np.array_equal(held, current)
        words = current.view(np.uint16)
        words[rng.choice(1024, 9)] += 1
