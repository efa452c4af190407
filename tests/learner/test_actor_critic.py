"""A critic beside the policy: what it learns, when the policy waits for it, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_group, make_groups, make_learner, train_step

from experience.records import Group
from experience.wire import encode_group
from learner.batching import make_samples
from learner.checkpoint import OWN_FILE
from learner.config import LearnerConfig, ModelConfig
from learner.critic import with_advantages
from learner.errors import CheckpointError
from learner.learner import Learner
from learner.mixing_config import CriticConfig
from learner.objectives.config import ObjectiveConfig
from learner.objectives.critic import lambda_of, value_loss

PPO: dict[str, Any] = {
    "advantage": "gae",
    "surrogate": "clip",
    "correction": "decoupled",
    "proximal": "recomputed",
    "updates_per_step": 2,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "gae_lambda": 0.95,
}


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


def test_the_value_loss_is_the_larger_of_both_where_it_is_clipped() -> None:
    values = torch.tensor([1.0, 1.0, 0.1], requires_grad=True)
    old, targets = torch.zeros(3), torch.tensor([2.0, 0.0, 0.5])
    loss = value_loss(values, old, targets, 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.8**2 / 2, 0.5, 0.4**2 / 2]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -0.4]))
    torch.testing.assert_close(value_loss(values, old, targets, None).detach(), torch.tensor([0.5, 0.5, 0.08]))


def test_lambda_is_adapted_to_the_length_only_where_that_is_asked_for() -> None:
    assert lambda_of(1000, 0.95, None) == 0.95
    assert lambda_of(1000, 1.0, 0.05) == pytest.approx(0.98)


def test_advantages_of_an_untrained_critic_are_the_reward_to_come() -> None:
    """Values 0, gamma and lambda 1: every token's advantage is the reward, and so is what the critic learns."""
    made = make_samples(make_group(0, [1.0, 0.25], np.random.default_rng(0)), 0, 4, "gae").samples
    valued = [_with_values(sample, 0.0) for sample in made]
    found = with_advantages(valued, ObjectiveConfig(advantage="gae", gae_normalise=False))
    for sample, reward in zip(found, (1.0, 0.25), strict=True):
        assert sample.token_advantages is not None
        assert sample.returns is not None
        np.testing.assert_allclose(sample.token_advantages, reward)
        np.testing.assert_allclose(sample.returns, reward)


def test_advantages_are_normalised_over_the_tokens_of_the_step_and_the_critic_has_a_lambda_of_its_own() -> None:
    made = make_samples(make_group(0, [1.0, 0.0, 0.0], np.random.default_rng(0)), 0, 4, "gae").samples
    objective = ObjectiveConfig(advantage="gae", gae_lambda=0.5, gae_critic_lambda=1.0)
    found = with_advantages([_with_values(sample, 0.3) for sample in made], objective)
    advantages = np.concatenate([np.asarray(sample.token_advantages) for sample in found])
    assert abs(advantages.mean()) < 1e-6
    assert advantages.std() == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(np.asarray(found[0].returns), 1.0, atol=1e-6)


def _with_values(sample: Any, value: float) -> Any:
    from dataclasses import replace

    return replace(sample, values=np.full(len(sample.targets), value, np.float32))


def test_the_critic_learns_what_the_rewards_are(model_directory: Path) -> None:
    learner = make_learner(model_directory, lr=1e-6, critic=CriticConfig(lr=5e-3, clip=None), **PPO)
    losses = []
    for version in range(12):
        metrics = train_step(learner, make_groups(4, version=version))
        losses.append(metrics["critic/loss"])
    assert losses[-1] < 0.25 * losses[0]
    assert metrics["critic/explained"] > 0.5
    assert metrics["updates"] == 24


def test_the_policy_waits_while_the_critic_is_trained_first(model_directory: Path) -> None:
    learner = make_learner(model_directory, critic=CriticConfig(pretrain_steps=2), **PPO)
    before = weights_of(learner)
    for _ in range(2):
        metrics = train_step(learner, make_groups(3))
        assert metrics["updates"] == 0
        assert metrics["critic/loss"] > 0
        assert metrics["tokens/trained"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())
    assert train_step(learner, make_groups(3))["updates"] == 2
    assert learner.version == 3


def test_arrival_changes_no_result(model_directory: Path) -> None:
    groups = make_groups(4)
    found = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        learner = make_learner(model_directory, deterministic=True, **PPO)
        learner.begin_step()
        for index in order:
            learner.add([encode_group(groups[index])])
            learner.flush()
        found.append(learner.finish_step())
    assert found[0] == found[1]


def test_a_resumed_learner_goes_on_with_its_critic(model_directory: Path, tmp_path: Path) -> None:
    settings = {**PPO, "critic": CriticConfig(lr=1e-3)}
    original = make_learner(model_directory, deterministic=True, **settings)
    train_step(original, make_groups(3))
    path = original.save(tmp_path)
    config = LearnerConfig(warm_up_steps=0, device="cpu", **settings)
    copy = Learner(config, ModelConfig(), max_lag=4, deterministic=True, seed=9)
    copy.restore(path)
    groups = make_groups(3, seed=3, version=1)
    assert train_step(original, groups) == train_step(copy, groups)
    for name, tensor in weights_of(original).items():
        assert torch.equal(weights_of(copy)[name], tensor), name


def test_a_checkpoint_without_a_critic_cannot_be_continued_with_one(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    train_step(learner, make_groups(3))
    path = learner.save(tmp_path)
    assert not (path / OWN_FILE).exists()
    config = LearnerConfig(warm_up_steps=0, device="cpu", **PPO)
    with pytest.raises(CheckpointError, match=r"holds no critic: .* only from a checkpoint that has one"):
        Learner(config, ModelConfig(), max_lag=4).restore(path)


def test_groups_of_one_and_equal_rewards_teach_with_a_critic(model_directory: Path) -> None:
    rng = np.random.default_rng(0)
    groups: list[Group] = [make_group(0, [1.0], rng), make_group(1, [0.0, 0.0], rng)]
    learner = make_learner(model_directory, **PPO)
    metrics = train_step(learner, groups)
    assert metrics["updates"] == 2
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"advantage": "gae", "ranks": 2}, "learner.advantage=gae works with learner.backend=fsdp and learner.ranks=1"),
        ({"kl_place": "reward", "kl_coef": 0.1, "ranks": 2}, "learner.kl_place=reward works with"),
        ({"critic": CriticConfig(pretrain_steps=3)}, "learner.critic.pretrain_steps can have no effect"),
        ({"gae_lambda": 0.9}, "learner.gae_lambda can have no effect with learner.advantage=grpo"),
        ({"advantage": "gae", "gae_alpha": 0.05, "gae_lambda": 0.9}, "learner.gae_lambda can have no effect with"),
        ({"critic": CriticConfig(lr=0.0)}, "learner.critic.lr=0.0 must be greater than 0"),
        ({"critic": CriticConfig(clip=0.0)}, "learner.critic.clip=0.0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LearnerConfig(**settings).validate()
