"""What the streaming step needs of a training backend: the same micro-batches in, the same numbers out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
    """Samples whose loss is not finite, as ``group_id/trajectory_id tokens FIRST to LAST``. The pass then added no
    gradient worth anything: the step is to be discarded on all ranks."""


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

    def gradient_is_finite(self) -> bool:
        """Whether the gradient so far has a finite norm, over all ranks; all of them ask together."""
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

    def master_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The float32 weights by Hugging Face name, tied ones once, for a checkpoint: each a shard (DTensor) or whole.

        All ranks go through it together. A tensor may be that of the model itself.
        """
        ...

    def save_config(self, directory: Path) -> None:
        """Writes what a Hugging Face directory has besides weights and tokenizer (``config.json``)."""
        ...

    def save_model(self, directory: Path) -> None:
        """Writes a Hugging Face directory (without tokenizer)."""
        ...

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors as ``MOMENT/NAME``, by Hugging Face name and in its shape: each a shard (DTensor) or whole.

        Whole ones may be given by any rank that has them. A tensor may be that of the optimizer itself.
        """
        ...

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """The inverse: shards where `master_weights` gives shards, or whole tensors.

        Raises CheckpointError if the state is another model's.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for logs: parameters, device, dtype; ``data_parallel`` ranks and the ``places`` of all ranks among them;
        ``shares_prefixes``: whether `sharing` is not None (may be missing if it is)."""
        ...


@runtime_checkable
class PipelinedBackend(Protocol):
    """A backend that gains from being given all passes of a call at once."""

    device: torch.device
    sharing: Sharing | None

    def forward_backward_all(self, batches: Sequence[MicroBatch | None], objective: ObjectiveConfig) -> PassResult:
        """`TrainingBackend.forward_backward` of each batch; None is a pass that adds nothing (`idle_pass`)."""
        ...
