"""Several updates in a step: the policy at its beginning is the proximal one, and versions count steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_group, make_groups, make_learner, train_step

from experience.records import Group
from learner.learner import Learner
from learner.objectives.config import ObjectiveConfig

DECOUPLED: dict[str, Any] = {
    "surrogate": "clip",
    "correction": "decoupled",
    "proximal": "recomputed",
    "clip_low": 0.2,
    "clip_high": 0.2,
}


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


def teaching_groups(count: int, seed: int = 0) -> list[Group]:
    return make_groups(count + 1, seed=seed)[:count]


def test_a_step_of_two_updates_is_two_steps_of_one_when_nothing_binds(model_directory: Path) -> None:
    """Unbounded, ``w(prox / mu) (pi / prox)`` is ``pi / mu``, whatever the proximal policy."""
    groups = teaching_groups(4)
    loose = {**DECOUPLED, "clip_low": 1.0, "clip_high": 1e6, "correction_cap": 1e6, "updates_per_step": 2}
    together = make_learner(model_directory, deterministic=True, lr=1e-3, **loose)
    metrics = train_step(together, groups)
    apart = make_learner(model_directory, deterministic=True, lr=1e-3, surrogate="plain", correction="none")
    for part in (groups[0::2], groups[1::2]):
        train_step(apart, part)
    assert (together.version, metrics["updates"]) == (1, 2)
    for name, tensor in weights_of(apart).items():
        torch.testing.assert_close(weights_of(together)[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_clip_binds_from_the_second_update_on(model_directory: Path) -> None:
    groups = teaching_groups(4)
    clipped = {}
    for updates in (2, 4):
        learner = make_learner(model_directory, deterministic=True, lr=2e-2, updates_per_step=updates, **DECOUPLED)
        clipped[updates] = train_step(learner, groups)["ratio/clip_fraction"]
    assert clipped[4] > clipped[2] > 0.0
    with pytest.raises(ValueError, match="recomputed can have no effect"):
        ObjectiveConfig(**DECOUPLED).validate_objective()


def test_decoupled_takes_the_recomputed_policy_with_several_updates_and_an_estimate_with_one() -> None:
    assert ObjectiveConfig(correction="decoupled", updates_per_step=4).proximal_policy == "recomputed"
    assert ObjectiveConfig(correction="decoupled").proximal_policy == "interpolated"
    with pytest.raises(ValueError, match=r"can have no effect with learner\.correction=tis"):
        ObjectiveConfig(surrogate="clip", clip_low=0.2, clip_high=0.2, updates_per_step=4).validate_objective()


def test_an_update_that_is_not_finite_leaves_the_rest_of_its_step_out(model_directory: Path) -> None:
    groups = teaching_groups(4)
    groups[1].trajectories[2].logprobs[:] = np.nan
    learner = make_learner(model_directory, deterministic=True, updates_per_step=2, **DECOUPLED)
    metrics = train_step(learner, groups)
    first = [groups[0], groups[2]]
    assert metrics["updates"] == 1
    assert metrics["tokens/trained"] == sum(group.sampled_tokens for group in first)
    assert metrics["tokens/trained"] + metrics["tokens/masked"] == sum(group.sampled_tokens for group in groups)
    assert learner.version == 1


def test_fewer_groups_than_updates_and_none_at_all(model_directory: Path) -> None:
    rng = np.random.default_rng(0)
    learner = make_learner(model_directory, updates_per_step=4, **DECOUPLED)
    assert train_step(learner, teaching_groups(2))["updates"] == 2
    assert train_step(learner, [make_group(9, [1.0, 1.0], rng, version=1)])["updates"] == 2
    assert train_step(learner, [])["step/skipped"] == 0
    assert learner.version == 3
