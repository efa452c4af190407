"""Rebuilding the queue's state from its journal."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from experience import wire
from experience.entries import EpisodeEntry
from experience.journal import Journal, JournalError, Record
from experience.queue_records import AckRecord, FailRecord, GroupRecord, RevertRecord
from experience.records import GroupHeader
from experience.state import Ack, LiveGroup, QueueError, QueueState


class _Reverts:
    """Which acks a later ``revert`` record (or the recovery itself) undoes; only their groups are kept in memory."""

    def __init__(self, journal: Journal, committed_step: int) -> None:
        marks = [
            (record.position, wire.decode(record.payload, RevertRecord).committed_step)
            for record in journal.records()
            if record.kind == "revert"
        ]
        self._positions = [position for position, _ in marks]
        steps = [step for _, step in marks] + [committed_step]
        self._lowest_after = list(reversed(list(accumulate(reversed(steps), min))))

    def undoes(self, step: int, position: int) -> bool:
        """Whether an ack of ``step`` written at ``position`` is undone later."""
        return step > self._lowest_after[bisect_right(self._positions, position)]


def rebuild(journal: Journal, committed_step: int, now: float) -> QueueState:
    """The state that the journal's records lead to; acks after ``committed_step`` are still to be undone.

    Raises ``JournalError`` at a record that contradicts those before it, and ``QueueError`` when the journal ends
    before ``committed_step``.
    """
    state, reverts = QueueState(), _Reverts(journal, committed_step)
    for record in journal.records():
        try:
            _apply(state, reverts, journal, record, now)
        except (wire.WireFormatError, QueueError, KeyError) as error:
            raise JournalError(
                f"{journal.directory}: record {record.kind!r} at position {record.position} does not fit: {error}"
            ) from error
    if state.last_step < committed_step:
        raise QueueError(
            f"the journal in {journal.directory} ends at step {state.last_step}, before the checkpoint of step "
            f"{committed_step}: which groups were trained in between is lost; resume from an earlier checkpoint"
        )
    return state


def _apply(state: QueueState, reverts: _Reverts, journal: Journal, record: Record, now: float) -> None:
    kind, payload, position = record
    if kind == "open":
        state.open(wire.decode(payload, GroupHeader), now)
    elif kind in ("add", "late"):
        _apply_entry(state, wire.decode(payload, EpisodeEntry), kind, position)
    elif kind == "fail":
        failure = wire.decode(payload, FailRecord)
        state.fail(_live(state, failure.group_id), failure.episode_id, failure.reason)
    elif kind == "ready":
        state.make_ready(_live(state, wire.decode(payload, GroupRecord).group_id))
    elif kind == "drop":
        dropped = wire.decode(payload, GroupRecord)
        state.drop(_live(state, dropped.group_id), dropped.reason)
    elif kind == "ack":
        ack = wire.decode(payload, AckRecord)
        groups = [_live(state, group_id) for group_id in ack.group_ids]
        keep = reverts.undoes(ack.step, position)
        state.ack(Ack(ack.step, groups, ack.trained_tokens, ack.masked_tokens), keep=keep)
    elif kind == "revert":
        committed = wire.decode(payload, RevertRecord).committed_step
        state.revert(committed, lambda at: wire.decode(journal.read(at).payload, EpisodeEntry))


def _apply_entry(state: QueueState, entry: EpisodeEntry, kind: str, position: int) -> None:
    if kind == "add":
        state.add(_live(state, entry.group_id), entry, position)
    else:
        state.add_late(entry)


def _live(state: QueueState, group_id: str) -> LiveGroup:
    group = state.live.get(group_id)
    if group is None:
        raise QueueError(f"group {group_id} is not live")
    return group
