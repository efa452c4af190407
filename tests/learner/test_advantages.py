from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.advantages import EPSILON, episode_advantages, trajectory_advantages

KINDS = ("grpo", "dr_grpo", "rloo")
reward_lists = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


def test_closed_forms_for_one_success_in_four() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    deviation = np.sqrt(3) / 4
    np.testing.assert_allclose(episode_advantages(rewards, "dr_grpo"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(episode_advantages(rewards, "rloo"), [1.0, -1 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(
        episode_advantages(rewards, "grpo"), np.array([0.75, -0.25, -0.25, -0.25]) / (deviation + EPSILON)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_and_single_members_have_no_advantage(kind: str) -> None:
    # A tenth is not exact in binary: its mean over seven is not the same float, which must not become a signal.
    assert not episode_advantages(np.full(7, 0.1), kind).any()
    assert not episode_advantages(np.array([3.0]), kind).any()


@given(rewards=reward_lists, kind=st.sampled_from(KINDS))
def test_advantages_of_a_group_add_up_to_zero_and_keep_the_order(rewards: list[float], kind: str) -> None:
    advantages = episode_advantages(np.array(rewards), kind)
    assert abs(advantages.sum()) < 1e-8 * (1 + np.abs(advantages).sum())
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(advantages[order]) >= -1e-12).all()


def test_rloo_is_the_reward_minus_the_mean_of_the_others() -> None:
    rewards = np.array([0.3, -1.0, 2.5, 0.0, 0.7])
    others = [np.delete(rewards, i).mean() for i in range(5)]
    np.testing.assert_allclose(episode_advantages(rewards, "rloo"), rewards - others)


def test_groups_may_be_uneven_and_interleaved() -> None:
    advantages = trajectory_advantages("abaabc", range(6), [1.0, 5.0, 0.0, 0.5, 7.0, 9.0], "dr_grpo")
    np.testing.assert_allclose(advantages, [0.5, -1.0, -0.5, 0.0, 1.0, 0.0])


def test_trajectories_of_one_episode_share_its_advantage_and_count_once() -> None:
    advantages = trajectory_advantages("aaaa", ["x", "x", "x", "y"], [1.0, 1.0, 1.0, 0.0], "dr_grpo")
    np.testing.assert_allclose(advantages, [0.5, 0.5, 0.5, -0.5])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown advantage 'gea'"):
        episode_advantages(np.array([0.0, 1.0]), "gea")
