"""One pass after another over the journals of a run: totals, histograms, and which episodes are worth a look.

Only numbers a group (its fate) and bounded selections are kept, so that a journal of many gigabytes needs little memory.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from experience.entries import EpisodeEntry
from experience.journal import JournalError, JournalReader, Record
from experience.ledger import ks_distance
from experience.queue_records import AckRecord, FailRecord, GroupRecord, RevertRecord
from experience.records import Trajectory
from experience.wire import WireFormatError, decode, decode_trajectory
from orchestrator.episodes import Episode
from orchestrator.report.picks import Picked, Picks
from orchestrator.run_directory import RunDirectory

MAX_DECODED = 100_000
"""Trajectories are decoded for at most about this many episodes; of a longer run every k-th episode is looked into."""

EVALUATION_SAMPLES = 6
"""Episodes taken from the first and from the last evaluation."""


@dataclass
class Survey:
    """What the journals of a run tell. Tokens are sampled tokens."""

    episodes: int = 0
    """Finished episodes, those of dropped groups and late ones included."""
    looked_into: int = 0
    """Of these, how many had their trajectories decoded: lags and seconds come from them."""
    dispatched: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Groups by reason."""
    generated_tokens: int = 0
    trained_tokens: int = 0
    masked_tokens: int = 0
    wasted_tokens: Counter[str] = field(default_factory=Counter)
    """By the reason why their group was dropped; ``late``: they came when it was gone."""
    lags: Counter[int] = field(default_factory=Counter)
    """Lag -> sampled tokens of trained groups (masked ones included)."""
    finished_lengths: Counter[int] = field(default_factory=Counter)
    trained_lengths: Counter[int] = field(default_factory=Counter)
    """Sampled tokens of an episode -> episodes."""
    statuses: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)
    """Episodes that left nothing, by reason."""
    slowest: list[Picked] = field(default_factory=list)
    picked: list[Picked] = field(default_factory=list)
    """A bounded selection for the trajectory browser, the order of its reasons kept."""
    problems: list[str] = field(default_factory=list)

    @property
    def live(self) -> int:
        return self.dispatched - self.trained - self.dropped.total()

    @property
    def live_tokens(self) -> int:
        return self.generated_tokens - self.trained_tokens - self.masked_tokens - self.wasted_tokens.total()

    @property
    def length_distance(self) -> float:
        """Kolmogorov-Smirnov distance of the lengths finished and trained."""
        return ks_distance(self.finished_lengths, self.trained_lengths)


@dataclass
class _Fates:
    """What became of each group, and the totals that no trajectory is needed for."""

    trained_at: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    acks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step -> (trained, masked) tokens."""
    opened: int = 0
    finished: int = 0
    given_up: Counter[str] = field(default_factory=Counter)

    def take(self, record: Record) -> None:
        kind, payload = record.kind, record.payload
        if kind == "open":
            self.opened += 1
        elif kind in ("add", "late"):
            self.finished += 1
        elif kind == "fail":
            self.given_up[decode(payload, FailRecord).reason] += 1
        elif kind == "drop":
            drop = decode(payload, GroupRecord)
            self.dropped[drop.group_id] = drop.reason
        elif kind == "ack":
            self._ack(decode(payload, AckRecord))
        elif kind == "revert":
            committed = decode(payload, RevertRecord).committed_step
            self.trained_at = {group: step for group, step in self.trained_at.items() if step <= committed}
            self.acks = {step: tokens for step, tokens in self.acks.items() if step <= committed}

    def _ack(self, ack: AckRecord) -> None:
        self.trained_at.update(dict.fromkeys(ack.group_ids, ack.step))
        trained, masked = self.acks.get(ack.step, (0, 0))
        self.acks[ack.step] = (trained + ack.trained_tokens, masked + ack.masked_tokens)


def survey(run: RunDirectory, *, seed: int = 0) -> Survey:
    """Read the journals of ``run``, also while it runs. Damage is told in ``problems``; what can be read is used.

    ``seed`` decides which episodes are drawn at random for the browser.
    """
    found = Survey()
    fates = _Fates()
    for record in _records(run.journal, found.problems):
        try:
            fates.take(record)
        except WireFormatError as error:
            found.problems.append(f"{run.journal}: record {record.kind!r} at {record.position} is left out: {error}")
    found.dispatched, found.trained = fates.opened, len(fates.trained_at)
    found.dropped = Counter(fates.dropped.values())
    found.given_up = fates.given_up
    found.trained_tokens = sum(trained for trained, _ in fates.acks.values())
    found.masked_tokens = sum(masked for _, masked in fates.acks.values())
    picks = Picks(random.Random(seed))
    _look_into(run.journal, fates, found, picks)
    found.slowest = picks.slowest()
    found.picked = [*_evaluation_samples(run, found, random.Random(seed)), *picks.all()]
    return found


def _look_into(directory: Path, fates: _Fates, found: Survey, picks: Picks) -> None:
    """The second pass: every finished episode, now that its fate is known."""
    stride = max(1, -(-fates.finished // MAX_DECODED))
    ignored: list[str] = []  # the first pass has told of them
    for record in _records(directory, ignored):
        try:
            if record.kind not in ("add", "late"):
                continue
            entry = decode(record.payload, EpisodeEntry)
            episode = _episode(entry, fates, directory, record)
            found.episodes += 1
            _count(found, episode)
            if (found.episodes - 1) % stride:
                continue
            found.looked_into += 1
            trajectories = [decode_trajectory(data) for data in entry.trajectories]
            _count_lags(found, episode, trajectories)
            picks.offer(_described(episode, trajectories))
        except WireFormatError as error:
            found.problems.append(f"{directory}: record {record.kind!r} at {record.position} is left out: {error}")


def _episode(entry: EpisodeEntry, fates: _Fates, directory: Path, record: Record) -> Episode:
    late = record.kind == "late"
    return Episode(
        episode_id=entry.episode_id,
        group_id=entry.group_id,
        status=entry.status,
        reward=entry.reward,
        tokens=entry.tokens,
        oldest_version=entry.oldest_version,
        newest_version=entry.newest_version,
        trained_at=None if late else fates.trained_at.get(entry.group_id),
        dropped="late" if late else fates.dropped.get(entry.group_id),
        directory=directory,
        positions=(record.position,),
    )


def _count(found: Survey, episode: Episode) -> None:
    found.statuses[str(episode.status)] += 1
    found.generated_tokens += episode.tokens
    found.finished_lengths[episode.tokens] += 1
    if episode.dropped is not None:
        found.wasted_tokens[episode.dropped] += episode.tokens
    elif episode.trained_at is not None:
        found.trained_lengths[episode.tokens] += 1


def _count_lags(found: Survey, episode: Episode, trajectories: list[Trajectory]) -> None:
    if episode.trained_at is None or episode.dropped is not None:
        return
    for trajectory in trajectories:
        lags = episode.trained_at - trajectory.versions[trajectory.trainable]
        for lag, tokens in zip(*np.unique(lags, return_counts=True), strict=True):
            found.lags[int(lag)] += int(tokens)


def _described(episode: Episode, trajectories: list[Trajectory]) -> Picked:
    """The episode with what only its trajectories tell."""
    first = trajectories[0] if trajectories else None
    if first is None:
        return Picked(episode)
    described = replace(episode, task_id=first.task_id, domain=first.domain, difficulty=first.difficulty)
    turns = sum(turn.role == "model" for turn in first.turns)
    return Picked(described, dict(first.timings), turns)


def _evaluation_samples(run: RunDirectory, found: Survey, source: random.Random) -> Iterator[Picked]:
    """Some episodes of the first and of the last evaluation."""
    collections = sorted(run.evaluations.glob("step-*.journal"))
    for collection in dict.fromkeys([*collections[:1], *collections[-1:]]):
        name = f"eval {int(collection.stem.removeprefix('step-'))}"
        kept: list[Picked] = []
        seen = 0
        for directory in sorted({path.parent for path in collection.rglob("*.journal") if path.is_file()}):
            for record in _records(directory, found.problems):
                seen += 1
                place = len(kept) if len(kept) < EVALUATION_SAMPLES else source.randrange(seen)
                if place >= EVALUATION_SAMPLES:
                    continue
                try:
                    kept[place : place + 1] = [_evaluated(decode_trajectory(record.payload), name, directory, record)]
                except WireFormatError as error:
                    found.problems.append(f"{directory}: record at {record.position} is left out: {error}")
        yield from kept


def _evaluated(trajectory: Trajectory, source: str, directory: Path, record: Record) -> Picked:
    episode = Episode(
        episode_id=trajectory.episode_id,
        group_id=trajectory.group_id,
        source=source,
        status=trajectory.status,
        reward=trajectory.reward,
        tokens=trajectory.sampled_tokens,
        oldest_version=trajectory.oldest_version,
        newest_version=trajectory.newest_version,
        directory=directory,
        positions=(record.position,),
    )
    return replace(_described(episode, [trajectory]), why="evaluation")


def _records(directory: Path, problems: list[str]) -> Iterator[Record]:
    """The records before the first damage; the damage goes to ``problems``."""
    reader = JournalReader(directory)
    try:
        yield from reader.records()
    except (JournalError, OSError) as error:
        problems.append(f"{error} (what comes after it is not in this report)")
    if reader.cut_bytes:
        problems.append(
            f"{directory}: the last {reader.cut_bytes} bytes are an unfinished record and are not in this report "
            "(normal while a run goes on, or after it was killed)"
        )
