"""The synthetic learner: takes, checks, masks and counts groups like the real one, and owes the time that training costs.

Its interface is that of `learner.learner.Learner`. The weights are a few kilobytes that are stamped with their version,
so that an engine can tell whether it was given what it was promised.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experience.records import Group
from experience.wire import decode_group
from learner.batching import GroupSamples, make_samples
from learner.checkpoint import (
    CheckpointState,
    begin_checkpoint,
    commit_checkpoint,
    copy_tokenizer,
    read_checkpoint,
    source_after,
)
from learner.config import LearnerConfig
from learner.errors import CheckpointError, LearnerError, ModelError
from learner.streaming import group_metrics
from learner.synthetic_clock import LearnerCost, TrainingClock

STAMP = "millrace.version"
"""Name of the tensor (float64 [1]) that holds the version which the weights belong to."""
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class SyntheticLearner:
    """Versions count steps, as in `Learner`. Call :meth:`load` or :meth:`restore` first.

    ``time_shared``: its accelerators are those of the engines (`mode: sync`). ``clock`` gives Unix seconds, ``wait`` sleeps.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        max_lag: int,
        keep_checkpoints: int = 2,
        time_shared: bool = False,
        clock: Callable[[], float] = time.time,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        config.validate()
        self.version = 0
        self.extra: dict[str, Any] = {}
        self.training = TrainingClock(LearnerCost.from_config(config.synthetic, time_shared), clock())
        self._config, self._max_lag, self._keep = config, max_lag, keep_checkpoints
        self._clock, self._wait = clock, wait
        self._source: Path | None = None
        self._weights: dict[str, npt.NDArray[Any]] = {}
        self._groups: list[GroupSamples] | None = None
        self._tokens = 0
        self._busy_before = 0.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def load(self, path: str | Path) -> None:
        """Start at version 0 from a directory that the recipe ``synthetic`` made. Raises ModelError."""
        directory = Path(path)
        try:
            weights = load_file(directory / WEIGHTS_FILE)
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{directory / WEIGHTS_FILE} cannot be read: {error}") from error
        if STAMP not in weights:
            raise ModelError(f"{directory} holds no synthetic model: leave model.path null, set model.recipe=synthetic")
        self._weights, self._source, self.version = weights, directory, 0

    def restore(self, path: str | Path) -> CheckpointState:
        """Continue from a checkpoint. Raises CheckpointError, ModelError."""
        state = read_checkpoint(Path(path))
        self.load(path)
        self.version, self.extra = state.version, state.extra
        return state

    def begin_step(self) -> None:
        """Start step ``version``. An unfinished step is thrown away."""
        self._groups, self._tokens, self._busy_before = [], 0, self.training.busy_s

    def add(self, groups: Sequence[bytes]) -> list[str]:
        """Take encoded groups; returns their ids at once, their work is owed. Raises WireFormatError."""
        taken = self._running()
        decoded = [decode_group(data) for data in groups]
        for group in decoded:
            taken.append(make_samples(group, self.version, self._max_lag, self._config.advantage))
        tokens = sum(len(trajectory) for group in decoded for trajectory in group.trajectories)
        self._tokens += tokens
        now = self._clock()
        self.training.add(tokens, max(map(made_at, decoded), default=now), now)
        return [group.group_id for group in decoded]

    def flush(self) -> None:
        """Nothing to do: work is owed from the moment that its groups arrived."""

    def finish_step(self) -> dict[str, float]:
        """End the step when its modelled time is over; increments ``version`` and returns the metrics."""
        groups = self._running()
        done_at = self.training.finish(self._clock())
        self._wait(max(0.0, done_at - self._clock()))
        self._groups = None
        self.version += 1
        return {
            "loss": 0.0,
            **group_metrics(groups, left_out=frozenset(), passes=0),
            "step/skipped": 0.0,
            "steps/skipped": 0.0,
            "updates": float(self.version),
            "tokens/passed": float(self._tokens),
            "time/train_s": self.training.busy_s - self._busy_before,
        }

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights to publish, stamped with the present version."""
        for name, array in self._stamped().items():
            yield name, torch.from_numpy(array)

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of the present version into ``directory``; returns its path. Raises CheckpointError."""
        temporary = begin_checkpoint(Path(directory), self.version)
        try:
            self.export(temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write a checkpoint to {directory}: {error}; free space there") from error
        state = CheckpointState(self.version, self.version, self.version, extra or {})
        written = commit_checkpoint(temporary, state, self._keep)
        self._source = source_after(self._source, written)
        return written

    def export(self, directory: str | Path) -> None:
        """Write the present weights as a model directory, with the tokenizer."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        save_file(self._stamped(), target / WEIGHTS_FILE)
        source = self._source
        if source is not None and source != target:
            shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)
            copy_tokenizer(source, target)

    def _stamped(self) -> dict[str, npt.NDArray[Any]]:
        if not self._weights:
            raise LearnerError("no model is loaded: call load or restore first")
        return {**self._weights, STAMP: np.array([float(self.version)])}

    def _running(self) -> list[GroupSamples]:
        if self._groups is None:
            raise LearnerError("no step is under way: call begin_step first")
        return self._groups


def made_at(group: Group) -> float:
    """Unix time at which the last turn of a group ended."""
    return max((turn.ended_at for t in group.trajectories for turn in t.turns), default=0.0)
