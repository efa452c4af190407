from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import make_layout
from learner.batching import balance, pack
from learner.length_groups import padded_tokens
from learner.packing import Packer, PackingCounts, even_bins, imbalance_bound

LENGTHS = st.lists(st.integers(1, 500), max_size=60)
WIDTHS = st.integers(1, 9)
PLAIN: Packer[range] = Packer(pack, balance)


def ranges(lengths: list[int]) -> list[range]:
    return [range(length) for length in lengths]


@given(LENGTHS, WIDTHS, st.integers(1, 800))
def test_every_sample_is_in_one_bin_and_no_bin_exceeds_the_budget(lengths: list[int], width: int, budget: int) -> None:
    bins = even_bins(ranges(lengths), width, budget, PLAIN)
    assert sorted(len(item) for members in bins for item in members) == sorted(lengths)
    assert len(bins) % width == 0 or width == 1
    limit = max([budget, *lengths])
    assert all(sum(map(len, members)) <= limit for members in bins)


@given(LENGTHS.filter(bool), st.integers(2, 9), st.integers(1, 800))
def test_the_imbalance_keeps_its_bound(lengths: list[int], width: int, budget: int) -> None:
    counts = PackingCounts(width, PLAIN)
    counts.add(even_bins(ranges(lengths), width, budget, PLAIN))
    assert -1e-9 <= counts.metrics()["packing/imbalance"] <= imbalance_bound(lengths, width) + 1e-9


def test_what_a_step_reports_of_its_passes() -> None:
    counts = PackingCounts(2, PLAIN)
    assert counts.metrics() == {}
    counts.add([ranges([300]), ranges([100]), ranges([200])])  # the second rank waits in the second round
    assert counts.metrics()["packing/imbalance"] == pytest.approx((300 + 200) * 2 / 600 - 1)
    assert counts.metrics()["packing/padding"] == 0.0


@given(LENGTHS)
def test_padding_is_counted_as_the_attention_pads(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)
    assert padded_tokens(ordered) == make_layout(ordered).padded_tokens


def test_long_sequences_are_hardly_padded() -> None:
    rng = np.random.default_rng(0)
    lengths = sorted((int(length) for length in rng.lognormal(11.0, 0.5, 200)), reverse=True)
    assert padded_tokens(lengths) / sum(lengths) - 1.0 < 0.02
