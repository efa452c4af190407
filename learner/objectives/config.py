"""Settings of the objective (part of the ``learner`` section), and which of their combinations have no effect."""

from __future__ import annotations

from dataclasses import dataclass

from learner.objectives.names import ADVANTAGES

RATIOS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "plain", "clipped_weight", "likelihood")
CORRECTIONS = ("none", "unweighted", "tis", "masked_is", "double_sided", "decoupled")
PROXIMALS = ("current", "recomputed", "interpolated")
LEVELS = ("token", "sequence")
AGGREGATIONS = ("token", "sequence", "constant")
KL_KINDS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")


@dataclass
class ObjectiveConfig:
    """The loss of a token: advantage x ratio x surrogate x correction, aggregated, plus regularisers.

    ``objective`` names a preset (`learner.objectives.presets`), whose values stand wherever nothing else is set.
    """

    objective: str = "grpo"
    advantage: str = "grpo"
    ratio: str = "token"
    """One ratio for each token, or one for the whole trajectory (``sequence``, ``sequence_token``)."""
    surrogate: str = "plain"
    """``clip`` (PPO), ``plain`` (importance-weighted policy gradient), ``clipped_weight`` (CISPO, AIPO), or ``likelihood``
    (``A log pi``: no ratio; imitation where the advantage is positive)."""
    clip_low: float | None = None
    clip_high: float | None = None
    """The ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; null: no bound on that side."""
    dual_clip: float | None = None
    """Where the advantage is negative the ratio counts at most so much; null: no bound."""
    correction: str = "tis"
    """Weights of tokens that another policy sampled: ``pi_proximal / mu``, truncated (``tis``; ``decoupled`` when the proximal
    policy is not the current one), masked above the cap (``masked_is``) or outside a band (``double_sided``); ``unweighted``:
    stale tokens count as if the current policy had sampled them; ``none``: the surrogate's ratio is to the behaviour policy."""
    correction_level: str = "token"
    correction_cap: float = 2.0
    """Largest weight (``decoupled``, ``tis``, ``masked_is``)."""
    correction_low: float = 0.5
    correction_high: float = 1.0
    """``double_sided`` keeps weights in ``[1 - correction_low, 1 + correction_high]``."""
    proximal: str | None = None
    """Which policy the surrogate's ratio is taken against when there is a correction: the ``current`` one (before its
    update), the one at the beginning of the step (``recomputed``, with several updates in a step), or an estimate between
    behaviour and current policy (``interpolated``); null: for ``decoupled`` ``recomputed`` with several updates in a step and
    ``interpolated`` with one, else ``current``."""
    updates_per_step: int = 1
    """Updates that a step is divided into, each on its share of the groups; versions still count steps."""
    second_moment_limit: float | None = None
    """Tokens are taken out, the furthest first, until the mean squared log-ratio is at most this (M2PO); null: none."""
    aggregation: str = "token"
    """Every trained token counts the same, every trajectory does, or the sum is divided by a ``constant`` length."""
    constant_length: int | None = None
    """Tokens that a trajectory counts as under ``aggregation=constant``; null: ``rollout.max_episode_tokens``."""
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    """Estimate of the distance to the reference policy that is added to the loss."""
    kl_place: str = "loss"
    """``loss``, or ``reward``: the estimate (of the policy that sampled) is taken off the rewards, before any advantage."""
    reference: str | None = None
    """Directory of the reference policy; null: the model that the run began with."""
    reference_reset_every: int = 0
    """The reference becomes the policy of the moment after every that many updates; 0: never."""
    teacher: str | None = None
    """Directory of a model (an earlier checkpoint, say) to distil from on the policy's own samples."""
    distill_coef: float = 0.0
    distill_top_k: int | None = None
    """Compare only the policy's k most likely tokens with the teacher's; null: the whole vocabulary."""
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    """Nats a token: `entropy_coef` is moved by `entropy_rate` after every step, between 0 and `entropy_coef_max`, so that the
    entropy stays there; null: `entropy_coef` is constant."""
    entropy_rate: float = 0.001
    entropy_coef_max: float = 0.05
    risk_low: float = 0.2
    risk_high: float = 0.8
    risk_weight: float = 1.0
    """``riskpo``: quantiles of the two regions, and how much more the lower one counts."""
    risk_bundle: int = 5
    """``riskpo``: groups whose episodes are judged together."""
    gae_gamma: float = 1.0
    gae_lambda: float = 1.0
    gae_alpha: float | None = None
    """Adapts the policy's lambda to the trajectory's length, ``1 - 1 / (alpha length)``; null: `gae_lambda` for all."""
    gae_critic_lambda: float | None = None
    """Lambda of what the critic learns; null: the policy's."""
    gae_normalise: bool = True
    """Normalise the advantages of ``gae`` over the tokens of the step."""
    positive_lm_coef: float = 0.0
    """Weight of imitating the trajectories of positive advantage."""

    @property
    def proximal_policy(self) -> str:
        """`proximal` with its default resolved."""
        if self.proximal is not None or self.correction != "decoupled":
            return self.proximal or "current"
        return "recomputed" if self.updates_per_step > 1 else "interpolated"

    def validate_objective(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        self._check_choices()
        self._check_bounds()
        self._check_effects()

    def _check_choices(self) -> None:
        for key, choices in (
            ("advantage", ADVANTAGES),
            ("ratio", RATIOS),
            ("surrogate", SURROGATES),
            ("correction", CORRECTIONS),
            ("correction_level", LEVELS),
            ("proximal_policy", PROXIMALS),
            ("aggregation", AGGREGATIONS),
            ("kl_kind", KL_KINDS),
            ("kl_place", KL_PLACES),
        ):
            require_choice(f"learner.{key.removesuffix('_policy')}", getattr(self, key), choices)

    def _check_bounds(self) -> None:
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise ValueError(f"learner.clip_low={self.clip_low} must lie in (0, 1]")
        if not 0 < self.correction_low <= 1:
            raise ValueError(f"learner.correction_low={self.correction_low} must lie in (0, 1]")
        for key in (
            "clip_high",
            "correction_cap",
            "correction_high",
            "second_moment_limit",
            "constant_length",
            "distill_top_k",
            "updates_per_step",
            "entropy_rate",
            "entropy_coef_max",
            "risk_bundle",
            "gae_alpha",
        ):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"learner.{key}={value} must be greater than 0")
        for key in (
            "kl_coef",
            "entropy_coef",
            "positive_lm_coef",
            "distill_coef",
            "reference_reset_every",
            "risk_weight",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"learner.{key}={getattr(self, key)} must not be negative")
        for key in ("gae_gamma", "gae_lambda", "gae_critic_lambda"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"learner.{key}={value} must lie in [0, 1]")
        if not 0 < self.risk_low < self.risk_high <= 1:
            raise ValueError(
                f"learner.risk_low={self.risk_low} and learner.risk_high={self.risk_high}: 0 < low < high <= 1 is needed"
            )
        if self.surrogate == "clip" and (self.clip_low is None or self.clip_high is None):
            raise ValueError("learner.surrogate=clip needs learner.clip_low and learner.clip_high (0.2 and 0.28, say)")
        if self.surrogate == "clipped_weight" and self.clip_high is None:
            raise ValueError("learner.surrogate=clipped_weight needs learner.clip_high (4.0, say)")
        if self.dual_clip is not None and self.dual_clip <= 1.0 + (self.clip_high or 0.0):
            raise ValueError(f"learner.dual_clip={self.dual_clip} must be greater than 1 + learner.clip_high")

    def _check_effects(self) -> None:
        """Refuses what could never change a gradient."""
        self._check_policies()
        self._check_regularisers()
        self._check_advantage()

    def _check_policies(self) -> None:
        """Behaviour, proximal and current policy: with one update in a step the policy before it *is* the current one."""
        if self.correction == "decoupled" and self.proximal_policy == "current":
            raise ValueError(
                "learner.correction=decoupled with learner.proximal=current is learner.correction=tis: use correction=tis, or "
                "proximal=interpolated (or recomputed, with updates_per_step > 1)"
            )
        if self.correction == "tis" and self.proximal_policy != "current":
            raise ValueError(
                f"learner.correction=tis with learner.proximal={self.proximal} is learner.correction=decoupled"
            )
        ratio_free = self.surrogate in ("plain", "likelihood")
        if self.correction != "none" and self.proximal_policy == "current" and not ratio_free:
            raise ValueError(
                f"learner.surrogate={self.surrogate} can have no effect with learner.correction={self.correction} and "
                "learner.proximal=current: its ratio is to the policy before the update, which is 1 at the update; "
                "use surrogate=plain, proximal=interpolated (or recomputed, with updates_per_step > 1), or correction=none "
                "(the ratio is then to the behaviour policy)"
            )
        if self.proximal_policy == "recomputed" and self.updates_per_step == 1:
            raise ValueError(
                "learner.proximal=recomputed can have no effect: with one update in a step, the policy at its beginning is "
                "the current one; use updates_per_step > 1, proximal=current, which needs no pass of its own, or interpolated"
            )
        if self.correction == "unweighted" and self.proximal_policy != "current":
            raise ValueError(f"learner.proximal={self.proximal} can have no effect with learner.correction=unweighted")
        if self.correction == "none" and self.proximal_policy != "current":
            raise ValueError(f"learner.proximal={self.proximal} can have no effect with learner.correction=none")
        if self.correction in ("none", "unweighted") and self.correction_level == "sequence":
            raise ValueError(
                f"learner.correction_level=sequence can have no effect with learner.correction={self.correction}"
            )
        bounds = {"clip": (), "clipped_weight": ("dual_clip",)}.get(
            self.surrogate, ("clip_low", "clip_high", "dual_clip")
        )
        for key in bounds:
            if getattr(self, key) is not None:
                raise ValueError(
                    f"learner.{key} can have no effect with learner.surrogate={self.surrogate}: set it to null"
                )

    def _check_regularisers(self) -> None:
        if self.distill_coef > 0 and self.teacher is None:
            raise ValueError("learner.distill_coef needs a learner.teacher to distil from")
        if self.teacher is not None and self.distill_coef == 0:
            raise ValueError("learner.teacher can have no effect with learner.distill_coef=0")
        if self.distill_top_k is not None and self.teacher is None:
            raise ValueError("learner.distill_top_k can have no effect without a learner.teacher")
        for key in ("reference", "reference_reset_every"):
            if getattr(self, key) and self.kl_coef == 0:
                raise ValueError(f"learner.{key} can have no effect with learner.kl_coef=0")
        if self.kl_coef > 0 and self.kl_kind == "k1" and self.kl_place == "loss":
            raise ValueError(
                "learner.kl_kind=k1 can have no effect in the loss: the mean of its gradient is zero; use k2 or k3, or "
                "kl_place=reward"
            )
        if self.kl_place == "reward" and self.kl_coef == 0:
            raise ValueError("learner.kl_place=reward can have no effect with learner.kl_coef=0")
        if self.kl_place == "reward" and self.reference_reset_every:
            raise ValueError(
                "learner.reference_reset_every needs learner.kl_place=loss: rewards are compared over steps"
            )
        if self.entropy_target is not None and self.entropy_coef > 0:
            raise ValueError(
                "learner.entropy_coef can have no effect with learner.entropy_target, which moves the coefficient itself: "
                "set one of them"
            )

    def _check_advantage(self) -> None:
        if self.advantage != "gae":
            for key, usual in (
                ("gae_alpha", None),
                ("gae_critic_lambda", None),
                ("gae_lambda", 1.0),
                ("gae_gamma", 1.0),
            ):
                if getattr(self, key) != usual:
                    raise ValueError(
                        f"learner.{key} can have no effect with learner.advantage={self.advantage}: it is for gae"
                    )
        elif self.gae_alpha is not None and self.gae_lambda != 1.0:
            raise ValueError(
                "learner.gae_lambda can have no effect with learner.gae_alpha, which adapts it: set one of them"
            )


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError, naming the key, for a value that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown: use one of {', '.join(choices)}")
