"""Settings of the model and of the learner (the ``model`` and ``learner`` sections of a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field

from learner.synthetic_config import SyntheticLearnerConfig

DTYPES = ("float32", "bfloat16")
BACKENDS = ("fsdp", "synthetic")
PLANNED_BACKENDS = ("megatron",)
OBJECTIVES = ("grpo",)
CORRECTIONS = ("none", "tis", "decoupled")
ADVANTAGES = ("grpo", "dr_grpo", "rloo")
AGGREGATIONS = ("token", "sequence")
DEVICES = ("auto", "cpu", "cuda")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown: use one of {', '.join(choices)}")


@dataclass
class ModelConfig:
    """Which model is trained: a Hugging Face directory, or a recipe that makes one."""

    path: str | None = None
    """Directory of a Hugging Face causal language model; when given, ``recipe`` is not used."""
    recipe: str | None = "shop_small"
    """Name of the recipe that builds a model when ``path`` is null."""
    dtype: str = "float32"

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        _require_choice("model.dtype", self.dtype, DTYPES)
        if not self.path and not self.recipe:
            raise ValueError("model.path and model.recipe are both null: give a Hugging Face directory or a recipe")


@dataclass
class LearnerConfig:
    """Objective, optimizer and batching of the learner."""

    backend: str = "fsdp"
    ranks: int = 1
    objective: str = "grpo"
    correction: str = "decoupled"
    """Off-policy correction: ``decoupled`` (proximal policy), ``tis`` (truncated importance sampling) or ``none``."""
    lr: float = 5e-4
    warm_up_steps: int = 5
    """The learning rate rises linearly over that many steps, then stays."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The ratio is clipped to ``[1 - clip_low, 1 + clip_high]``."""
    correction_cap: float = 2.0
    """Largest importance weight of the correction."""
    advantage: str = "grpo"
    """Baseline and scale of a group's rewards: ``grpo`` (by standard deviation), ``dr_grpo`` (mean only), ``rloo``."""
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregation: str = "token"
    """``token``: every trained token counts the same; ``sequence``: every trajectory does."""
    token_budget: int = 8192
    """Most tokens in one forward and backward pass (a single longer trajectory still runs, alone)."""
    skip_no_signal: bool = True
    """Groups whose advantages are all zero run no forward pass and do not count in the normaliser."""
    threads: int | None = None
    """Torch threads of the learner's process; null leaves the choice to the process."""
    device: str = "auto"
    gradient_checkpointing: bool = False
    max_bad_steps: int = 5
    """That many non-finite steps in a row end the run."""
    synthetic: SyntheticLearnerConfig = field(default_factory=SyntheticLearnerConfig)
    """What ``backend: synthetic`` models."""

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        self._validate_choices()
        self._validate_numbers()
        if self.backend == "synthetic":
            self.synthetic.validate()

    def _validate_choices(self) -> None:
        if self.backend in PLANNED_BACKENDS:
            raise ValueError(f"learner.backend={self.backend} is not built yet: use {', '.join(BACKENDS)}")
        _require_choice("learner.backend", self.backend, BACKENDS)
        _require_choice("learner.objective", self.objective, OBJECTIVES)
        _require_choice("learner.correction", self.correction, CORRECTIONS)
        _require_choice("learner.advantage", self.advantage, ADVANTAGES)
        _require_choice("learner.aggregation", self.aggregation, AGGREGATIONS)
        _require_choice("learner.device", self.device, DEVICES)
        if self.kl_coef != 0.0:
            raise ValueError("learner.kl_coef is not built yet (it needs a reference model): leave it 0")

    def _validate_numbers(self) -> None:
        if self.ranks > 1:
            raise ValueError(f"learner.ranks={self.ranks} is not built yet: use learner.ranks=1")
        for name in ("ranks", "token_budget", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"learner.threads={self.threads} must be at least 1, or null")
        for name in ("lr", "correction_cap", "clip_high"):
            if getattr(self, name) <= 0:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be greater than 0")
        for name in ("warm_up_steps", "weight_decay", "clip_grad", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"learner.{name}={getattr(self, name)} must not be negative")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"learner.clip_low={self.clip_low} must lie in (0, 1]")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"learner.betas={list(self.betas)} must be two numbers in [0, 1)")
