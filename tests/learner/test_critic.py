from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.critic import end_rewards, gae, length_adaptive_lambda, returns

lists = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=12)


@given(lists, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_temporal_differences(
    pairs: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    rewards, values = (np.array(column) for column in zip(*pairs, strict=True))
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    powers = (gamma * lam) ** np.arange(len(values))
    expected = [float((powers[: len(values) - t] * deltas[t:]).sum()) for t in range(len(values))]
    np.testing.assert_allclose(gae(rewards, values, gamma, lam), expected, atol=1e-9)


@given(lists)
def test_with_lambda_one_the_critic_learns_the_sum_of_rewards_to_come(pairs: list[tuple[float, float]]) -> None:
    rewards, values = (np.array(column) for column in zip(*pairs, strict=True))
    np.testing.assert_allclose(returns(rewards, values, 1.0, 1.0), np.cumsum(rewards[::-1])[::-1], atol=1e-9)


def test_with_lambda_zero_it_is_one_step_ahead() -> None:
    np.testing.assert_allclose(gae(np.array([0.0, 1.0]), np.array([0.2, 0.6]), 0.5, 0.0), [0.1, 0.4])


def test_lambda_grows_with_the_length() -> None:
    assert length_adaptive_lambda(1000, 0.05) == pytest.approx(0.98)
    assert length_adaptive_lambda(10, 0.05) == 0.0
    with pytest.raises(ValueError, match="alpha=0"):
        length_adaptive_lambda(10, 0.0)


def test_the_reward_comes_with_the_last_token() -> None:
    np.testing.assert_allclose(end_rewards(3, 2.0, np.array([1.0, 0.0, 1.0]), 0.1), [-0.1, 0.0, 1.9])
    assert end_rewards(0, 1.0).tolist() == []
