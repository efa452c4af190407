"""The learner: encoded groups in, weights and metrics out. A plain class; its actor is a shell around it.

Version v is what the weights are after v steps. Step v trains at version v and makes version v + 1, also when it had
nothing to learn from or had to be skipped: versions count steps, so that pacing and lag stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experience.wire import decode_group
from learner.backends.make import make_backend
from learner.backends.ranks import LearnerRanks, OneRank
from learner.checkpoint import (
    OPTIMIZER_FILE,
    REFERENCE_FILE,
    CheckpointState,
    begin_checkpoint,
    commit_checkpoint,
    copy_tokenizer,
    read_checkpoint,
    source_after,
)
from learner.config import LearnerConfig, ModelConfig
from learner.errors import CheckpointError, LearnerError
from learner.streaming import StepResult, StepSettings, StreamingStep

if TYPE_CHECKING:
    from learner.backends.rank_group import RankGroup

logger = logging.getLogger(__name__)

CPU_PASS_TOKENS = 2560
"""Largest pass on a CPU: shorter ones pay more overhead a token, the activations of longer ones fall out of the cache."""

RNG_KEY = "rng/torch"


class Learner:
    """Model, optimizer and the step under way. Call :meth:`load` or :meth:`restore` first.

    ``group`` are the ranks that train together (None: one, in this process).
    ``initial`` is the model that the run began with (None: what `load` is given), the reference of a KL term.
    ``threads`` overrides ``config.threads``; both None leaves torch's setting alone.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ModelConfig,
        *,
        max_lag: int,
        threads: int | None = None,
        deterministic: bool = False,
        keep_checkpoints: int = 2,
        seed: int = 0,
        initial: Path | None = None,
        group: RankGroup | None = None,
    ) -> None:
        config.validate()
        model.validate()
        chosen = threads or config.threads
        if chosen:
            torch.set_num_threads(chosen)
        torch.manual_seed(seed)
        self.version = 0
        self.extra: dict[str, Any] = {}
        """What the caller saved with the checkpoint that was restored."""
        self._config, self._model_config = config, model
        self._max_lag, self._deterministic, self._keep = max_lag, deterministic, keep_checkpoints
        self._initial = initial
        self._ranks: LearnerRanks | None = None
        self._group = group
        self._source: Path | None = None
        self._step: StreamingStep | None = None
        self._bad_in_a_row = 0
        self._skipped = 0

    @property
    def device(self) -> torch.device:
        """Where the tensors of `named_tensors` lie."""
        return self._loaded().device

    def load(self, path: str | Path) -> None:
        """Starts at version 0 from a Hugging Face directory. Raises ModelError."""
        if self._group is not None:
            self._group.load(path, self._initial)
            self._ranks = self._group
        else:
            self._ranks = OneRank(make_backend(path, self._config, self._model_config.dtype, self._initial))
        self._source = Path(path)
        self.version = 0

    def restore(self, path: str | Path) -> CheckpointState:
        """Continues from a checkpoint. Raises CheckpointError, ModelError."""
        directory = Path(path)
        state = read_checkpoint(directory)
        self.load(directory)
        try:
            tensors = load_file(directory / OPTIMIZER_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory / OPTIMIZER_FILE} cannot be read: {error}") from error
        rng = tensors.pop(RNG_KEY, None)
        if rng is not None:
            torch.set_rng_state(rng)
        self._loaded().load_optimizer_state(tensors, state.updates)
        if (directory / REFERENCE_FILE).exists():
            self._loaded().load_reference_state(load_file(directory / REFERENCE_FILE))
        self.version, self.extra = state.version, state.extra
        return state

    def begin_step(self) -> None:
        """Starts step ``version``. An unfinished step is thrown away."""
        ranks = self._loaded()
        ranks.discard_gradient()
        self._step = StreamingStep(ranks, self._step_settings(ranks), self.version)

    def add(self, groups: Sequence[bytes]) -> list[str]:
        """Takes encoded groups and trains on what fills a pass; returns their ids. Raises WireFormatError."""
        decoded = [decode_group(data) for data in groups]
        self._running().add(decoded)
        return [group.group_id for group in decoded]

    def flush(self) -> None:
        """Trains on everything that has arrived; worth calling when the next group is not ready yet."""
        self._running().flush()

    def finish_step(self) -> dict[str, float]:
        """Ends the step: updates the weights, increments ``version`` and returns the metrics.

        A gradient that is not finite leaves the weights as they are. Raises LearnerError when that happened
        ``max_bad_steps`` times in a row, naming the step and the trajectories.
        """
        result = self._running().finish()
        self._step = None
        self._judge(result)
        self.version += 1
        return {**result.metrics, "steps/skipped": float(self._skipped), "updates": float(self._loaded().updates)}

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights to publish, by Hugging Face name."""
        return self._loaded().named_tensors()

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Writes a checkpoint of the present version into ``directory``; returns its path. Raises CheckpointError."""
        backend = self._loaded()
        temporary = begin_checkpoint(Path(directory), self.version)
        try:
            self._write_model(temporary)
            save_file({**backend.optimizer_state(), RNG_KEY: torch.get_rng_state()}, temporary / OPTIMIZER_FILE)
            reference = backend.reference_state()
            if reference:
                save_file(reference, temporary / REFERENCE_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {directory}: {error}; free space there, then resume the run"
            ) from error
        state = CheckpointState(self.version, self.version, backend.updates, extra or {})
        written = commit_checkpoint(temporary, state, self._keep)
        self._source = source_after(self._source, written)
        return written

    def export(self, directory: str | Path) -> None:
        """Writes the present weights as a Hugging Face directory, with the tokenizer."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        self._write_model(target)

    def _write_model(self, directory: Path) -> None:
        self._loaded().save_model(directory)
        if self._source is not None:
            copy_tokenizer(self._source, directory)

    def _judge(self, result: StepResult) -> None:
        if result.applied:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        self._skipped += 1
        where = ", ".join(result.bad_samples[:4]) or "the gradient as a whole"
        logger.warning("step %d skipped: loss or gradient is not finite (%s)", self.version, where)
        if self._bad_in_a_row >= self._config.max_bad_steps:
            raise LearnerError(
                f"loss or gradient was not finite in {self._bad_in_a_row} steps in a row, the last of them step "
                f"{self.version} (group/trajectory: {where}): lower learner.lr, or look at these trajectories"
            )

    def _step_settings(self, ranks: LearnerRanks) -> StepSettings:
        config = self._config
        return StepSettings(
            objective=config,
            max_lag=self._max_lag,
            skip_no_signal=config.skip_no_signal,
            pass_tokens=min(config.token_budget, CPU_PASS_TOKENS) if ranks.on_cpu else config.token_budget,
            largest_pass=config.token_budget,
            deterministic=self._deterministic,
        )

    def _loaded(self) -> LearnerRanks:
        if self._ranks is None:
            raise LearnerError("no model is loaded: call load or restore first")
        return self._ranks

    def _running(self) -> StreamingStep:
        if self._step is None:
            raise LearnerError("no step is under way: call begin_step first")
        return self._step
