"""Data that is trained on beside the step's groups: demonstrations, and groups of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experience.entries import EpisodeEntry
from experience.journal import JournalError, JournalReader
from experience.queue_records import GroupRecord
from experience.records import Group, GroupHeader
from experience.wire import WireFormatError, decode, decode_trajectory
from learner.batching import Sample, make_samples
from learner.errors import LearnerError
from learner.mixing_config import ReplayConfig, SftConfig
from learner.objectives.config import ObjectiveConfig

NO_LIMIT = 1 << 30
"""A lag that no token has: groups of another run have versions of their own."""


@dataclass(frozen=True)
class Addition:
    """What one update trains on beside its groups."""

    name: str
    samples: list[Sample]
    objective: ObjectiveConfig
    counts: bool
    """Whether its tokens (or trajectories) count in the normaliser; if not, ``samples`` are scaled for the one there is."""


class Source(Protocol):
    """Draws additions; the same ``draw`` of the same ``version`` is the same."""

    def draw(self, version: int, update: int, normaliser: float) -> Addition:
        """For update number ``update`` (from 0) of step ``version``; ``normaliser`` is that of the step's own groups."""
        ...


class Demonstrations:
    """Maximum likelihood on demonstrations: ``coef`` times the mean of ``-log pi`` over their tokens is added to the loss.

    The mixed loss of Ouyang et al. 2022, "InstructGPT", section 3.5 (PPO-ptx), there on pretraining data.
    """

    def __init__(self, samples: Sequence[Sample], config: SftConfig, objective: ObjectiveConfig, seed: int) -> None:
        self._samples, self._config, self._seed = list(samples), config, seed
        self._objective = replace(
            objective, surrogate="likelihood", correction="unweighted", proximal=None, aggregation="token",
            correction_level="token", kl_coef=0.0, entropy_coef=0.0, distill_coef=0.0, positive_lm_coef=0.0, dual_clip=None,
            second_moment_limit=None,
        )  # fmt: skip

    def draw(self, version: int, update: int, normaliser: float) -> Addition:
        rng = np.random.default_rng([self._seed, version, update, 1])
        count = min(self._config.batch_size, len(self._samples))
        drawn = [self._samples[i] for i in rng.choice(len(self._samples), count, replace=False)]
        tokens = sum(len(sample.targets) for sample in drawn)
        scale = self._config.coef * (normaliser if normaliser > 0 else 1.0) / tokens
        return Addition("sft", [replace(sample, advantage=scale) for sample in drawn], self._objective, counts=False)


class Replay:
    """Groups of an earlier run, their advantages as in that run's groups, weighted by ``pi / mu`` as `ReplayConfig` says.

    The behaviour policy is known by its recorded log-probabilities alone. GLM-5 Team 2026, arXiv:2602.15763, replays data of
    earlier stages against forgetting.
    """

    def __init__(
        self, groups: Sequence[list[Sample]], config: ReplayConfig, objective: ObjectiveConfig, seed: int
    ) -> None:
        self._groups, self._config, self._seed = list(groups), config, seed
        self._objective = replace(
            objective, surrogate="plain", correction=config.correction, correction_level=config.correction_level,
            proximal=None, dual_clip=None, second_moment_limit=None, updates_per_step=1,
        )  # fmt: skip

    def draw(self, version: int, update: int, normaliser: float) -> Addition:
        del normaliser
        rng = np.random.default_rng([self._seed, version, update, 2])
        chosen = rng.choice(len(self._groups), min(self._config.groups, len(self._groups)), replace=False)
        samples = [sample for index in chosen for sample in self._groups[index]]
        return Addition("replay", samples, self._objective, counts=True)


def read_demonstrations(file: Path, model: Path, vocabulary: int) -> list[Sample]:
    """The demonstrations of a .jsonl file, tokenised as ``model`` does. Raises LearnerError naming the line that is wrong."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LearnerError(f"learner.sft.dataset={file} cannot be read: {error}") from error
    tokenizer: Any = None
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "messages" in entry:
                tokenizer = tokenizer or _load_tokenizer(model)
                tokens, trained = tokenised(tokenizer, entry["messages"], entry.get("tools"))
            else:
                tokens, trained = [int(token) for token in entry["tokens"]], [bool(mark) for mark in entry["trained"]]
            samples.append(demonstration(f"sft/{number}", tokens, trained, vocabulary))
        except (ValueError, KeyError, TypeError) as error:
            raise LearnerError(
                f"learner.sft.dataset={file}, line {number}: {error!s}; a line is {{'messages': [...]}} with an assistant's "
                "message, or {'tokens': [...], 'trained': [...]}"
            ) from error
    if not samples:
        raise LearnerError(f"learner.sft.dataset={file} holds no demonstration")
    return samples


def demonstration(name: str, tokens: Sequence[int], trained: Sequence[bool], vocabulary: int) -> Sample:
    """A sample whose marked tokens are imitated. Raises ValueError."""
    if len(tokens) != len(trained):
        raise ValueError(f"{len(tokens)} tokens and {len(trained)} marks")
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ValueError(f"token {max(tokens)} is none of the model's {vocabulary}")
    where = np.flatnonzero(np.asarray(trained, dtype=np.bool_)[1:])
    if not len(where):
        raise ValueError("no token is trained")
    inputs = np.asarray(tokens, dtype=np.int32)
    return Sample(
        trajectory_id=name,
        group_id="sft",
        inputs=inputs[: where[-1] + 1],
        positions=where,
        targets=inputs[where + 1].astype(np.int64),
        behaviour=np.zeros(len(where), np.float32),
        lags=np.zeros(len(where), np.int64),
        advantage=1.0,
        temperature=1.0,
        episode_id=name,
    )


def tokenised(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them the assistant wrote. Raises ValueError for a template that rewrites history."""
    tokens: list[int] = []
    trained: list[bool] = []
    text = ""

    def append(upto: int, prompt: bool, marked: bool) -> None:
        nonlocal text
        rendered = tokenizer.apply_chat_template(
            messages[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        if not rendered.startswith(text):
            raise ValueError(f"the chat template rewrites history at message {upto}")
        added = tokenizer.encode(rendered[len(text) :], add_special_tokens=False)
        tokens.extend(added)
        trained.extend([marked] * len(added))
        text = rendered

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            append(index, prompt=True, marked=False)
            append(index + 1, prompt=False, marked=True)
    return tokens, trained


def _load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def read_replay(config: ReplayConfig, objective: ObjectiveConfig, vocabulary: int) -> list[list[Sample]]:
    """The samples of the finished groups of a recorded run that teach something, group by group. Raises LearnerError."""
    assert config.run is not None
    directory = Path(config.run)
    journal = directory / "journal" if (directory / "journal").is_dir() else directory
    headers: dict[str, GroupHeader] = {}
    entries: dict[str, list[EpisodeEntry]] = {}
    ready: dict[str, None] = {}
    try:
        for kind, payload, _ in JournalReader(journal).records():
            if kind == "open":
                header = decode(payload, GroupHeader)
                headers[header.group_id] = header
            elif kind == "add":
                entry = decode(payload, EpisodeEntry)
                entries.setdefault(entry.group_id, []).append(entry)
            elif kind == "ready":
                ready[decode(payload, GroupRecord).group_id] = None
        groups = [
            Group(
                header=headers[name],
                trajectories=[decode_trajectory(data) for entry in entries[name] for data in entry.trajectories],
            )
            for name in ready
        ]
    except (OSError, JournalError, WireFormatError, KeyError) as error:
        raise LearnerError(f"learner.replay.run={config.run}: its journal cannot be read: {error}") from error
    return replay_samples(groups, config, objective, vocabulary)


def replay_samples(
    groups: Sequence[Group], config: ReplayConfig, objective: ObjectiveConfig, vocabulary: int
) -> list[list[Sample]]:
    """As `read_replay`, of groups that were read."""
    found = []
    for group in groups:
        made = make_samples(group, NO_LIMIT // 2, NO_LIMIT, objective.advantage)
        if made.has_signal:
            fresh = [replace(sample, lags=np.zeros_like(sample.lags)) for sample in made.samples]
            found.append([replace(sample, group_id=f"replay/{sample.group_id}") for sample in fresh])
    largest = max((int(max(s.inputs.max(), s.targets.max())) for samples in found for s in samples), default=0)
    if largest >= vocabulary:
        raise LearnerError(
            f"learner.replay.run={config.run} has token {largest}, and the model knows {vocabulary}: that run had another "
            "tokenizer"
        )
    if not found:
        raise LearnerError(f"learner.replay.run={config.run} holds no finished group whose rewards differ")
    return found
