"""Reading the episodes of a run back from its journals, while it runs or afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from experience.entries import EpisodeEntry, make_entry
from experience.journal import JournalError, JournalReader, Record
from experience.queue_records import AckRecord, FailRecord, GroupRecord, RevertRecord
from experience.records import GroupHeader, Status, Trajectory
from experience.wire import WireFormatError, decode, decode_trajectory
from orchestrator.run_directory import RunDirectory

SUCCESS_AT = 1.0 - 1e-6
"""An episode is a success when its reward is at least this."""

SORT_KEYS = ("newest", "reward", "length", "lag")


@dataclass(frozen=True)
class Episode:
    """One episode as the journals tell it: metadata, and where its trajectories are."""

    episode_id: str
    group_id: str
    source: str = "train"
    """``train``, or ``eval 50`` for the evaluation at step 50."""
    task_id: str = ""
    domain: str = ""
    difficulty: int = 0
    status: Status = Status.FINISHED
    reward: float | None = None
    tokens: int = 0
    """Sampled tokens."""
    oldest_version: int | None = None
    newest_version: int | None = None
    trained_at: int | None = None
    """The learner version (step) it was trained at; None: not yet, or never."""
    dropped: str | None = None
    """Why its group was dropped, or the episode given up."""
    directory: Path | None = None
    positions: tuple[int, ...] = ()
    """Records that hold it; empty when it was given up and left nothing."""

    @property
    def success(self) -> bool:
        return self.reward is not None and self.reward >= SUCCESS_AT

    @property
    def lag(self) -> int | None:
        """Lag of the oldest token when trained."""
        if self.trained_at is None or self.oldest_version is None:
            return None
        return self.trained_at - self.oldest_version


@dataclass(frozen=True)
class Selection:
    """Which episodes to list. Every condition that is given must hold."""

    episode: str | None = None
    group: str | None = None
    step: int | None = None
    success: bool | None = None
    domain: str | None = None
    evaluations: bool | None = None
    """True: only evaluations, False: only training, None: both."""

    def takes(self, episode: Episode) -> bool:
        wanted = [
            self.episode is None or episode.episode_id == self.episode,
            self.group is None or episode.group_id == self.group,
            self.step is None or self.step == episode.trained_at or episode.source == f"eval {self.step}",
            self.success is None or episode.success == self.success,
            self.domain is None or episode.domain == self.domain,
            self.evaluations is None or self.evaluations == (episode.source != "train"),
        ]
        return all(wanted)


@dataclass
class Found:
    """Episodes in the order in which they arrived, and what could not be read."""

    episodes: list[Episode] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_episodes(run: RunDirectory) -> Found:
    """All episodes of the run: those for training, then those of the evaluations.

    Damage is no error here: what can be read is returned, and ``problems`` says what was cut.
    """
    found = Found()
    _read_training(run.journal, found)
    for collection in sorted(run.evaluations.glob("step-*.journal")):
        for directory in sorted({path.parent for path in collection.rglob("*.journal") if path.is_file()}):
            _read_evaluation(directory, f"eval {int(collection.stem.removeprefix('step-'))}", found)
    return found


def select(episodes: Iterable[Episode], selection: Selection, *, sort: str = "newest", last: int = 20) -> list[Episode]:
    """The ``last`` episodes that ``selection`` takes: the newest ones, oldest first, or the first ones in sort order.

    ``reward`` and ``length`` sort from high to low, ``lag`` from the oldest tokens.
    """
    taken = [episode for episode in episodes if selection.takes(episode)]
    if sort == "newest":
        return taken[-last:]
    keys = {
        "reward": lambda episode: -(episode.reward if episode.reward is not None else float("-inf")),
        "length": lambda episode: -episode.tokens,
        "lag": lambda episode: -(episode.lag if episode.lag is not None else -1),
    }
    if sort not in keys:
        raise ValueError(f"sort must be one of {', '.join(SORT_KEYS)}, got {sort!r}")
    return sorted(taken, key=keys[sort])[:last]


def load_trajectories(episode: Episode) -> list[Trajectory]:
    """The trajectories of one episode.

    Raises:
        JournalError: The journal was damaged or removed meanwhile.
        WireFormatError: The record is not a trajectory.
    """
    if episode.directory is None:
        return []
    reader = JournalReader(episode.directory)
    trajectories: list[Trajectory] = []
    for position in episode.positions:
        record = reader.read(position)
        if record.kind == "trajectory":
            trajectories.append(decode_trajectory(record.payload))
        else:
            trajectories += [decode_trajectory(data) for data in decode(record.payload, EpisodeEntry).trajectories]
    return trajectories


# --- training ---------------------------------------------------------------------------------------------------------


class _Training:
    """Follows the records of the queue's journal."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._headers: dict[str, GroupHeader] = {}
        self._episodes: dict[tuple[str, str], Episode] = {}
        self._trained_at: dict[str, int] = {}
        self._dropped: dict[str, str] = {}

    def take(self, record: Record) -> None:
        kind, payload = record.kind, record.payload
        if kind == "open":
            header = decode(payload, GroupHeader)
            self._headers[header.group_id] = header
        elif kind in ("add", "late"):
            episode = _from_entry(decode(payload, EpisodeEntry), self._directory, (record.position,))
            self._put(replace(episode, dropped="late") if kind == "late" else episode)
        elif kind == "fail":
            failure = decode(payload, FailRecord)
            self._put(Episode(failure.episode_id, failure.group_id, status=Status.SYSTEM_ERROR, dropped=failure.reason))
        elif kind == "drop":
            dropped = decode(payload, GroupRecord)
            self._dropped[dropped.group_id] = dropped.reason
        elif kind == "ack":
            ack = decode(payload, AckRecord)
            self._trained_at.update(dict.fromkeys(ack.group_ids, ack.step))
        elif kind == "revert":
            committed = decode(payload, RevertRecord).committed_step
            self._trained_at = {group: step for group, step in self._trained_at.items() if step <= committed}

    def episodes(self) -> Iterator[Episode]:
        for episode in self._episodes.values():
            header = self._headers.get(episode.group_id)
            settled = replace(
                episode,
                trained_at=self._trained_at.get(episode.group_id) if episode.dropped is None else None,
                dropped=episode.dropped or self._dropped.get(episode.group_id),
            )
            if header is not None:
                task = header.task
                settled = replace(settled, task_id=task.task_id, domain=task.domain, difficulty=task.difficulty)
            yield settled

    def _put(self, episode: Episode) -> None:
        """The first arrival of an episode counts; a second one came from a worker that was believed dead."""
        self._episodes.setdefault((episode.group_id, episode.episode_id), episode)


def _read_training(directory: Path, found: Found) -> None:
    training = _Training(directory)
    for record in _sound_records(directory, found):
        try:
            training.take(record)
        except WireFormatError as error:
            found.problems.append(f"{directory}: record {record.kind!r} at {record.position} is left out: {error}")
    found.episodes += training.episodes()


# --- evaluations ------------------------------------------------------------------------------------------------------


def _read_evaluation(directory: Path, source: str, found: Found) -> None:
    episodes: dict[str, Episode] = {}
    for record in _sound_records(directory, found):
        try:
            trajectory = decode_trajectory(record.payload)
        except WireFormatError as error:
            found.problems.append(f"{directory}: record at {record.position} is left out: {error}")
            continue
        earlier = episodes.get(trajectory.episode_id)
        if earlier is not None:
            episodes[trajectory.episode_id] = replace(earlier, positions=(*earlier.positions, record.position))
            continue
        episodes[trajectory.episode_id] = replace(
            _from_entry(make_entry([trajectory]), directory, (record.position,)),
            source=source,
            task_id=trajectory.task_id,
            domain=trajectory.domain,
            difficulty=trajectory.difficulty,
        )
    found.episodes += episodes.values()


def _from_entry(entry: EpisodeEntry, directory: Path, positions: tuple[int, ...]) -> Episode:
    return Episode(
        episode_id=entry.episode_id,
        group_id=entry.group_id,
        status=entry.status,
        reward=entry.reward,
        tokens=entry.tokens,
        oldest_version=entry.oldest_version,
        newest_version=entry.newest_version,
        directory=directory,
        positions=positions,
    )


def _sound_records(directory: Path, found: Found) -> Iterator[Record]:
    """The records before the first damage; the damage goes to ``found.problems``."""
    reader = JournalReader(directory)
    try:
        yield from reader.records()
    except (JournalError, OSError) as error:
        found.problems.append(f"{error} (what comes after it is not shown)")
    if reader.cut_bytes:
        found.problems.append(
            f"{directory}: the last {reader.cut_bytes} bytes are an unfinished record and were left out "
            "(normal while the run goes on)"
        )
