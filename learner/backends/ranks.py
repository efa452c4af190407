"""The ranks that train together, as the streaming step sees them: bins of samples in, sums out.

One rank lives in the learner's own process (`OneRank`); several are actors of their own (`rank_group.RankGroup`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from learner.backends.checkpoint_files import CheckpointFiles
from learner.backends.protocol import PassResult, PipelinedBackend, TrainingBackend
from learner.batching import Sample, collate
from learner.objectives.config import ObjectiveConfig
from learner.objectives.sums import TokenSums
from learner.prefix_tree import Sharing

Bin = Sequence[Sample]
"""Samples of one pass, longest first."""


class LearnerRanks(Protocol):
    """Holds model and optimizer, on however many ranks. Gradients are sums until `step` divides them by the normaliser."""

    @property
    def width(self) -> int:
        """Bins that run at the same time: data-parallel ranks."""
        ...

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks compute on CPUs."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the tensors of `named_tensors` lie."""
        ...

    @property
    def updates(self) -> int:
        """Optimizer updates so far."""
        ...

    @property
    def sharing(self) -> Sharing | None:
        """See `TrainingBackend.sharing`."""
        ...

    def train(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
        """One pass for each bin, ``width`` at a time; adds the gradient of their *summed* loss."""
        ...

    def logprobs(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> list[npt.NDArray[np.float32]]:
        """Of each bin's targets under the present weights, without gradient."""
        ...

    def step(self, normaliser: float) -> float | None:
        """See `TrainingBackend.step`."""
        ...

    def gradient_is_finite(self) -> bool:
        """See `TrainingBackend.gradient_is_finite`."""
        ...

    def discard_gradient(self) -> None: ...

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """See `TrainingBackend.named_tensors`."""
        ...

    def save_model(self, directory: Path) -> None:
        """Writes a Hugging Face directory (without tokenizer)."""
        ...

    def begin_save(self, directory: Path) -> None:
        """Copies what a checkpoint holds (but the tokenizer) and begins to write it; training may go on after that.

        Raises CheckpointError.
        """
        ...

    def finish_save(self) -> None:
        """Waits until that is written; may run beside training, on another thread. Raises CheckpointError."""
        ...

    def restore(self, directory: Path, updates: int) -> None:
        """Reads what a checkpoint holds besides weights. Raises CheckpointError."""
        ...

    def describe(self) -> dict[str, Any]: ...


class OneRank:
    """A backend in this process."""

    width = 1

    def __init__(self, backend: TrainingBackend) -> None:
        self.backend = backend
        self._files = CheckpointFiles(None)

    @property
    def on_cpu(self) -> bool:
        return self.backend.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def updates(self) -> int:
        return self.backend.updates

    @property
    def sharing(self) -> Sharing | None:
        return self.backend.sharing

    def train(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
        return train_bins(self.backend, bins, objective)

    def logprobs(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> list[npt.NDArray[np.float32]]:
        return [bin_logprobs(self.backend, samples, objective) for samples in bins]

    def step(self, normaliser: float) -> float | None:
        return self.backend.step(normaliser)

    def gradient_is_finite(self) -> bool:
        return self.backend.gradient_is_finite()

    def discard_gradient(self) -> None:
        self.backend.discard_gradient()

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.backend.named_tensors()

    def save_model(self, directory: Path) -> None:
        self.backend.save_model(directory)

    def begin_save(self, directory: Path) -> None:
        self._files.begin_save(self.backend, directory)

    def finish_save(self) -> None:
        self._files.finish_save()

    def restore(self, directory: Path, updates: int) -> None:
        self._files.restore(self.backend, directory, updates)

    def describe(self) -> dict[str, Any]:
        return self.backend.describe()


def train_bin(backend: TrainingBackend, samples: Bin, objective: ObjectiveConfig) -> PassResult:
    """One pass. No samples: this rank takes part in the others' pass and adds nothing."""
    if not samples:
        backend.idle_pass()
        return PassResult(TokenSums())
    batch = collate(samples, objective.aggregation, backend.device, objective.constant_length, backend.sharing)
    return backend.forward_backward(batch, objective)


def train_bins(backend: TrainingBackend, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
    """One pass for each bin: one after another, or together where the backend is a pipeline."""
    if isinstance(backend, PipelinedBackend):
        batches = [
            collate(samples, objective.aggregation, backend.device, objective.constant_length, backend.sharing)
            if samples
            else None
            for samples in bins
        ]
        return backend.forward_backward_all(batches, objective)
    sums = TokenSums()
    bad: list[str] = []
    for samples in bins:
        done = train_bin(backend, samples, objective)
        sums.add(done.sums)
        bad.extend(done.bad_samples)
    return PassResult(sums, tuple(bad))


def bin_logprobs(backend: TrainingBackend, samples: Bin, objective: ObjectiveConfig) -> npt.NDArray[np.float32]:
    """Log-probabilities of a bin's targets, [n]; as for `train_bin` a bin may be empty."""
    if not samples:
        backend.idle_forward()
        return np.zeros(0, dtype=np.float32)
    batch = collate(samples, objective.aggregation, backend.device, objective.constant_length, backend.sharing)
    found: npt.NDArray[np.float32] = backend.forward(batch).cpu().numpy()
    return found
