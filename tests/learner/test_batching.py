from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_fixtures import make_group, make_trajectory

from experience.records import Group, GroupHeader, Status, Task, Trajectory
from learner.batching import Sample, collate, make_samples, pack


def group_of(*trajectories: Trajectory) -> Group:
    task = Task(task_id="t", environment="none", payload={})
    header = GroupHeader(group_id="g0", index=0, task=task, size=len(trajectories), version_floor=0, seed=0)
    return Group(header=header, trajectories=list(trajectories))


def make_sample(length: int, name: str = "s") -> Sample:
    return Sample(
        trajectory_id=name,
        group_id="g0",
        inputs=np.arange(length, dtype=np.int32),
        positions=np.array([length - 1]),
        targets=np.array([7]),
        behaviour=np.array([-1.0], dtype=np.float32),
        lags=np.array([0]),
        advantage=1.0,
        temperature=1.0,
    )


def test_targets_are_the_trainable_tokens_and_positions_predict_them() -> None:
    rng = np.random.default_rng(0)
    trajectory = make_trajectory("a", rng, length=12, reward=1.0)
    made = make_samples(group_of(trajectory, make_trajectory("b", rng, reward=0.0)), 0, 0, "dr_grpo")
    sample = made.samples[0]
    where = np.flatnonzero(trajectory.trainable)
    np.testing.assert_array_equal(sample.targets, trajectory.tokens[where])
    np.testing.assert_array_equal(sample.positions, where - 1)
    np.testing.assert_array_equal(sample.behaviour, trajectory.logprobs[where])
    np.testing.assert_array_equal(sample.inputs, trajectory.tokens[: where[-1]])
    assert sample.advantage == 0.5


@given(max_lag=st.integers(0, 5), version=st.integers(0, 9), seed=st.integers(0, 1000))
def test_no_token_over_max_lag_is_a_target(max_lag: int, version: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trajectories = [make_trajectory(f"t{i}", rng, reward=float(i)) for i in range(3)]
    for trajectory in trajectories:
        sampled = rng.integers(0, version + 1, len(trajectory)).astype(np.int32)
        trajectory.versions = np.where(trajectory.trainable, sampled, -1).astype(np.int32)
    made = make_samples(group_of(*trajectories), version, max_lag, "grpo")
    young = sum(int((t.trainable & (version - t.versions <= max_lag)).sum()) for t in trajectories)
    assert made.usable_tokens == sum(len(s.targets) for s in made.samples) == young
    assert all((sample.lags <= max_lag).all() for sample in made.samples)
    assert made.sampled_tokens == sum(int(t.trainable.sum()) for t in trajectories)


def test_a_first_token_that_nothing_predicts_carries_no_loss() -> None:
    rng = np.random.default_rng(0)
    trajectory = make_trajectory("a", rng, length=8, reward=1.0)
    trajectory.trainable[:] = True
    trajectory.versions[:] = 0
    made = make_samples(group_of(trajectory, make_trajectory("b", rng)), 0, 0, "grpo")
    assert len(made.samples[0].targets) == 7
    assert made.sampled_tokens - made.usable_tokens == 1


def test_episodes_without_a_reward_carry_no_loss_and_are_counted() -> None:
    rng = np.random.default_rng(0)
    made = make_samples(
        group_of(
            make_trajectory("won", rng, reward=1.0),
            make_trajectory("lost", rng, reward=0.0),
            make_trajectory("unjudged", rng, reward=None),
            make_trajectory("broken", rng, reward=0.0, status=Status.SYSTEM_ERROR),
        ),
        0,
        0,
        "dr_grpo",
    )
    assert {s.trajectory_id: s.advantage for s in made.samples} == {"won": 0.5, "lost": -0.5}
    assert made.unrewarded == 2
    assert made.rewards == {"won": 1.0, "lost": 0.0}


def test_branches_of_an_episode_share_its_advantage() -> None:
    rng = np.random.default_rng(0)
    made = make_samples(
        group_of(
            make_trajectory("a1", rng, reward=1.0, episode="a"),
            make_trajectory("a2", rng, reward=1.0, episode="a"),
            make_trajectory("b", rng, reward=0.0),
        ),
        0,
        0,
        "dr_grpo",
    )
    assert [s.advantage for s in made.samples] == [0.5, 0.5, -0.5]


def test_a_group_whose_rewards_are_equal_has_no_signal() -> None:
    rng = np.random.default_rng(0)
    assert not make_samples(make_group(0, [1.0, 1.0], rng), 0, 0, "grpo").has_signal
    assert make_samples(make_group(0, [1.0, 0.0], rng), 0, 0, "grpo").has_signal


@given(lengths=st.lists(st.integers(1, 120), max_size=60), budget=st.integers(20, 300))
def test_packing_keeps_every_sample_within_the_budget_and_sorted(lengths: list[int], budget: int) -> None:
    samples = [make_sample(length, str(i)) for i, length in enumerate(lengths)]
    bins = pack(samples, budget)
    assert sorted(s.trajectory_id for b in bins for s in b) == sorted(s.trajectory_id for s in samples)
    for packed in bins:
        assert sum(map(len, packed)) <= budget or len(packed) == 1
        assert [len(s) for s in packed] == sorted((len(s) for s in packed), reverse=True)
    room = [budget - sum(map(len, packed)) for packed in bins]
    for later in range(1, len(bins)):
        assert all(len(bins[later][0]) > space for space in room[:later])


def test_collate_lays_samples_end_to_end() -> None:
    rng = np.random.default_rng(0)
    group = make_group(0, [1.0, 0.0, 0.0], rng, temperature=0.5)
    samples = sorted(make_samples(group, 3, 9, "grpo").samples, key=len, reverse=True)
    batch = collate(samples, "sequence")
    assert batch.inputs.shape == batch.position_ids.shape == (1, sum(map(len, samples)))
    start = 0
    for index, sample in enumerate(samples):
        own = batch.sample_of == index
        np.testing.assert_array_equal(batch.inputs[0, start : start + len(sample)], sample.inputs)
        np.testing.assert_array_equal(batch.position_ids[0, start : start + len(sample)], np.arange(len(sample)))
        np.testing.assert_array_equal(batch.positions[own] - start, sample.positions)
        np.testing.assert_array_equal(batch.targets[own], sample.targets)
        torch.testing.assert_close(batch.weights[own].sum(), torch.tensor(1.0))
        assert batch.advantages[own].unique().tolist() == pytest.approx([sample.advantage])
        assert batch.lags[own].unique().tolist() == [3]
        start += len(sample)
    assert batch.inverse_temperatures.unique().tolist() == [2.0]
    assert batch.normaliser == 3.0
    assert collate(samples, "token").normaliser == sum(len(s.targets) for s in samples)
