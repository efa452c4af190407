"""What the streaming step needs of a training backend: the same micro-batches in, the same numbers out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from learner.batching import MicroBatch
from learner.objectives.config import ObjectiveConfig
from learner.objectives.sums import TokenSums
from learner.prefix_tree import Sharing


@dataclass(frozen=True)
class PassResult:
    """One forward and backward pass."""

    sums: TokenSums
    bad_samples: tuple[str, ...] = ()
    """``group_id/trajectory_id`` of samples whose loss is not finite; the pass then added no gradient."""


class TrainingBackend(Protocol):
    """Holds model and optimizer. Gradients are sums until :meth:`step` divides them by the normaliser."""

    device: torch.device
    updates: int
    """Optimizer updates so far."""
    sharing: Sharing | None
    """Which common prefixes of a micro-batch are computed once; None: none is."""

    def forward_backward(self, batch: MicroBatch, objective: ObjectiveConfig) -> PassResult:
        """Adds the batch's gradient of the *summed* loss."""
        ...

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Log-probabilities of the batch's targets under the present weights, float32 [n], without gradient."""
        ...

    def idle_pass(self) -> None:
        """Take part in the other ranks' forward and backward pass without adding to the gradient."""
        ...

    def idle_forward(self) -> None:
        """Take part in the other ranks' forward pass."""
        ...

    def step(self, normaliser: float) -> float | None:
        """One update with ``gradient / normaliser``; returns the gradient's norm before clipping.

        None: the gradient was not finite and nothing was changed. Either way the gradient is zero afterwards.
        """
        ...

    def discard_gradient(self) -> None:
        """Zeroes the gradient without an update."""
        ...

    def reference_state(self) -> dict[str, torch.Tensor]:
        """The reference policy's weights on the CPU, if they are no longer those of its directory; else nothing."""
        ...

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse. Raises CheckpointError if the weights are another model's."""
        ...

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The parameters to publish, by Hugging Face name, tied ones once, in the dtype that engines serve."""
        ...

    def save_model(self, directory: Path) -> None:
        """Writes a Hugging Face directory (without tokenizer)."""
        ...

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs besides the model, as tensors on the CPU."""
        ...

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """The inverse. Raises CheckpointError if the state is another model's."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for logs: parameters, device, dtype; ``data_parallel`` ranks and the ``places`` of all ranks among them;
        ``shares_prefixes``: whether `sharing` is not None (may be missing if it is)."""
        ...
