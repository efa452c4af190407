from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_fixtures import make_group, make_learner, train_step

from learner.objectives.risk import bundled_advantages, mixed_value_at_risk


def test_low_scores_count_more_and_good_ones_nothing() -> None:
    scores = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    # Quantiles: 0.2 -> 0.0, 0.8 -> 0.75.
    np.testing.assert_allclose(mixed_value_at_risk(scores, 0.2, 0.8, 1.0), [-0.75, -0.5, -0.25, 0.0, 0.0])
    # 0.4 -> 0.25: below it the weight is added.
    np.testing.assert_allclose(mixed_value_at_risk(scores, 0.4, 0.8, 2.0), [-0.75 - 0.5, -0.5, -0.25, 0.0, 0.0])


def objective(outcomes: list[float], probabilities: np.ndarray, low: float, high: float, weight: float) -> float:  # type: ignore[type-arg]
    """``(1 + weight) int_0^low F^-1 + int_low^high F^-1`` of a distribution over ascending outcomes, exactly."""
    ends = np.cumsum(probabilities)
    starts = ends - probabilities

    def below(level: float) -> float:
        return float(sum(r * max(0.0, min(e, level) - s) for r, s, e in zip(outcomes, starts, ends, strict=True)))

    return weight * below(low) + below(high)


def test_it_is_the_gradient_of_the_mixed_value_at_risk() -> None:
    outcomes, counts = [0.0, 0.3, 0.6, 1.0], np.array([3, 4, 6, 7])
    scores = np.repeat(outcomes, counts)
    low, high, weight, step = 0.21, 0.83, 1.5, 1e-4
    found = dict(zip(scores.tolist(), mixed_value_at_risk(scores, low, high, weight).tolist(), strict=True))
    probabilities = counts / counts.sum()
    for i in range(4):
        for j in range(4):
            moved = probabilities.copy()
            moved[i] += step
            moved[j] -= step
            change = objective(outcomes, moved, low, high, weight) - objective(
                outcomes, probabilities, low, high, weight
            )
            assert change / step == pytest.approx(found[outcomes[i]] - found[outcomes[j]], abs=1e-6)


def test_bundles_hold_one_episode_of_each_group() -> None:
    groups = [{"a0": 1.0, "a1": 0.0}, {"b0": 1.0, "b1": 0.0}]
    found = bundled_advantages(groups, 2, 0.2, 0.8, 1.0)
    # Two bundles, scores 1 and 0; the 0.2-quantile is 0, the 0.8-quantile 1: -1 and 0, their mean taken off.
    assert found == [{"a0": 0.5, "a1": -0.5}, {"b0": 0.5, "b1": -0.5}]


def test_groups_may_be_uneven_and_the_last_set_smaller() -> None:
    groups = [{"a0": 1.0, "a1": 0.0, "a2": 0.0}, {"b0": 0.0}, {"c0": 1.0, "c1": 1.0}]
    found = bundled_advantages(groups, 2, 0.2, 0.8, 1.0)
    assert [sorted(group) for group in found] == [["a0", "a1", "a2"], ["b0"], ["c0", "c1"]]
    assert found[0]["a0"] == found[1]["b0"]
    assert found[0]["a1"] == found[0]["a2"]
    assert bundled_advantages([], 2, 0.2, 0.8, 1.0) == []


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=1, max_size=9), st.integers(1, 5)
)
def test_a_better_bundle_never_has_a_smaller_advantage_and_equal_ones_teach_nothing(
    rewards: list[list[float]], size: int
) -> None:
    groups = [{f"{i}-{j}": reward for j, reward in enumerate(group)} for i, group in enumerate(rewards)]
    found = bundled_advantages(groups, size, 0.2, 0.8, 1.0)
    assert [list(group) for group in found] == [list(group) for group in groups]
    if len({reward for group in rewards for reward in group}) == 1:
        assert all(abs(advantage) < 1e-12 for group in found for advantage in group.values())


def test_groups_without_signal_of_their_own_teach_in_a_bundle(model_directory: Path) -> None:
    rng = np.random.default_rng(0)
    groups = [make_group(0, [1.0, 1.0], rng), make_group(1, [0.0, 1.0], rng), make_group(2, [0.0, 0.0], rng)]
    learner = make_learner(
        model_directory,
        advantage="riskpo",
        risk_bundle=1,
        surrogate="clip",
        correction="none",
        clip_low=0.2,
        clip_high=0.2,
    )
    metrics = train_step(learner, groups)
    assert metrics["grad_norm"] > 0
    assert metrics["updates"] == 1
