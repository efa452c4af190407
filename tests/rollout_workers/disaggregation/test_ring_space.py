from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_workers.disaggregation.ring_space import ALIGNMENT, RingSpace


@given(st.integers(64, 1000), st.lists(st.integers(0, 400), max_size=60))
def test_pieces_never_overlap_and_an_empty_ring_takes_whatever_fits(capacity: int, wishes: list[int]) -> None:
    """A wish of 0 gives the oldest piece back."""
    ring = RingSpace(capacity)
    live: list[tuple[int, int]] = []
    for wish in wishes:
        if wish == 0:
            if live:
                ring.release(live.pop(0)[0])
            continue
        if wish > capacity:
            with pytest.raises(ValueError, match=f"{wish} bytes of a ring of {capacity}"):
                ring.reserve(wish)
            continue
        offset = ring.reserve(wish)
        if offset is None:
            assert live
            continue
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= offset + wish <= capacity
        assert all(offset + wish <= begin or end <= offset for begin, end in live)
        live.append((offset, offset + wish))
        assert ring.out == len(live)
    for begin, _ in live:
        ring.release(begin)
    assert ring.reserve(capacity) == 0


def test_pieces_come_back_in_order() -> None:
    ring = RingSpace(1024)
    ring.reserve(100)
    ring.reserve(100)
    with pytest.raises(ValueError, match="offset 128 is not the oldest piece"):
        ring.release(128)
    with pytest.raises(ValueError, match="none"):
        RingSpace(64).release(0)
