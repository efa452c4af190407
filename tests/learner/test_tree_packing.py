from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefix_fixtures import Sequences, as_samples, forests

from learner.batching import Sample, balance, pack, tokens_of
from learner.prefix_tree import ALWAYS, WHERE_IT_PAYS, Sharing
from learner.tree_packing import balance_shared, computed_tokens, families, pack_shared

RULES = st.sampled_from([ALWAYS, WHERE_IT_PAYS])


def group_of(name: int, prefix: int, continuations: Sequence[int]) -> list[Sample]:
    rng = np.random.default_rng(name)
    prompt = rng.integers(0, 1000, prefix)
    return as_samples([np.concatenate([prompt, rng.integers(0, 1000, n)]).astype(np.int32) for n in continuations])


def ids(bins: Sequence[Sequence[Sample]]) -> list[int]:
    return sorted(id(sample) for samples in bins for sample in samples)


@given(sequences=forests(most=20), budget=st.integers(10, 120), sharing=RULES)
def test_packing_loses_nothing_and_counts_the_forest(sequences: Sequences, budget: int, sharing: Sharing) -> None:
    samples = as_samples(sequences)
    bins = pack_shared(samples, budget, sharing)
    assert ids(bins) == ids([samples])
    for packed in bins:
        assert computed_tokens(packed, sharing) <= budget or len(packed) == 1
        assert [len(s) for s in packed] == sorted((len(s) for s in packed), reverse=True)


@given(sequences=forests(most=20), count=st.integers(1, 4), sharing=RULES)
def test_balancing_loses_nothing(sequences: Sequences, count: int, sharing: Sharing) -> None:
    samples = as_samples(sequences)
    bins = balance_shared(samples, count, sharing)
    assert len(bins) == count
    assert ids(bins) == ids([samples])


def test_without_sharing_it_is_plain_packing() -> None:
    samples = [*group_of(1, 20, [5, 9]), *group_of(2, 3, [40, 1])]
    assert pack_shared(samples, 50, None) == pack(samples, 50)
    assert balance_shared(samples, 2, None) == balance(samples, 2)


def test_a_group_stays_together() -> None:
    groups = [group_of(name, 60, [10] * 6) for name in range(4)]
    mixed = [group[member] for member in range(6) for group in groups]
    bins = pack_shared(mixed, 250, ALWAYS)
    assert sorted(computed_tokens(samples, ALWAYS) for samples in bins) == [240, 240]
    assert tokens_of(mixed) == 4 * 6 * 70


def test_a_group_over_the_budget_is_cut_into_few_runs() -> None:
    group = group_of(0, 60, [10] * 12)
    runs = families(group, ALWAYS, 100)
    assert [computed_tokens(run, ALWAYS) for run in runs] == [100, 100, 100]


def test_a_group_over_the_budget_is_not_cut_where_a_pass_may_be_larger() -> None:
    group = group_of(0, 60, [10] * 12)
    alone = group_of(1, 20, [5])
    bins = pack_shared([*alone, *group], 100, ALWAYS, largest=400)
    assert [computed_tokens(samples, ALWAYS) for samples in bins] == [180, 25]
    assert pack_shared(group, 100, ALWAYS, largest=50) == pack_shared(group, 100, ALWAYS)


def test_ranks_get_even_shares_of_groups_with_long_prompts() -> None:
    rng = np.random.default_rng(4)
    groups = [group_of(n, int(rng.integers(100, 900)), rng.integers(20, 300, 8).tolist()) for n in range(12)]
    samples = [sample for group in groups for sample in group]
    bins = balance_shared(samples, 4, WHERE_IT_PAYS)
    loads = [computed_tokens(members, WHERE_IT_PAYS) for members in bins]
    assert max(loads) <= np.mean(loads) * 1.05
    assert sum(loads) == pytest.approx(computed_tokens(samples, WHERE_IT_PAYS), rel=0.05)


def test_one_group_for_two_ranks_is_split_at_the_cost_of_a_second_prefix() -> None:
    group = group_of(0, 400, [100] * 8)
    loads = [computed_tokens(members, ALWAYS) for members in balance_shared(group, 2, ALWAYS)]
    assert loads == [800, 800]
