"""The groups that are alive and what became of the others: the part of the queue that a journal can rebuild.

Every method is one transition. ``ExperienceQueue`` decides which transition happens and writes it down; recovery reads
what was written and applies the same transitions, so both end in the same state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from experience.entries import EpisodeEntry
from experience.ledger import Ledger
from experience.records import GroupHeader

_SETTLED_REMEMBERED = 1 << 16


class QueueError(RuntimeError):
    """The queue was asked for something that contradicts its state; names the group and the state."""


@dataclass(eq=False)
class LiveGroup:
    """A group that is neither trained nor dropped: open, then ready, perhaps leased."""

    header: GroupHeader
    opened_at: float
    version_floor: int
    entries: dict[str, EpisodeEntry] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    """Journal position of each entry."""
    failed: dict[str, str] = field(default_factory=dict)
    """Episodes given up, with the reason."""
    reported_oldest: int | None = None
    ready_rank: int | None = None
    """Place in the order of completion; None while open."""
    consumer: str | None = None
    lease_version: int | None = None
    replay: tuple[int, int] | None = None
    """(step, place in it) that trained the group before the run went back to an earlier checkpoint."""
    late: set[str] = field(default_factory=set)
    """Episodes that arrived after the group was closed."""

    def __post_init__(self) -> None:
        self._episode_ids = self.header.episode_ids

    @property
    def group_id(self) -> str:
        return self.header.group_id

    @property
    def index(self) -> int:
        return self.header.index

    @property
    def finished(self) -> bool:
        """Whether the group is closed: no further episode is taken."""
        return self.ready_rank is not None

    @property
    def leased(self) -> bool:
        return self.consumer is not None

    @property
    def in_order(self) -> list[EpisodeEntry]:
        """The episodes that arrived, in the order of the group, whatever the order of their arrival."""
        return [self.entries[e] for e in self._episode_ids if e in self.entries]

    @property
    def missing(self) -> list[str]:
        """Episodes that have neither arrived nor been given up."""
        return [e for e in self._episode_ids if e not in self.entries and e not in self.failed]

    @property
    def tokens(self) -> int:
        """Sampled tokens of the episodes that arrived."""
        return sum(entry.tokens for entry in self.entries.values())

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries.values())

    @property
    def oldest(self) -> int | None:
        """Oldest sampled version known so far."""
        known = [entry.oldest_version for entry in self.entries.values()]
        if not self.finished:
            known.append(self.reported_oldest)
        return min((version for version in known if version is not None), default=None)

    @property
    def newest(self) -> int | None:
        """Newest sampled version known so far."""
        known = (entry.newest_version for entry in self.entries.values())
        return max((version for version in known if version is not None), default=None)


@dataclass
class Ack:
    """Groups trained by one call of ``ack``, kept until the step is in a checkpoint."""

    step: int
    groups: list[LiveGroup]
    trained_tokens: int
    masked_tokens: int

    @property
    def lengths(self) -> list[int]:
        return [entry.tokens for group in self.groups for entry in group.entries.values()]


class QueueState:
    """Live groups by id in dispatch order, the ledger, and the steps that must be trained again."""

    def __init__(self) -> None:
        self.live: dict[str, LiveGroup] = {}
        self.ledger = Ledger()
        self.next_index = 0
        self.bytes_used = 0
        self.uncommitted: list[Ack] = []
        self.last_step = -1
        self._next_rank = 0
        self._settled: OrderedDict[str, set[str]] = OrderedDict()

    def open(self, header: GroupHeader, now: float) -> LiveGroup:
        """A group was dispatched; its index must be larger than every earlier one."""
        if header.index < self.next_index:
            raise QueueError(
                f"group {header.group_id} has index {header.index}; the next free one is {self.next_index}"
            )
        if header.group_id in self.live or header.group_id in self._settled:
            raise QueueError(f"group {header.group_id} was opened before; group ids are never used again")
        if header.size < 1:
            raise QueueError(f"group {header.group_id} has size {header.size}; it needs at least one episode")
        group = LiveGroup(header, opened_at=now, version_floor=header.version_floor)
        self.live[header.group_id] = group
        self.next_index = header.index + 1
        self.ledger.dispatch()
        return group

    def accepts(self, group_id: str, episode_id: str) -> LiveGroup | None:
        """The open group that still waits for this episode, if there is one."""
        group = self.live.get(group_id)
        return group if group is not None and not group.finished and episode_id in group.missing else None

    def has_seen(self, group_id: str, episode_id: str) -> bool:
        """Whether the trajectories of this episode arrived before."""
        group = self.live.get(group_id)
        if group is None:
            return episode_id in self._settled.get(group_id, ())
        return episode_id in group.entries or episode_id in group.late

    def add(self, group: LiveGroup, entry: EpisodeEntry, position: int | None) -> None:
        """An episode of an open group arrived."""
        group.entries[entry.episode_id] = entry
        if position is not None:
            group.positions[entry.episode_id] = position
        self.bytes_used += entry.size_bytes
        self.ledger.arrive(entry.tokens)

    def add_late(self, entry: EpisodeEntry) -> None:
        """An episode arrived that no open group waits for."""
        self.ledger.arrive_late(entry.tokens)
        if entry.group_id in self._settled:
            self._settled[entry.group_id].add(entry.episode_id)
        elif entry.group_id in self.live:
            self.live[entry.group_id].late.add(entry.episode_id)

    def fail(self, group: LiveGroup, episode_id: str, reason: str) -> None:
        """An episode of an open group is given up."""
        group.failed[episode_id] = reason

    def make_ready(self, group: LiveGroup) -> None:
        """A group is complete, or closed without the episodes still missing."""
        group.ready_rank = self._next_rank
        self._next_rank += 1

    def drop(self, group: LiveGroup, reason: str) -> None:
        """A live group is given up."""
        self._forget(group)
        self.ledger.drop(reason, group.tokens)

    def ack(self, ack: Ack, *, keep: bool) -> None:
        """Groups were trained. ``keep``: remember them, without their trajectories, in case the step is undone."""
        for group in ack.groups:
            self._forget(group)
            group.consumer = group.lease_version = group.replay = None
        self.ledger.train(len(ack.groups), ack.trained_tokens, ack.masked_tokens, ack.lengths)
        self.last_step = max(self.last_step, ack.step)
        if keep:
            for group in ack.groups:
                group.entries = {k: msgspec.structs.replace(e, trajectories=[]) for k, e in group.entries.items()}
            self.uncommitted.append(ack)

    def commit(self, step: int) -> None:
        """Steps up to ``step`` are in a checkpoint and are never undone."""
        self.uncommitted = [ack for ack in self.uncommitted if ack.step > step]

    def revert(self, committed_step: int, load: Callable[[int], EpisodeEntry]) -> list[LiveGroup]:
        """Undo every ack after ``committed_step``: its groups are ready again, to be trained in the same steps.

        Episodes still in flight run again on weights as old as version ``committed_step + 1``: floors are lowered to
        it.
        """
        undone = sorted((ack for ack in self.uncommitted if ack.step > committed_step), key=lambda ack: ack.step)
        self.uncommitted = [ack for ack in self.uncommitted if ack.step <= committed_step]
        for ack in undone:
            self.ledger.untrain(len(ack.groups), ack.trained_tokens, ack.masked_tokens, ack.lengths)
        restored = [(ack.step, group) for ack in undone for group in ack.groups]
        for place, (step, group) in enumerate(restored):
            group.entries = {episode_id: load(group.positions[episode_id]) for episode_id in group.entries}
            group.replay = (step, place)
            self._settled.pop(group.group_id, None)
            self.live[group.group_id] = group
            self.bytes_used += group.size_bytes
        for group in self.live.values():
            group.consumer = group.lease_version = None
            if not group.finished:
                group.version_floor = min(group.version_floor, committed_step + 1)
        self.live = dict(sorted(self.live.items(), key=lambda item: item[1].index))
        self.last_step = min(self.last_step, committed_step)
        return [group for _, group in restored]

    def replay_groups(self, version: int) -> list[LiveGroup] | None:
        """Groups of the earliest step to be trained again that are not delivered yet, as that step took them.

        An empty list: that step is delivered in full to ``version``. None: there is no such step.
        """
        steps: dict[int, list[tuple[int, LiveGroup]]] = {}
        for group in self.live.values():
            if group.replay is not None:
                steps.setdefault(group.replay[0], []).append((group.replay[1], group))
        for step in sorted(steps):
            groups = [group for _, group in sorted(steps[step], key=lambda item: item[0])]
            waiting = [group for group in groups if not group.leased]
            if waiting or any(group.lease_version == version for group in groups):
                return waiting
        return None

    def _forget(self, group: LiveGroup) -> None:
        del self.live[group.group_id]
        self.bytes_used -= group.size_bytes
        self._settled[group.group_id] = set(group.entries) | group.late
        while len(self._settled) > _SETTLED_REMEMBERED:
            self._settled.popitem(last=False)
