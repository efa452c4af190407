from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experience.ledger import Ledger, LedgerError, ks_distance


def test_every_group_and_token_is_accounted_for() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.dispatch()
    ledger.arrive(10)
    ledger.arrive(6)
    ledger.arrive_late(4)
    ledger.check()
    ledger.train(1, trained_tokens=7, masked_tokens=3, lengths=[10])
    ledger.drop("stale", tokens=6)
    ledger.check()
    assert ledger.snapshot() == {"dispatched": 3, "trained": 1, "dropped": {"stale": 1}, "live": 1}
    assert ledger.token_snapshot() == {"generated": 20, "trained": 7, "masked": 3, "wasted": 10, "live": 0}
    assert json.loads(json.dumps(ledger.snapshot())) == ledger.snapshot()


def test_undoing_training_restores_everything() -> None:
    ledger = Ledger()
    ledger.dispatch()
    ledger.arrive(10)
    before = (ledger.snapshot(), ledger.token_snapshot(), ledger.length_distance())
    ledger.train(1, 10, 0, [10])
    ledger.untrain(1, 10, 0, [10])
    ledger.check()
    assert (ledger.snapshot(), ledger.token_snapshot(), ledger.length_distance()) == before


def test_an_imbalance_is_reported() -> None:
    ledger = Ledger()
    ledger.dispatch()
    ledger.arrive(1)
    ledger.train(1, 2, 0, [1])
    with pytest.raises(LedgerError, match="tokens do not balance"):
        ledger.check()
    ledger.live += 1
    with pytest.raises(LedgerError, match="groups do not balance"):
        ledger.check()


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=30)


@given(lengths, lengths)
def test_ks_distance_is_the_largest_gap_of_the_distribution_functions(first: list[int], second: list[int]) -> None:
    gaps = [
        abs(sum(x <= at for x in first) / len(first) - sum(x <= at for x in second) / len(second)) for at in range(21)
    ]
    assert ks_distance(Counter(first), Counter(second)) == pytest.approx(max(gaps))
    assert ks_distance(Counter(first), Counter(first)) == 0.0


def test_dropping_long_episodes_shows_as_length_distance() -> None:
    ledger = Ledger()
    for length in (10, 10, 100, 100):
        ledger.dispatch()
        ledger.arrive(length)
    ledger.train(2, 20, 0, [10, 10])
    assert ledger.length_distance() == pytest.approx(0.5)
    assert Ledger().length_distance() == 0.0
