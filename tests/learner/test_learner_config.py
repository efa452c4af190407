from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from learner.config import LearnerConfig, ModelConfig


def test_defaults_are_valid_and_fit_omegaconf() -> None:
    for kind in (LearnerConfig, ModelConfig):
        config = OmegaConf.to_object(OmegaConf.structured(kind))
        assert config == kind()
        kind().validate()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("ranks", 0, "learner.ranks=0 must be at least 1"),
        ("kl_coef", -0.1, "learner.kl_coef=-0.1 must not be negative"),
        ("advantage", "gea", "learner.advantage='gea' is unknown: use one of grpo, dr_grpo, rloo"),
        ("kl_place", "prompt", "learner.kl_place='prompt' is unknown: use one of loss, reward"),
        ("updates_per_step", 0, "learner.updates_per_step=0 must be greater than 0"),
        ("gae_lambda", 1.5, r"learner.gae_lambda=1.5 must lie in \[0, 1\]"),
        ("risk_low", 0.9, "learner.risk_low=0.9 and learner.risk_high=0.8"),
        ("correction", "full", "learner.correction='full'"),
        ("aggregation", "word", "learner.aggregation='word'"),
        ("prefix_sharing", "always", "learner.prefix_sharing='always' is unknown: use one of auto, on, off"),
        ("token_budget", 0, "learner.token_budget=0 must be at least 1"),
        ("lr", 0.0, "learner.lr=0.0 must be greater than 0"),
        ("clip_low", 1.5, "learner.clip_low=1.5"),
        ("betas", [0.9], "learner.betas="),
        ("threads", 0, "learner.threads=0"),
        ("optimizer", "lion", "learner.optimizer='lion' is unknown: use one of adamw, sgd"),
        ("clip_grad", -1.0, "learner.clip_grad=-1.0 must not be negative"),
    ],
)
def test_bad_settings_are_named(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**{setting: value}).validate()  # type: ignore[arg-type]


def test_a_model_needs_a_path_or_a_recipe() -> None:
    with pytest.raises(ValueError, match=r"model\.path and model\.recipe are both null"):
        ModelConfig(recipe=None).validate()
    with pytest.raises(ValueError, match=r"model\.dtype='int4'"):
        ModelConfig(dtype="int4").validate()
