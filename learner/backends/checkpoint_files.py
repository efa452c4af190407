"""What one rank writes of a checkpoint while training goes on, and what it reads back.

Two things are written by torch.distributed.checkpoint, each rank its shards: the weights in Hugging Face's format, put
together from the shards afterwards, and the rest (optimizer, random numbers, a reference policy that has moved) in
``optimizer/``. All names are Hugging Face's and all tensors have the shape that they have there, so any number of ranks and
any backend can read them.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learner.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from learner.backends.protocol import TrainingBackend
from learner.backends.sharding import is_shard
from learner.errors import CheckpointError

logger = logging.getLogger(__name__)

OPTIMIZER_DIRECTORY = "optimizer"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 << 30
"""Files of weights are begun anew after that many bytes."""
REFERENCE, RANDOM = "reference", "rng"


class CheckpointFiles:
    """One rank's part. ``group`` is a process group for this alone: its collectives run beside those of training.

    None: there is one rank, and no process group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        if group is None:  # which is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    @cached_property
    def _stagers(self) -> tuple[Any, Any]:
        """For weights and for the rest: what was staged before is overwritten, which saves allocating it anew.

        Made for the first checkpoint: what it takes is a second of imports that no start should wait for.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(False, False, False, False)
        return DefaultStager(options), DefaultStager(options)

    def begin_save(self, backend: TrainingBackend, directory: Path) -> None:
        """Copy what belongs into a checkpoint and begin to write it; returns when training may go on.

        Raises CheckpointError if the one before could not be written; it is waited for.
        """
        self.finish_save()
        for_weights, for_rest = self._stagers
        weights: dict[str, torch.Tensor] = for_weights.stage(dict(backend.master_weights()))
        rest: dict[str, torch.Tensor] = for_rest.stage(
            {
                **backend.optimizer_state(),
                **{f"{REFERENCE}/{name}": tensor for name, tensor in backend.reference_state().items()},
                f"{RANDOM}/{self._rank}": torch.get_rng_state(),
            }
        )
        self._under_way = self._thread.submit(self._write, backend, directory, weights, rest)

    def writing(self) -> Future[None] | None:
        """What `begin_save` began and nobody has waited for yet."""
        return self._under_way

    def finish_save(self) -> None:
        """Wait until all that was begun is written by all ranks. Raises CheckpointError."""
        writing, self._under_way = self._under_way, None
        if writing is not None:
            writing.result()

    def restore(self, backend: TrainingBackend, directory: Path, updates: int) -> None:
        """Read back what is not a weight. Raises CheckpointError."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        try:
            reader = FileSystemReader(directory / OPTIMIZER_DIRECTORY)
            described = reader.read_metadata().state_dict_metadata
            shards = {name: tensor for name, tensor in backend.master_weights() if is_shard(tensor)}
            state = {name: self._room(name, kind, shards) for name, kind in described.items() if self._is_mine(name)}
            if state:
                load(state, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except (OSError, ValueError, RuntimeError, EOFError, CheckpointException) as error:
            raise CheckpointError(f"{directory / OPTIMIZER_DIRECTORY} cannot be read: {cause(error)}") from error
        self._take(backend, state, updates)

    def _take(self, backend: TrainingBackend, state: dict[str, torch.Tensor], updates: int) -> None:
        random = state.pop(f"{RANDOM}/{self._rank}", None)
        reference = {
            name.removeprefix(f"{REFERENCE}/"): state.pop(name)
            for name in list(state)
            if name.startswith(f"{REFERENCE}/")
        }
        backend.load_optimizer_state(state, updates)
        if reference:
            backend.load_reference_state(reference)
        if random is not None:
            torch.set_rng_state(random)

    def _is_mine(self, name: str) -> bool:
        return not name.startswith(f"{RANDOM}/") or name == f"{RANDOM}/{self._rank}"

    @staticmethod
    def _room(name: str, kind: Any, shards: dict[str, torch.Tensor]) -> torch.Tensor:
        """An empty tensor for an entry: a shard where the backend has shards of the parameter that it belongs to."""
        moment, _, parameter = name.partition("/")
        like = shards.get(parameter) if moment != REFERENCE else None
        if like is not None and like.shape == kind.size:
            return torch.empty_like(like, dtype=kind.properties.dtype)
        return torch.empty(kind.size, dtype=kind.properties.dtype)

    def _write(
        self, backend: TrainingBackend, directory: Path, weights: dict[str, torch.Tensor], rest: dict[str, torch.Tensor]
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        alone = self._group is None
        try:
            writer = HuggingFaceStorageWriter(
                str(directory),
                fqn_to_index_mapping=files_of(weights),
                save_distributed=True,
                enable_consolidation=True,
            )
            save(weights, storage_writer=writer, process_group=self._group, no_dist=alone)
            place = FileSystemWriter(directory / OPTIMIZER_DIRECTORY)
            save(rest, storage_writer=place, process_group=self._group, no_dist=alone)
            if self._rank == 0:
                backend.save_config(directory)
                _tidy(directory)
        except (OSError, ValueError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {directory.parent}: {cause(error)}; free space there, then resume the run"
            ) from error


def files_of(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor is written to: in their order, `FILE_BYTES` in each or one tensor."""
    numbers: dict[str, int] = {}
    number, used = 1, 0
    for name, tensor in weights.items():
        nbytes = tensor.numel() * tensor.element_size()
        if used and used + nbytes > FILE_BYTES:
            number, used = number + 1, 0
        numbers[name] = number
        used += nbytes
    return numbers


def _tidy(directory: Path) -> None:
    """Remove the shards that the weights were put together from; a single file has the name that it has everywhere."""
    shutil.rmtree(directory / "sharded")
    files = sorted(directory.glob("model-*.safetensors"))
    if len(files) == 1:
        is_adapter = (directory / ADAPTER_CONFIG).is_file()
        files[0].rename(directory / (ADAPTER_WEIGHTS if is_adapter else WEIGHTS_FILE))
        (directory / WEIGHTS_INDEX).unlink()


def cause(error: BaseException) -> str:
    """What went wrong, without the traceback that torch.distributed.checkpoint tells it with."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (first, _) = sorted(failures.items())[0]
        return f"rank {rank}: {cause(first)}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
