from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_sync.checksums import ROW_BYTES, block_checksum


@given(st.integers(0, 3 * ROW_BYTES), st.integers(0, 2**31), st.integers(1, 255))
def test_a_changed_byte_changes_it(size: int, seed: int, flip: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, size, dtype=np.uint8)
    before = block_checksum(data)
    assert block_checksum(data.copy()) == before
    assert block_checksum(data[:-1]) != before or size == 0
    if size:
        data[rng.integers(size)] ^= flip
        assert block_checksum(data) != before


@pytest.mark.parametrize("distance", [1, 7, 511, 512, 1024])
def test_a_change_in_the_wrong_place_changes_it(distance: int) -> None:
    """What a damaged position of a `Delta` would do: the same sum, elsewhere."""
    data = np.random.default_rng(0).integers(0, 256, 4 * ROW_BYTES + 40, dtype=np.uint8)
    right, wrong = data.copy(), data.copy()
    right.view(np.uint64)[3] += 1
    wrong.view(np.uint64)[3 + distance] += 1
    assert len({block_checksum(data), block_checksum(right), block_checksum(wrong)}) == 3
