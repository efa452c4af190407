"""The experience queue: a state machine without a clock, a thread or a socket; time is an argument.

A group is *open* from its dispatch on and collects episodes; it becomes *ready* when each of its episodes has arrived
or was given up, or at its deadline with ``min_size`` of them; it is *leased* to a consumer, and then *acknowledged* as
trained or *dropped* with a reason. Each dispatched group is trained once or dropped once.

    open ──► ready ──► leased ──► trained
      │        │ ▲        │
      │        │ └────────┘ release (consumer lost)
      └────────┴──► dropped

The shell around it feeds it with calls, tells others what ``events`` returns, and calls ``flush`` before it answers a
producer, so that what was accepted is in the journal. A consumer that gets fewer groups than it asked for waits for a
``ready`` event and asks again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experience import wire
from experience.config import QueueConfig
from experience.entries import Added, EpisodeEntry, EventKind, InFlight, LeasedGroup, QueueEvent
from experience.journal import Journal
from experience.ledger import Ledger
from experience.order import arrange
from experience.queue_records import AckRecord, FailRecord, GroupRecord, RevertRecord
from experience.records import GroupHeader, Status
from experience.recovery import rebuild
from experience.staleness import Progress, QueueView, StalenessPolicy
from experience.state import Ack, LiveGroup, QueueError, QueueState

__all__ = ["ExperienceQueue", "QueueError"]


NO_SIGNAL = "no_signal"
"""Why a group is dropped whose episodes all have the same reward (``queue.require_signal``)."""


def has_signal(entries: Iterable[EpisodeEntry]) -> bool:
    """Whether rewards differ within a group (Yu et al. 2025, "DAPO", section 3.2, dynamic sampling)."""
    return len({entry.reward for entry in entries if entry.reward is not None}) > 1


class ExperienceQueue:
    """Holds groups from dispatch until they are trained or dropped. See the module's docstring."""

    def __init__(
        self,
        config: QueueConfig,
        policy: StalenessPolicy,
        *,
        journal: Journal | None = None,
        state: QueueState | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._journal = journal
        self._state = state if state is not None else QueueState()
        self._events: list[QueueEvent] = []
        self._budget_bytes = int(config.budget_mb * (1 << 20))
        self._waiting_consumers: set[str] = set()
        self._refused_bytes: int | None = None
        self._committed_step = -1
        self._last_ack: tuple[int, frozenset[str], int] = (-1, frozenset(), 0)

    @classmethod
    def recover(
        cls, config: QueueConfig, policy: StalenessPolicy, journal: Journal, committed_step: int, now: float
    ) -> ExperienceQueue:
        """The queue as its journal tells it, for a run that continues from the checkpoint of ``committed_step``.

        Groups trained at steps up to ``committed_step`` (-1: none) stay trained; those trained later are delivered
        again first, in the same steps; ``in_flight`` lists what must be generated again. Raises ``JournalError`` at
        damage and ``QueueError`` when the journal ends before the checkpoint.
        """
        queue = cls(config, policy, journal=journal, state=rebuild(journal, committed_step, now))
        queue.revert(committed_step)
        queue.commit(committed_step)
        for group in list(queue._state.live.values()):
            if not group.finished:
                queue._settle(group, now)
        return queue

    # What is known

    @property
    def ledger(self) -> Ledger:
        """Where every group and token went; read only."""
        return self._state.ledger

    @property
    def bytes_used(self) -> int:
        """Bytes of trajectories held."""
        return self._state.bytes_used

    @property
    def next_index(self) -> int:
        """The dispatch index of the next group."""
        return self._state.next_index

    @property
    def ready_groups(self) -> int:
        """Groups finished and not delivered."""
        return sum(group.finished and not group.leased for group in self._state.live.values())

    @property
    def leased_groups(self) -> int:
        """Groups delivered and not acknowledged."""
        return sum(group.leased for group in self._state.live.values())

    def in_flight(self) -> list[InFlight]:
        """Groups still being generated, in dispatch order, with the episodes that are missing."""
        open_groups = (group for group in self._state.live.values() if not group.finished)
        return [InFlight(header=group.header, missing=group.missing) for group in open_groups]

    def admit(self, version: int) -> int:
        """How many groups may be started while ``version`` is the oldest that engines serve."""
        return self._policy.admit(Progress(self.ledger.dispatched, self.ledger.returned, version))

    def may_add(self, size_bytes: int) -> bool:
        """Whether an episode of this size would be taken now.

        The budget is overrun only while refusing could block everything: when nothing is ready or leased, or when a
        consumer waits for more than it got. The overrun is bounded by the episodes in flight, that is by pacing.
        """
        if self.bytes_used + size_bytes <= self._budget_bytes or self._waiting_consumers:
            return True
        return not any(group.finished for group in self._state.live.values())

    def events(self) -> list[QueueEvent]:
        """What happened since the last call, in order."""
        if self._refused_bytes is not None and self.may_add(self._refused_bytes):
            self._refused_bytes = None
            self._events.append(QueueEvent(kind=EventKind.SPACE))
        events, self._events = self._events, []
        return events

    # Producers

    def open(self, header: GroupHeader, now: float) -> None:
        """A group was dispatched. Raises ``QueueError`` when its id or index was used before."""
        self._state.open(header, now)
        self._write("open", header)

    def add(self, entry: EpisodeEntry, now: float, *, encoded: bytes | None = None) -> Added:
        """An episode finished. One with status ``system_error`` counts as given up, its tokens as wasted.

        ``encoded`` is the message that ``entry`` was decoded from, where there is one: it goes to the journal as it is.
        """
        group = self._state.accepts(entry.group_id, entry.episode_id)
        if group is None or entry.status is Status.SYSTEM_ERROR:
            return self._add_unusable(group, entry, now)
        if not self.may_add(entry.size_bytes):
            refused = entry.size_bytes if self._refused_bytes is None else self._refused_bytes
            self._refused_bytes = min(refused, entry.size_bytes)
            return Added.FULL
        self._state.add(group, entry, self._write("add", entry, encoded))
        self._settle(group, now)
        return Added.ACCEPTED

    def _add_unusable(self, group: LiveGroup | None, entry: EpisodeEntry, now: float) -> Added:
        if self._state.has_seen(entry.group_id, entry.episode_id):
            return Added.DUPLICATE
        self._write("late", entry)
        self._state.add_late(entry)
        if group is None:
            return Added.UNKNOWN
        self.fail(entry.group_id, entry.episode_id, Status.SYSTEM_ERROR.value, now)
        return Added.ACCEPTED

    def fail(self, group_id: str, episode_id: str, reason: str, now: float) -> bool:
        """An episode is given up; its group closes with fewer, or is dropped with ``reason`` below ``min_size``.

        Returns whether the queue still waited for that episode.
        """
        group = self._state.accepts(group_id, episode_id)
        if group is None:
            return False
        self._write("fail", FailRecord(group_id, episode_id, reason))
        self._state.fail(group, episode_id, reason)
        self._settle(group, now)
        return True

    def report(self, group_id: str, oldest_version: int) -> None:
        """An episode in flight holds a token sampled by ``oldest_version``; lets ``drop_group`` give up early."""
        group = self._state.live.get(group_id)
        if group is not None:
            known = oldest_version if group.reported_oldest is None else group.reported_oldest
            group.reported_oldest = min(known, oldest_version)

    def drop(self, group_id: str, reason: str) -> bool:
        """Give a live group up, wherever it is. Returns whether it was live."""
        group = self._state.live.get(group_id)
        if group is None:
            return False
        self._drop(group, reason)
        return True

    def close_due(self, now: float) -> list[str]:
        """Close the groups whose deadline has passed and that have ``min_size`` episodes; returns their ids."""
        due = [group for group in self._state.live.values() if not group.finished and self._is_due(group, now)]
        for group in due:
            self._settle(group, now)
        return [group.group_id for group in due if group.finished]

    def next_deadline(self) -> float | None:
        """When ``close_due`` has something to do next, on the clock of ``now``; None when nothing is pending."""
        if self._config.close_after_s is None:
            return None
        opened = (g.opened_at for g in self._state.live.values() if not g.finished and self._has_enough(g))
        earliest = min(opened, default=None)
        return None if earliest is None else earliest + self._config.close_after_s

    # Consumers

    def lease(self, consumer: str, limit: int, version: int, now: float) -> list[LeasedGroup]:
        """Deliver up to ``limit`` groups for learner step ``version``; fewer (or none) means wait and ask again.

        ``limit`` is what the consumer still lacks for its step. Steps that must be trained again come first, as they
        were.
        """
        self.close_due(now)
        taken: list[LiveGroup] = []
        replayed = self._state.replay_groups(version)
        if replayed:
            taken = replayed[:limit]
            self._mark_leased(taken, consumer, version)
        else:
            while len(taken) < limit and (chosen := self._select(limit - len(taken), version)):
                self._mark_leased(chosen, consumer, version)
                taken += chosen
        if len(taken) < limit:
            self._waiting_consumers.add(consumer)
        else:
            self._waiting_consumers.discard(consumer)
        return [LeasedGroup(header=g.header, episodes=g.in_order, version=version) for g in taken]

    def release(self, consumer: str) -> list[str]:
        """A consumer is lost: its groups are ready again at their old place. Returns their ids."""
        self._waiting_consumers.discard(consumer)
        released = [group for group in self._state.live.values() if group.consumer == consumer]
        for group in released:
            group.consumer = group.lease_version = None
            self._events.append(QueueEvent(kind=EventKind.READY, group_id=group.group_id))
        return [group.group_id for group in released]

    def ack(self, group_ids: Sequence[str], *, step: int, trained_tokens: int, masked_tokens: int) -> None:
        """Groups were trained at ``step`` (the learner version they were delivered for).

        ``trained_tokens`` carried loss and ``masked_tokens`` did not; together they are the groups' sampled tokens.
        Saying the same twice changes nothing. Raises ``QueueError`` when a group is not leased or the tokens do not add
        up.
        """
        if self._last_ack[:2] == (step, frozenset(group_ids)):
            return
        groups = [self._leased(group_id) for group_id in dict.fromkeys(group_ids)]
        tokens = sum(group.tokens for group in groups)
        if trained_tokens + masked_tokens != tokens or min(trained_tokens, masked_tokens) < 0:
            raise QueueError(
                f"step {step} reports {trained_tokens} trained and {masked_tokens} masked tokens of {tokens}"
            )
        self._write("ack", AckRecord(step, [group.group_id for group in groups], trained_tokens, masked_tokens))
        self._waiting_consumers -= {group.consumer for group in groups if group.consumer is not None}
        self._state.ack(Ack(step, groups, trained_tokens, masked_tokens), keep=self._journal is not None)
        count = len(groups) + (self._last_ack[2] if self._last_ack[0] == step else 0)
        self._last_ack = (step, frozenset(group_ids), count)
        self._events += [QueueEvent(kind=EventKind.TRAINED, group_id=group.group_id) for group in groups]

    def expire(self, version: int) -> list[str]:
        """Drop what is certain to be useless from learner ``version`` on, in flight included; returns the ids."""
        doomed = self._policy.expire(QueueView(version, self._waiting()))
        for group, reason in doomed:
            self._drop(self._state.live[group.group_id], reason)
        return [group.group_id for group, _ in doomed]

    # Durability

    def flush(self) -> None:
        """Write what happened so far to the journal. Raises ``JournalError`` when the disk is full.

        The one method that may run on another thread, while others are called.
        """
        if self._journal is not None:
            self._journal.flush()

    @property
    def unwritten_bytes(self) -> int:
        """What ``flush`` has to write."""
        return 0 if self._journal is None else self._journal.pending_bytes

    def commit(self, step: int) -> None:
        """A checkpoint holds every step up to ``step``; what is needed to undo those is forgotten."""
        self._committed_step = max(self._committed_step, step)
        self._state.commit(step)

    def revert(self, committed_step: int) -> list[str]:
        """The learner went back to the checkpoint of ``committed_step``: deliver what it trained since then again.

        All leases return. Returns the ids of the groups to be trained again, in order. Raises ``QueueError`` without a
        journal, which alone still has their trajectories, and for a checkpoint before the last one committed, for which
        ``recover`` is the way.
        """
        if committed_step < self._committed_step:
            raise QueueError(
                f"cannot go back to step {committed_step}: step {self._committed_step} is committed; resume the run from "
                f"that checkpoint instead"
            )
        if self._journal is None:
            raise QueueError("going back to an earlier checkpoint needs trajectories on disk: set queue.journal=true")
        self._write("revert", RevertRecord(committed_step))
        restored = self._state.revert(committed_step, self._load)
        self._waiting_consumers.clear()
        self._last_ack = (-1, frozenset(), 0)
        self._events += [QueueEvent(kind=EventKind.READY, group_id=group.group_id) for group in restored]
        return [group.group_id for group in restored]

    def _load(self, position: int) -> EpisodeEntry:
        assert self._journal is not None
        return wire.decode(self._journal.read(position).payload, EpisodeEntry)

    def _write(self, kind: str, record: Any, encoded: bytes | None = None) -> int | None:
        if self._journal is None:
            return None
        return self._journal.append(kind, wire.encode(record) if encoded is None else encoded)

    # Decisions

    def _waiting(self) -> list[LiveGroup]:
        """Live groups that are not delivered and not part of a step to be trained again, in dispatch order."""
        return [group for group in self._state.live.values() if not group.leased and group.replay is None]

    def _select(self, limit: int, version: int) -> list[LiveGroup]:
        """The next groups to deliver; what the policy rejects on the way is dropped."""
        while True:
            waiting = self._waiting()
            preferred, outside = arrange(self._config.order, self._config.window, waiting)
            for candidates in (preferred, outside if preferred else []):
                # Outside the window only when staleness forbids what is inside: waiting could then last for ever.
                view = QueueView(version, waiting, self._taken(version), limit)
                selection = self._policy.select(candidates, view)
                for group, reason in selection.drop:
                    self._drop(self._state.live[group.group_id], reason)
                if selection.take:
                    return [self._state.live[group.group_id] for group in selection.take]
                if selection.drop:
                    break
            else:
                return []

    def _taken(self, version: int) -> int:
        """Groups delivered for step ``version``, acknowledged ones included."""
        leased = sum(group.lease_version == version for group in self._state.live.values())
        return leased + (self._last_ack[2] if self._last_ack[0] == version else 0)

    def _mark_leased(self, groups: Sequence[LiveGroup], consumer: str, version: int) -> None:
        for group in groups:
            group.consumer, group.lease_version = consumer, version

    def _leased(self, group_id: str) -> LiveGroup:
        group = self._state.live.get(group_id)
        if group is None or not group.leased:
            what = "not live" if group is None else "ready" if group.finished else "open"
            raise QueueError(f"group {group_id} cannot be acknowledged: it is {what}, not leased")
        return group

    def _is_due(self, group: LiveGroup, now: float) -> bool:
        return self._config.close_after_s is not None and now >= group.opened_at + self._config.close_after_s

    def _needed(self, group: LiveGroup) -> int:
        return min(self._config.min_size, group.header.size)

    def _has_enough(self, group: LiveGroup) -> bool:
        return len(group.entries) >= self._needed(group)

    def _settle(self, group: LiveGroup, now: float) -> None:
        """Close or drop an open group when nothing more is to come, or nothing more is waited for."""
        missing = group.missing
        if len(group.entries) + len(missing) < self._needed(group):
            self._drop(group, next(reversed(group.failed.values())))
        elif not missing or (self._has_enough(group) and self._is_due(group, now)):
            if self._config.require_signal and not has_signal(group.entries.values()):
                self._drop(group, NO_SIGNAL)
                return
            self._write("ready", GroupRecord(group.group_id))
            self._state.make_ready(group)
            if missing:
                self._events.append(QueueEvent(kind=EventKind.CLOSED, group_id=group.group_id, episodes=missing))
            self._events.append(QueueEvent(kind=EventKind.READY, group_id=group.group_id))

    def _drop(self, group: LiveGroup, reason: str) -> None:
        missing = [] if group.finished else group.missing
        self._write("drop", GroupRecord(group.group_id, reason))
        self._state.drop(group, reason)
        self._events.append(
            QueueEvent(kind=EventKind.RETURNED, group_id=group.group_id, reason=reason, episodes=missing)
        )
