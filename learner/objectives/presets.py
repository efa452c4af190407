"""Published recipes, by name: what ``learner.objective`` sets where nothing else is set.

A preset is a dictionary of settings and the source it was taken from; what a recipe needs outside the ``learner`` section
(refilling of groups, reward shaping) is in it, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """``settings`` are full dotted keys of a run's configuration."""

    source: str
    settings: dict[str, Any] = field(default_factory=dict)


def _learner(**settings: Any) -> dict[str, Any]:
    return {f"learner.{key}": value for key, value in settings.items()}


_CLIP = {"surrogate": "clip", "correction": "none", "clip_low": 0.2, "clip_high": 0.2}
"""The plain clipped surrogate, its ratio to the policy that sampled."""

PART_OF = {
    **dict.fromkeys(("learner.clip_low", "learner.clip_high", "learner.dual_clip"), "learner.surrogate"),
    **dict.fromkeys(
        ("learner.proximal", "learner.correction_cap", "learner.correction_low", "learner.correction_high",
         "learner.correction_level"), "learner.correction",
    ),
}  # fmt: skip
"""Settings that mean something only beside the value that a preset gives another one: who sets that one otherwise does not
get these from the preset."""

PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        "Millrace's default: group-relative advantages (Shao et al. 2024, arXiv:2402.03300), stale tokens by the decoupled "
        "objective (Fu et al. 2025, AReaL, arXiv:2505.24298) with the interpolated policy (Li et al. 2025, A-3PO), clip-higher "
        "(Yu et al. 2025, DAPO, arXiv:2503.14476) and weights truncated at 2",
        _learner(
            advantage="grpo", surrogate="clip", correction="decoupled", clip_low=0.2, clip_high=0.28, correction_cap=2.0,
            aggregation="token",
        ),
    ),
    "deepseek_grpo": Preset(
        "Shao et al. 2024, DeepSeekMath, arXiv:2402.03300",
        _learner(**_CLIP, advantage="grpo", aggregation="sequence", kl_coef=0.04, kl_kind="k3"),
    ),
    "dr_grpo": Preset(
        "Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783",
        _learner(**_CLIP, advantage="dr_grpo", aggregation="constant"),
    ),
    "dapo": Preset(
        "Yu et al. 2025, DAPO, arXiv:2503.14476 (overlong shaping is a reward branch: configs/objectives/dapo.yaml)",
        {
            **_learner(**{**_CLIP, "clip_high": 0.28}, advantage="grpo", aggregation="token"),
            "queue.require_signal": True,
        },
    ),
    "rloo": Preset(
        "Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740",
        _learner(
            advantage="rloo", surrogate="plain", correction="tis", aggregation="sequence", kl_coef=0.03, kl_kind="k1",
            kl_place="reward",
        ),
    ),
    "reinforce_pp": Preset(
        "Hu et al. 2025, REINFORCE++, arXiv:2501.03262",
        _learner(**_CLIP, advantage="reinforce_pp", aggregation="token"),
    ),
    "reinforce_pp_baseline": Preset(
        "Hu et al. 2025, REINFORCE++ (with a group's mean as baseline), arXiv:2501.03262",
        _learner(**_CLIP, advantage="reinforce_pp_baseline", aggregation="token", kl_coef=0.001, kl_kind="k2"),
    ),
    "gspo": Preset(
        "Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071",
        _learner(
            advantage="grpo", ratio="sequence", surrogate="clip", correction="none",
            clip_low=3e-4, clip_high=4e-4, aggregation="sequence",
        ),
    ),
    "cispo": Preset(
        "MiniMax 2025, MiniMax-M1, arXiv:2506.13585",
        _learner(
            advantage="grpo", surrogate="clipped_weight", correction="none", clip_low=None, clip_high=4.0,
            aggregation="token",
        ),
    ),
    "aipo": Preset(
        "Wu et al. 2025, LlamaRL, arXiv:2505.24034",
        _learner(
            advantage="dr_grpo", surrogate="clipped_weight", correction="none", clip_low=None, clip_high=3.0,
            aggregation="token",
        ),
    ),
    "tis": Preset(
        "Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
        _learner(advantage="grpo", surrogate="plain", correction="tis", correction_cap=2.0, aggregation="token"),
    ),
    "masked_is": Preset(
        "Liu et al. 2025, When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch",
        _learner(
            advantage="grpo", surrogate="plain", correction="masked_is", correction_level="sequence", correction_cap=2.0,
        ),
    ),
    "glm5": Preset(
        "GLM-5 Team 2026, GLM-5: from Vibe Coding to Agentic Engineering, arXiv:2602.15763",
        _learner(
            advantage="grpo", surrogate="plain", correction="double_sided", correction_low=0.5, correction_high=1.0,
            aggregation="token",
        ),
    ),
    "areal": Preset(
        "Fu et al. 2025, AReaL, arXiv:2505.24298; the interpolated policy: Li et al. 2025, A-3PO",
        _learner(
            advantage="grpo", surrogate="clip", correction="decoupled", proximal="interpolated",
            clip_low=0.2, clip_high=0.2, correction_cap=5.0, aggregation="token",
        ),
    ),
    "decoupled_ppo": Preset(
        "Hilton et al. 2021, Batch size-invariance for policy optimization, arXiv:2110.00641; for language models Fu et al. 2025, "
        "AReaL, arXiv:2505.24298: the proximal policy is that of the step's beginning, and the step has several updates",
        _learner(
            advantage="grpo", surrogate="clip", correction="decoupled", proximal="recomputed", updates_per_step=4,
            clip_low=0.2, clip_high=0.2, correction_cap=5.0, aggregation="token",
        ),
    ),
    "ppo": Preset(
        "Schulman et al. 2017, Proximal Policy Optimization, arXiv:1707.06347; advantages: Schulman et al. 2016, "
        "arXiv:1506.02438",
        _learner(
            advantage="gae", surrogate="clip", correction="decoupled", proximal="recomputed", updates_per_step=4,
            clip_low=0.2, clip_high=0.2, correction_cap=2.0, aggregation="token", gae_gamma=1.0, gae_lambda=0.95,
        ) | {"learner.critic.clip": 0.2},
    ),
    "vapo": Preset(
        "Yue et al. 2025, VAPO, arXiv:2504.05118; decoupled advantages and value pre-training: Yuan et al. 2025, What's Behind PPO's "
        "Collapse in Long-CoT?, arXiv:2503.01491",
        _learner(
            advantage="gae", surrogate="clip", correction="decoupled", proximal="recomputed", updates_per_step=2,
            clip_low=0.2, clip_high=0.28, correction_cap=2.0, aggregation="token", gae_gamma=1.0, gae_alpha=0.05,
            gae_critic_lambda=1.0, positive_lm_coef=0.1,
        ) | {"learner.critic.pretrain_steps": 20},
    ),
    "riskpo": Preset(
        "Ren et al. 2025, RiskPO, arXiv:2510.00911",
        _learner(
            **_CLIP, advantage="riskpo", aggregation="token", risk_low=0.2, risk_high=0.8, risk_weight=1.0, risk_bundle=5,
        ),
    ),
    "m2po": Preset(
        "Zheng et al. 2025, Prosperity before Collapse, arXiv:2510.01161",
        _learner(advantage="grpo", surrogate="plain", correction="none", second_moment_limit=0.04, aggregation="token"),
    ),
}  # fmt: skip
