"""Settings of the model and of the learner (the ``model`` and ``learner`` sections of a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field

from learner.backends.megatron.settings import MegatronConfig
from learner.lora_config import LoraConfig
from learner.mixing_config import CriticConfig, ReplayConfig, SftConfig
from learner.objectives.config import ObjectiveConfig, require_choice
from learner.objectives.names import WHOLE_STEP
from learner.prefix_tree import ALWAYS, WHERE_IT_PAYS, Sharing
from learner.synthetic_config import SyntheticLearnerConfig

DTYPES = ("float32", "bfloat16")
BACKENDS = ("fsdp", "megatron", "synthetic")
OPTIMIZERS = ("adamw", "sgd")
PREFIX_SHARING = {"auto": WHERE_IT_PAYS, "on": ALWAYS, "off": None}
DEVICES = ("auto", "cpu", "cuda")


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
        require_choice("model.dtype", self.dtype, DTYPES)
        if not self.path and not self.recipe:
            raise ValueError("model.path and model.recipe are both null: give a Hugging Face directory or a recipe")


@dataclass
class LearnerConfig(ObjectiveConfig):
    """Objective, optimizer and batching of the learner."""

    backend: str = "fsdp"
    ranks: int = 1
    optimizer: str = "adamw"
    """``sgd`` is plain: no momentum, no state; ``betas`` say nothing to it."""
    lr: float = 5e-4
    warm_up_steps: int = 5
    """The learning rate rises linearly over that many steps, then stays."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    token_budget: int = 8192
    """Most tokens in one forward and backward pass (a single longer trajectory still runs, alone)."""
    prefix_sharing: str = "auto"
    """Common prefixes of trajectories are computed once: where that saves more than it costs (``auto``), wherever there is one
    (``on``), or nowhere (``off``). Loss and gradient are the same."""
    skip_no_signal: bool = True
    """Groups whose advantages are all zero run no forward pass and do not count in the normaliser."""
    threads: int | None = None
    """Torch threads of the learner's process; null leaves the choice to the process."""
    device: str = "auto"
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    """Keep sharded weights and optimizer state in host memory (``fsdp`` with more than one rank; it pays on GPUs)."""
    rank_timeout_s: float = 300.0
    """A rank of the learner that does not answer for so long is given up, and with it the run."""
    max_bad_steps: int = 5
    """That many non-finite steps in a row end the run."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """A low-rank adapter is trained instead of the weights (``backend: fsdp``)."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """How ``backend: megatron`` divides the ranks."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    synthetic: SyntheticLearnerConfig = field(default_factory=SyntheticLearnerConfig)
    """What ``backend: synthetic`` models."""

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        self._validate_choices()
        self._validate_numbers()
        self.validate_objective()
        self.critic.validate()
        self.sft.validate()
        self.replay.validate()
        self.lora.validate()
        if self.lora.rank and self.backend != "fsdp":
            raise ValueError(f"learner.lora.rank={self.lora.rank} works with learner.backend=fsdp, not {self.backend}")
        self._validate_parts()
        if self.backend == "synthetic":
            self.synthetic.validate()
        self._validate_megatron()

    def _validate_megatron(self) -> None:
        if self.backend != "megatron":
            if self.megatron != MegatronConfig():
                raise ValueError(
                    f"learner.megatron has settings, and learner.backend={self.backend} does not read them"
                )
            return
        self.megatron.validate(self.ranks)
        if self.megatron.distributed_optimizer and self.optimizer == "sgd":
            raise ValueError(
                "learner.megatron.distributed_optimizer=true divides the state of adamw, and learner.optimizer=sgd has none: leave "
                "it false"
            )
        if self.cpu_offload:
            raise ValueError("learner.cpu_offload=true is for learner.backend=fsdp; megatron has distributed_optimizer")

    @property
    def sharing(self) -> Sharing | None:
        """`prefix_sharing` as the rule that it stands for."""
        return PREFIX_SHARING[self.prefix_sharing]

    def _validate_choices(self) -> None:
        require_choice("learner.backend", self.backend, BACKENDS)
        require_choice("learner.device", self.device, DEVICES)
        require_choice("learner.optimizer", self.optimizer, OPTIMIZERS)
        require_choice("learner.prefix_sharing", self.prefix_sharing, tuple(PREFIX_SHARING))

    def _validate_parts(self) -> None:
        """What lives in the learner's own process goes with one rank; what is recorded must be comparable."""
        for key, used in (("advantage=gae", self.advantage == "gae"), ("kl_place=reward", self.kl_place == "reward")):
            if used and (self.ranks > 1 or self.backend != "fsdp"):
                raise ValueError(
                    f"learner.{key} works with learner.backend=fsdp and learner.ranks=1 (its model lives in the learner's process), "
                    f"not with backend={self.backend} and ranks={self.ranks}"
                )
        if self.advantage != "gae" and self.critic.pretrain_steps:
            raise ValueError(
                f"learner.critic.pretrain_steps can have no effect with learner.advantage={self.advantage}: it is for gae"
            )
        if self.replay.run is not None and self.advantage in WHOLE_STEP:
            raise ValueError(
                f"learner.replay.run needs advantages within groups (grpo, dr_grpo, rloo): those of learner.advantage="
                f"{self.advantage} are taken over a step, and recorded groups belong to none"
            )

    def _validate_numbers(self) -> None:
        if self.rank_timeout_s <= 0:
            raise ValueError(f"learner.rank_timeout_s={self.rank_timeout_s} must be greater than 0 (seconds)")
        for name in ("ranks", "token_budget", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"learner.threads={self.threads} must be at least 1, or null")
        if self.lr <= 0:
            raise ValueError(f"learner.lr={self.lr} must be greater than 0")
        for name in ("warm_up_steps", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"learner.{name}={getattr(self, name)} must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"learner.betas={list(self.betas)} must be two numbers in [0, 1)")
