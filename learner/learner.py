"""The learner: encoded groups in, weights and metrics out. A plain class; its actor is a shell around it.

Version v is what the weights are after v steps. Step v trains at version v and makes version v + 1, also when it had
nothing to learn from or had to be skipped: versions count steps, so that pacing and lag stay what they are.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experience.records import Group
from experience.wire import decode_group
from learner.adapter_files import base_of
from learner.backends.frozen import FrozenModel
from learner.backends.make import make_backend
from learner.backends.ranks import LearnerRanks, OneRank
from learner.checkpoint import (
    OWN_FILE,
    CheckpointState,
    begin_checkpoint,
    commit_checkpoint,
    copy_tokenizer,
    read_checkpoint,
    source_after,
)
from learner.config import LearnerConfig, ModelConfig
from learner.critic import Critic
from learner.errors import CheckpointError, LearnerError
from learner.mixing import Demonstrations, Replay, Source, read_demonstrations, read_replay
from learner.objectives.entropy import EntropyController
from learner.preparation import Helpers
from learner.streaming import StepResult, StepSettings, StreamingStep

if TYPE_CHECKING:
    from learner.backends.rank_group import RankGroup

logger = logging.getLogger(__name__)

CPU_PASS_TOKENS = 2560
"""Largest pass on a CPU: shorter ones pay more overhead a token, the activations of longer ones fall out of the cache."""

ENTROPY_KEY = "entropy/coefficient"
CRITIC_PREFIX = "critic/"


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read: token ids below ``vocabulary``, sequences of at most ``positions`` tokens."""

    vocabulary: int
    positions: int

    @classmethod
    def of(cls, directory: Path) -> ModelLimits:
        """Of the model in a Hugging Face directory."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return cls(int(config["vocab_size"]), int(config.get("max_position_embeddings") or sys.maxsize))


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
        self._saving: tuple[Path, CheckpointState] | None = None
        self._bad_in_a_row = 0
        self._skipped = 0
        self._seed = seed
        self._helpers = Helpers()
        self._limits: ModelLimits | None = None
        self._sources: list[Source] = []
        self._entropy: EntropyController | None = None
        if config.entropy_target is not None:
            self._entropy = EntropyController(config.entropy_target, config.entropy_rate, config.entropy_coef_max)

    @property
    def device(self) -> torch.device:
        """Where the tensors of `named_tensors` lie."""
        return self._loaded().device

    @property
    def model_bytes(self) -> int:
        """Size of all weights in ``model.dtype``."""
        width: int = getattr(torch, self._model_config.dtype).itemsize
        return int(self._loaded().describe()["parameters"]) * width

    def load(self, path: str | Path) -> None:
        """Starts at version 0 from a Hugging Face directory. Raises ModelError."""
        if self._group is not None:
            self._group.load(path, self._initial)
            self._ranks = self._group
        else:
            self._ranks = OneRank(make_backend(path, self._config, self._model_config.dtype, self._initial))
        model = base_of(path, self._initial)
        self._source = Path(path)
        self._limits = ModelLimits.of(model)
        self._helpers = self._make_helpers(model)
        self._sources = self._make_sources(model)
        self.version = 0

    def restore(self, path: str | Path) -> CheckpointState:
        """Continues from a checkpoint. Raises CheckpointError, ModelError."""
        directory = Path(path)
        state = read_checkpoint(directory)
        self.load(directory)
        self._loaded().restore(directory, state.updates)
        self._take_own(directory)
        self.version, self.extra = state.version, state.extra
        return state

    def begin_step(self) -> None:
        """Starts step ``version``. An unfinished step is thrown away."""
        ranks = self._loaded()
        ranks.discard_gradient()
        stays = self._helpers.critic is not None and self.version < self._config.critic.pretrain_steps
        self._step = StreamingStep(
            ranks, self._step_settings(ranks), self.version, self._helpers, self._sources, policy_stays=stays
        )

    def add(self, groups: Sequence[bytes]) -> list[str]:
        """Takes encoded groups and trains on what fills a pass; returns their ids.

        Raises WireFormatError, and LearnerError for a trajectory that the model cannot read.
        """
        decoded = [decode_group(data) for data in groups]
        for group in decoded:
            self._check(group)
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
        if self._entropy is not None and result.applied and "entropy" in result.metrics:
            result.metrics["entropy/coefficient"] = self._entropy.coefficient
            self._entropy.observe(result.metrics["entropy"])
        return {**result.metrics, "steps/skipped": float(self._skipped), "updates": float(self._loaded().updates)}

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights to publish, by Hugging Face name."""
        return self._loaded().named_tensors()

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Writes a checkpoint of the present version into ``directory``; returns its path. Raises CheckpointError."""
        self.begin_save(directory, extra)
        return self.finish_save()

    def begin_save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Copies what a checkpoint of the present version holds and begins to write it; training may go on after that.

        `finish_save` must follow before the next one. Raises CheckpointError.
        """
        if self._saving is not None:
            raise LearnerError(f"{self._saving[0]} is still being written: call finish_save first")
        ranks = self._loaded()
        state = CheckpointState(self.version, self.version, ranks.updates, extra or {})
        temporary = begin_checkpoint(Path(directory), self.version)
        self._write_own(temporary)
        ranks.begin_save(temporary)
        self._saving = temporary, state

    def finish_save(self) -> Path:
        """Waits until the checkpoint that was begun is whole on disk, and returns its path; may run beside training.

        Raises CheckpointError; the checkpoints before it are as they were.
        """
        if self._saving is None:
            raise LearnerError("no checkpoint is being written: call begin_save first")
        (temporary, state), self._saving = self._saving, None
        try:
            self._loaded().finish_save()
            if self._source is not None:
                copy_tokenizer(self._source, temporary)
            written = commit_checkpoint(temporary, state, self._keep)
        except CheckpointError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._source = source_after(self._source, written)
        return written

    def export(self, directory: str | Path) -> None:
        """Writes the present weights as a Hugging Face directory, with the tokenizer."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        self._write_model(target)

    def _check(self, group: Group) -> None:
        """Raises LearnerError for tokens that the model does not know, or more of them than it has positions for."""
        assert self._limits is not None
        for trajectory in group.trajectories:
            where = f"group {group.group_id}, trajectory {trajectory.trajectory_id}"
            largest = int(trajectory.tokens.max(initial=0))
            if largest >= self._limits.vocabulary or trajectory.tokens.min(initial=0) < 0:
                raise LearnerError(
                    f"{where} has token {largest}, and the trained model knows {self._limits.vocabulary}: engines and learner must "
                    "have the same tokenizer and model"
                )
            if len(trajectory) > self._limits.positions:
                raise LearnerError(
                    f"{where} has {len(trajectory)} tokens, and the trained model has {self._limits.positions} positions: lower "
                    "rollout.max_episode_tokens"
                )

    def _write_own(self, directory: Path) -> None:
        state: dict[str, torch.Tensor] = {}
        if self._helpers.critic is not None:
            state = {CRITIC_PREFIX + name: tensor for name, tensor in self._helpers.critic.state().items()}
        if self._entropy is not None:
            state[ENTROPY_KEY] = torch.tensor([self._entropy.reached, self._entropy.coefficient], dtype=torch.float64)
        if not state:
            return
        try:
            save_file(state, directory / OWN_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {directory.parent}: {error}; free space there, then resume the run"
            ) from error

    def _take_own(self, directory: Path) -> None:
        file = directory / OWN_FILE
        try:
            state = load_file(file) if file.exists() else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        entropy = state.pop(ENTROPY_KEY, None)
        if self._entropy is not None and entropy is not None:
            self._entropy.reached, self._entropy.coefficient = entropy.tolist()
        if self._helpers.critic is None:
            return
        if not state:
            raise CheckpointError(
                f"{directory} holds no critic: learner.advantage=gae goes on only from a checkpoint that has one"
            )
        self._helpers.critic.load_state({name.removeprefix(CRITIC_PREFIX): tensor for name, tensor in state.items()})

    def _make_helpers(self, path: Path) -> Helpers:
        config, device = self._config, self._loaded().device
        critic = reference = None
        if config.advantage == "gae":
            critic = Critic(config.critic.path or path, config.critic, device)
        if config.kl_place == "reward":
            place = config.reference or self._initial or path
            reference = FrozenModel("learner.reference", place, device, ModelLimits.of(path).vocabulary)
        return Helpers(critic, reference)

    def _make_sources(self, path: Path) -> list[Source]:
        config = self._config
        found: list[Source] = []
        if config.sft.dataset is not None:
            samples = read_demonstrations(Path(config.sft.dataset), path, ModelLimits.of(path).vocabulary)
            found.append(Demonstrations(samples, config.sft, config, self._seed))
        if config.replay.run is not None:
            groups = read_replay(config.replay, config, ModelLimits.of(path).vocabulary)
            found.append(Replay(groups, config.replay, config, self._seed))
        return found

    def _write_model(self, directory: Path) -> None:
        self._loaded().save_model(directory)
        if self._source is not None:
            copy_tokenizer(self._source, directory)

    def _judge(self, result: StepResult) -> None:
        if result.applied:
            self._bad_in_a_row = 0
            if result.bad_samples:
                logger.warning(
                    "step %d: its last updates were left out, loss or gradient is not finite (%s)",
                    self.version,
                    ", ".join(result.bad_samples[:4]),
                )
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
            objective=config if self._entropy is None else replace(config, entropy_coef=self._entropy.coefficient),
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
