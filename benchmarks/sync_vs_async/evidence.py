"""What a run left behind, for the benchmark: which trajectories each step trained, their tokens, versions and turns.

Read from the queue's journal (every group, every trajectory, every acknowledgement) and from ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sync_vs_async.processes import BenchError
from experience.entries import EpisodeEntry
from experience.journal import JournalReader
from experience.queue_records import AckRecord, GroupRecord
from experience.records import Trajectory
from experience.wire import decode, decode_trajectory


@dataclass(frozen=True)
class Generation:
    """One model turn: from request to last token (Unix seconds), tokens sampled, and context new to it (tokens)."""

    began_at: float
    ended_at: float
    sampled: int
    context: int


@dataclass(frozen=True)
class Sample:
    """One trajectory in the units of the run (wall seconds, carried tokens)."""

    group_id: str
    length: int
    """Tokens of the whole trajectory."""
    versions: dict[int, int]
    """Sampled tokens by the version that sampled them."""
    generations: tuple[Generation, ...]

    @property
    def sampled(self) -> int:
        return sum(generation.sampled for generation in self.generations)

    @property
    def context(self) -> int:
        """Prompt and observation tokens that a generation read."""
        return sum(generation.context for generation in self.generations)


def sample_of(trajectory: Trajectory) -> Sample:
    """The figures of one trajectory."""
    generations, context = [], 0
    for turn in trajectory.turns:
        if turn.role == "model":
            generations.append(Generation(turn.began_at, turn.ended_at, turn.end - turn.start, context))
            context = 0
        else:
            context += turn.end - turn.start
    versions, counts = np.unique(trajectory.versions[trajectory.trainable], return_counts=True)
    tally = {int(version): int(count) for version, count in zip(versions, counts, strict=True)}
    return Sample(trajectory.group_id, len(trajectory), tally, tuple(generations))


@dataclass(frozen=True)
class Step:
    """Learner step ``number``: when it ended (Unix seconds), its metrics and its trajectories."""

    number: int
    ended_at: float
    metrics: dict[str, Any]
    samples: tuple[Sample, ...]

    def lags(self) -> Counter[int]:
        """Sampled tokens by their lag, masked ones included."""
        histogram: Counter[int] = Counter()
        for sample in self.samples:
            for version, tokens in sample.versions.items():
                histogram[self.number - version] += tokens
        return histogram


@dataclass
class Evidence:
    """A run, step by step, with all its samples (dropped ones too)."""

    steps: list[Step]
    samples: list[Sample] = field(default_factory=list)

    def window(self, skip: int, leave: int) -> list[Step]:
        """The steps without the first ``skip`` and the last ``leave``. Raises BenchError when fewer than two are left."""
        chosen = self.steps[skip : len(self.steps) - leave]
        if len(chosen) < 2:
            raise BenchError(
                f"{len(self.steps)} steps leave {len(chosen)} in the steady state after {skip} to warm up and {leave} to "
                "drain; give more --steps"
            )
        return chosen

    def generations(self) -> Iterator[Generation]:
        """Every model turn of the run."""
        for sample in self.samples:
            yield from sample.generations


def read_evidence(directory: Path) -> Evidence:
    """Everything of a finished run. Raises BenchError when it has no steps or kept no journal."""
    samples: dict[str, list[Sample]] = {}
    trained: dict[str, int] = {}
    for record in JournalReader(directory / "journal").records():
        if record.kind in ("add", "late"):
            entry = decode(record.payload, EpisodeEntry)
            made = [sample_of(decode_trajectory(data)) for data in entry.trajectories]
            samples.setdefault(entry.group_id, []).extend(made)
        elif record.kind == "ack":
            ack = decode(record.payload, AckRecord)
            trained.update(dict.fromkeys(ack.group_ids, ack.step))
        elif record.kind == "drop":
            trained.pop(decode(record.payload, GroupRecord).group_id, None)
    by_step: dict[int, list[Sample]] = {}
    for group_id, step in trained.items():
        by_step.setdefault(step, []).extend(samples.get(group_id, []))
    lines = [line for line in read_metrics(directory) if "time/step_s" in line]
    steps = [Step(line["step"] - 1, line["time"], line, tuple(by_step.get(line["step"] - 1, ()))) for line in lines]
    if not steps or not samples:
        raise BenchError(f"{directory}: the run left no steps or no journal (queue.journal=true is needed)")
    return Evidence(steps, [sample for group in samples.values() for sample in group])


def read_metrics(directory: Path) -> Iterable[dict[str, Any]]:
    """The lines of ``metrics.jsonl``. Raises BenchError when there are none."""
    path = directory / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
