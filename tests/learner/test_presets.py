"""Every preset: its source, its configuration file, and a training step with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learner_fixtures import make_group, train_step

from learner.config import ModelConfig
from learner.learner import Learner
from learner.objectives.presets import PRESETS
from orchestrator.config import Config, ConfigError, load, validate

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "objectives"


def loaded(name: str) -> Config:
    config = load([str(CONFIGS / f"{name}.yaml")])
    validate(config)
    return config


def test_every_preset_has_a_configuration_and_every_configuration_a_preset() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_its_configuration_says_what_the_preset_says(name: str) -> None:
    config = loaded(name)
    assert config.learner.objective == name
    for key, value in PRESETS[name].settings.items():
        found: object = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert "arXiv:" in PRESETS[name].source or "20" in PRESETS[name].source
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_with_it_trains_the_model(name: str, model_directory: Path) -> None:
    config = loaded(name).learner
    config = replace(config, device="cpu", warm_up_steps=0, critic=replace(config.critic, pretrain_steps=0))
    learner = Learner(config, ModelConfig(), max_lag=4, deterministic=True, seed=1)
    learner.load(model_directory)
    rng = np.random.default_rng(0)
    groups = [make_group(i, [float((i + j) % 3 == 0) for j in range(4)], rng) for i in range(6)]
    for group in groups:  # sampled by nearly the model itself, whose random weights spread over all tokens
        for trajectory in group.trajectories:
            trajectory.logprobs[trajectory.trainable] = -4.2
    metrics = train_step(learner, groups)
    assert metrics["step/skipped"] == 0
    assert metrics["updates"] == config.updates_per_step
    assert 0 < metrics["grad_norm"] < 1e4


def test_bounds_of_the_preset_go_with_its_surrogate_and_its_correction() -> None:
    default = load(["quickstart"]).learner
    assert (default.surrogate, default.correction, default.clip_high) == ("clip", "decoupled", 0.28)
    plain = load(["quickstart"], ["learner.surrogate=plain", "learner.correction=tis"])
    validate(plain)
    assert (plain.learner.clip_low, plain.learner.clip_high) == (None, None)
    clipped = load(["quickstart"], ["learner.correction=none", "learner.clip_high=0.2"])
    validate(clipped)
    assert (clipped.learner.clip_low, clipped.learner.clip_high) == (0.2, 0.2)
    validate(load(["objectives/areal"], ["learner.correction=none"]))


def test_a_correction_that_leaves_the_preset_s_clip_without_effect_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"surrogate=clip can have no effect with learner.correction=tis .*surrogate=plain"
    ):
        validate(load(["quickstart"], ["learner.correction=tis"]))


def test_a_packaged_objective_is_found_by_its_name() -> None:
    assert load(["objectives/dapo"]).queue.require_signal
    assert [reward.kind for reward in load(["objectives/dapo.yaml"]).rewards] == ["rule", "overlong"]
