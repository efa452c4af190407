"""One rank of a learner of several, in a process of its own: does what the learner says, with all other ranks at once."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from learner.backends.checkpoint_files import CheckpointFiles
from learner.backends.make import make_backend
from learner.backends.process_group import checkpoint_group, free_address, join
from learner.backends.protocol import PassResult, TrainingBackend
from learner.backends.ranks import Bin, bin_logprobs, train_bins
from learner.config import LearnerConfig
from learner.errors import LearnerError
from learner.objectives.config import ObjectiveConfig
from learner.publishing import RankSender, SendingPlace

Found = TypeVar("Found")

SAVE_TIMEOUT_S = 3600.0
"""How long the ranks wait for each other while they write a checkpoint."""


@dataclass(frozen=True)
class RankSettings:
    """What every rank is told; ``rank`` is its own number of ``world``."""

    rank: int
    world: int
    config: LearnerConfig
    dtype: str
    threads: int
    seed: int
    timeout_s: float


class RankActor:
    """Calls come one after another, the same one to all ranks."""

    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        torch.set_num_threads(max(1, settings.threads))
        torch.manual_seed(settings.seed)
        self._backend: TrainingBackend | None = None
        self._files: CheckpointFiles | None = None
        self._sender: RankSender | None = None

    def where(self) -> tuple[str, int]:
        """Host name and process id."""
        return socket.gethostname(), os.getpid()

    async def alive(self) -> None:
        """Ends with the process only."""
        await asyncio.Event().wait()

    def address(self) -> str:
        """Where the ranks can meet, if this one is the first."""
        return free_address(socket.gethostbyname(socket.gethostname()))

    def join(self, address: str) -> None:
        """Meet the other ranks. Raises LearnerError."""
        from learner.backends.model import resolve_device

        settings = self._settings
        device = resolve_device(settings.config.device)
        join(address, settings.rank, settings.world, device, settings.timeout_s)
        self._files = CheckpointFiles(checkpoint_group(SAVE_TIMEOUT_S))

    def load(self, path: str, initial: str | None) -> dict[str, Any]:
        """Build model and optimizer; returns what `TrainingBackend.describe` tells. Raises ModelError."""
        settings = self._settings
        self._backend = make_backend(path, settings.config, settings.dtype, initial, world=settings.world)
        return self._backend.describe()

    def train(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
        """This rank's bins, one pass each; all ranks get equally many, some perhaps empty."""
        return train_bins(self._loaded, bins, objective)

    def logprobs(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> list[npt.NDArray[np.float32]]:
        return [bin_logprobs(self._loaded, samples, objective) for samples in bins]

    def step(self, normaliser: float) -> float | None:
        return self._loaded.step(normaliser)

    def gradient_is_finite(self) -> bool:
        return self._loaded.gradient_is_finite()

    def discard_gradient(self) -> None:
        self._loaded.discard_gradient()

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """All weights, on rank 0; the others help to gather them and return nothing."""
        return self._on_first([(name, tensor.cpu()) for name, tensor in self._loaded.named_tensors()], [])

    # The road of the weights. What moves bytes leaves the thread of the calls, which trains.

    def open_sender(self, place: SendingPlace) -> None:
        """Raises WeightTransferError, ValueError."""
        self._sender = RankSender(place, self._loaded.device, self._settings.rank, self._settings.world)

    def prepare_weights(self, version: int) -> None:
        """Gather all weights with the other ranks and keep this one's share. Raises WeightTransferError."""
        self._opened.prepare(version, self._loaded.named_tensors())

    async def offer_weights(self, members: list[str]) -> bytes:
        """The encoded offer of this rank's share."""
        return await asyncio.to_thread(self._opened.sender.offer, members)

    async def send_weights(self) -> None:
        """Move this rank's share to the members of its last offer. Raises WeightTransferError."""
        await asyncio.to_thread(self._opened.sender.send)

    async def cancel_send(self) -> None:
        await asyncio.to_thread(self._opened.sender.cancel)

    async def taken(self, member: str, version: int) -> None:
        self._opened.sender.taken(member, version)

    def close_sender(self) -> None:
        """Release shared memory and process groups of the weights."""
        if self._sender is not None:
            self._sender.sender.close()

    def save_model(self, directory: str) -> None:
        self._loaded.save_model(Path(directory))

    def begin_save(self, directory: str) -> None:
        """Copy this rank's part of a checkpoint and begin to write it. Raises CheckpointError."""
        self._joined.begin_save(self._loaded, Path(directory))

    async def finish_save(self) -> None:
        """Until the checkpoint is written; training calls are answered meanwhile. Raises CheckpointError."""
        writing = self._joined.writing()
        if writing is not None:
            await asyncio.wrap_future(writing)

    def restore(self, directory: str, updates: int) -> None:
        """Read optimizer, random numbers and reference policy of a checkpoint. Raises CheckpointError."""
        self._joined.restore(self._loaded, Path(directory), updates)

    @property
    def _loaded(self) -> TrainingBackend:
        if self._backend is None:
            raise LearnerError(f"rank {self._settings.rank} has no model yet: call load first")
        return self._backend

    @property
    def _joined(self) -> CheckpointFiles:
        if self._files is None:
            raise LearnerError(f"rank {self._settings.rank} has not met the others yet: call join first")
        return self._files

    @property
    def _opened(self) -> RankSender:
        if self._sender is None:
            raise LearnerError(f"rank {self._settings.rank} cannot send weights yet: call open_sender first")
        return self._sender

    def _on_first(self, found: Found, otherwise: Found) -> Found:
        return found if self._settings.rank == 0 else otherwise
