"""Groups that teach nothing, or that cannot be: what a step makes of them, and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCABULARY, make_group, make_groups, make_learner, make_trajectory, train_step

from experience.records import Group
from learner.errors import LearnerError
from learner.learner import Learner


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [make_group(0, [1.0], np.random.default_rng(0))],
        [make_group(i, [reward] * 4, np.random.default_rng(0)) for i, reward in enumerate((0.0, 1.0))],
        [make_group(0, [None, None], np.random.default_rng(0))],
    ],
    ids=["empty batch", "group of one", "all rewards equal", "no rewards"],
)
def test_a_step_that_teaches_nothing_changes_nothing_and_is_no_error(
    model_directory: Path, groups: list[Group]
) -> None:
    learner = make_learner(model_directory)
    before = weights_of(learner)
    metrics = train_step(learner, groups)
    assert (learner.version, metrics["updates"], metrics["step/skipped"], metrics["grad_norm"]) == (1, 0, 0, 0)
    assert metrics["groups/no_signal"] == len(groups)
    sampled = sum(group.sampled_tokens for group in groups)
    assert metrics["tokens/trained"] + metrics["tokens/masked"] == sampled
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())
    assert train_step(learner, make_groups(3, version=1))["updates"] == 1


def test_a_trajectory_longer_than_a_pass_runs_alone(model_directory: Path) -> None:
    rng = np.random.default_rng(0)
    group = make_group(0, [0.0, 1.0], rng)
    group.trajectories[0] = make_trajectory("g0-0", rng, length=200, reward=0.0)
    tight = train_step(make_learner(model_directory, token_budget=64), [group])
    loose = train_step(make_learner(model_directory), [group])
    assert (tight["passes"], loose["passes"]) == (2, 1)
    assert tight["grad_norm"] == pytest.approx(loose["grad_norm"], rel=1e-5)


def test_a_trajectory_longer_than_the_model_is_refused_by_name(model_directory: Path) -> None:
    rng = np.random.default_rng(0)
    group = make_group(0, [0.0, 1.0], rng)
    group.trajectories[1] = make_trajectory("g0-1", rng, length=257, reward=1.0)
    with pytest.raises(
        LearnerError, match=r"group g0, trajectory g0-1 has 257 tokens, .* 256 positions: lower rollout"
    ):
        train_step(make_learner(model_directory), [group])


@pytest.mark.parametrize("token", [VOCABULARY, 5 * VOCABULARY, -1])
def test_tokens_of_another_tokenizer_are_refused_by_name(model_directory: Path, token: int) -> None:
    groups = make_groups(3)
    groups[1].trajectories[2].tokens[4] = token
    learner = make_learner(model_directory)
    before = weights_of(learner)
    with pytest.raises(LearnerError, match=r"group g1, trajectory g1-2 has token .*knows 64: .*same tokenizer"):
        train_step(learner, groups)
    assert learner.version == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())


def test_a_loss_that_is_not_finite_is_named_by_step_group_and_tokens(
    model_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = make_groups(3)
    trajectory = groups[1].trajectories[2]
    bad = np.flatnonzero(trajectory.trainable)[2:5]
    trajectory.logprobs[bad] = -np.inf
    learner = make_learner(model_directory, surrogate="plain", correction="none")
    metrics = train_step(learner, groups)
    assert metrics["step/skipped"] == 1
    assert f"step 0 skipped: loss or gradient is not finite (g1/g1-2 tokens {bad[0]} to {bad[-1]})" in caplog.text
    assert metrics["tokens/trained"] == 0


def test_a_gradient_that_is_not_finite_skips_the_step(model_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A finite loss so large that its gradient is not."""
    groups = make_groups(3)
    for trajectory in groups[0].trajectories:
        trajectory.logprobs[trajectory.trainable] = -85.0
    learner = make_learner(model_directory, surrogate="plain", correction="none")
    before = weights_of(learner)
    metrics = train_step(learner, groups)
    assert (metrics["step/skipped"], metrics["updates"], learner.version) == (1, 0, 1)
    assert "grad_norm" not in metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())
    (told,) = [message for message in caplog.messages if message.startswith("step 0 skipped")]
    assert all(f"g0/g0-{index} tokens " in told for index in range(4))
    assert "g1/" not in told
