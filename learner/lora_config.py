"""Settings of low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_IN_LAYERS = ("embed_tokens", "lm_head")


@dataclass
class LoraConfig:
    """Which matrices get an adapter, and how large."""

    rank: int = 0
    """Of every adapter; 0: the weights themselves are trained."""
    alpha: Optional[float] = None  # noqa: UP045
    """The adapter's product is multiplied with ``alpha / rank``; null: twice the rank."""
    targets: list[str] = field(default_factory=lambda: list(ALL_LINEAR))
    """Names of the layers' linear modules."""
    dropout: float = 0.0
    """Of the adapter's input, while training."""

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def validate(self) -> None:
        """Raises ValueError, naming the key and what would be right."""
        if self.rank < 0:
            raise ValueError(f"learner.lora.rank={self.rank} must be at least 1, or 0 to train the weights themselves")
        if self.rank == 0:
            if self != LoraConfig():
                raise ValueError("learner.lora has settings, and learner.lora.rank=0 trains no adapter: set the rank")
            return
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"learner.lora.alpha={self.alpha} must be greater than 0, or null for twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"learner.lora.dropout={self.dropout} must be at least 0 and less than 1")
        if not self.targets:
            raise ValueError("learner.lora.targets is empty: name linear modules, such as q_proj")
        outside = [name for name in self.targets if name in NOT_IN_LAYERS]
        if outside:
            raise ValueError(
                f"learner.lora.targets names {outside[0]}, which is not in a layer (and may be shared by input and output): "
                f"choose from the layers' linear modules, such as {', '.join(ALL_LINEAR)}"
            )
