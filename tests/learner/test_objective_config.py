from __future__ import annotations

from typing import Any

import pytest

from learner.objectives.config import ObjectiveConfig

CLIP: dict[str, Any] = {"surrogate": "clip", "clip_low": 0.2, "clip_high": 0.28}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({**CLIP}, "learner.surrogate=clip can have no effect with learner.correction=tis"),
        ({"surrogate": "clipped_weight", "clip_high": 4.0}, "its ratio is to the policy before the update, which is 1"),
        ({"correction": "decoupled", "proximal": "current"}, "is learner.correction=tis"),
        ({"correction": "tis", "proximal": "interpolated"}, "is learner.correction=decoupled"),
        ({"correction": "decoupled", "proximal": "recomputed"}, "learner.proximal=recomputed can have no effect"),
        ({"correction": "none", "proximal": "interpolated"}, "can have no effect with learner.correction=none"),
        (
            {"correction": "unweighted", "proximal": "interpolated"},
            "can have no effect with learner.correction=unweighted",
        ),
        ({"correction": "unweighted", "correction_level": "sequence"}, "correction_level=sequence can have no effect"),
        ({"correction": "none", "correction_level": "sequence"}, "correction_level=sequence can have no effect"),
        ({"dual_clip": 3.0}, "learner.dual_clip can have no effect with learner.surrogate=plain"),
        ({"clip_low": 0.2}, "learner.clip_low can have no effect with learner.surrogate=plain"),
        ({"clip_high": 0.2, "surrogate": "likelihood"}, "learner.clip_high can have no effect with learner.surrogate"),
        ({"kl_coef": 0.1, "kl_kind": "k1"}, "learner.kl_kind=k1 can have no effect in the loss"),
        ({"surrogate": "clip", "correction": "none"}, "needs learner.clip_low and learner.clip_high"),
        ({"surrogate": "clipped_weight", "correction": "none"}, "needs learner.clip_high"),
        ({**CLIP, "correction": "none", "dual_clip": 1.2}, "must be greater than 1 . learner.clip_high"),
        ({"clip_low": 1.5}, r"learner.clip_low=1.5 must lie in \(0, 1\]"),
        ({"teacher": "there"}, "learner.teacher can have no effect with learner.distill_coef=0"),
        ({"distill_coef": 1.0}, "learner.distill_coef needs a learner.teacher"),
        ({"distill_top_k": 8}, "learner.distill_top_k can have no effect without"),
        ({"reference": "there"}, "learner.reference can have no effect with learner.kl_coef=0"),
        ({"reference_reset_every": 5}, "learner.reference_reset_every can have no effect"),
        ({"ratio": "turn"}, "learner.ratio='turn' is unknown"),
        ({"proximal": "old"}, "learner.proximal='old' is unknown"),
        ({"second_moment_limit": 0.0}, "learner.second_moment_limit=0.0 must be greater than 0"),
    ],
)
def test_what_can_have_no_effect_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ObjectiveConfig(**settings).validate_objective()


def test_each_kind_of_objective_has_a_valid_form() -> None:
    for settings in (
        {},
        {**CLIP, "correction": "none", "dual_clip": 3.0},
        {**CLIP, "correction": "decoupled"},
        {"surrogate": "clipped_weight", "clip_high": 4.0, "correction": "none"},
        {"correction": "double_sided", "correction_level": "sequence"},
    ):
        ObjectiveConfig(**settings).validate_objective()
