"""What goes into the experience queue and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from experience.records import GroupHeader, Status, Trajectory
from experience.wire import Buffer, encode_trajectory, group_parts, pack_group


class EpisodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A finished episode: its encoded trajectories, and all that the queue needs to know of them."""

    group_id: str
    episode_id: str
    trajectories: list[bytes]
    """Each as ``wire.encode_trajectory`` makes it; the queue does not look inside."""
    tokens: int
    """Sampled tokens of all trajectories: those with ``trainable`` set."""
    oldest_version: int | None = None
    """Smallest version among the sampled tokens; None when there are none."""
    newest_version: int | None = None
    reward: float | None = None
    status: Status = Status.FINISHED

    @property
    def size_bytes(self) -> int:
        """What the entry counts against the queue's byte budget."""
        return sum(len(data) for data in self.trajectories)


def make_entry(trajectories: Sequence[Trajectory]) -> EpisodeEntry:
    """The entry of one episode from its trajectories (at least one, of one group and episode, else ``ValueError``).

    The reward and status are those of the first trajectory.
    """
    if not trajectories:
        raise ValueError("an episode needs at least one trajectory")
    first = trajectories[0]
    for trajectory in trajectories:
        if (trajectory.group_id, trajectory.episode_id) != (first.group_id, first.episode_id):
            raise ValueError(
                f"trajectory {trajectory.trajectory_id} belongs to episode {trajectory.episode_id} of group "
                f"{trajectory.group_id}, not to episode {first.episode_id} of group {first.group_id}"
            )
    versions = [t.versions[t.trainable] for t in trajectories if t.trainable.any()]
    return EpisodeEntry(
        group_id=first.group_id,
        episode_id=first.episode_id,
        trajectories=[encode_trajectory(trajectory) for trajectory in trajectories],
        tokens=sum(trajectory.sampled_tokens for trajectory in trajectories),
        oldest_version=min((int(v.min()) for v in versions), default=None),
        newest_version=max((int(v.max()) for v in versions), default=None),
        reward=first.reward,
        status=first.status,
    )


class Added(StrEnum):
    """What became of an episode handed to the queue."""

    ACCEPTED = "accepted"
    FULL = "full"
    """Not taken, the byte budget is spent: offer it again after a ``space`` event."""
    DUPLICATE = "duplicate"
    """This episode arrived before; nothing changed."""
    UNKNOWN = "unknown"
    """Its group is closed, settled or was never opened; the tokens count as wasted."""


class EventKind(StrEnum):
    """What the shell tells others about."""

    READY = "ready"
    """A group may be delivered: wake the consumers."""
    RETURNED = "returned"
    """A group was dropped: its pacing slot is free again; cancel ``episodes``, which are still running."""
    CLOSED = "closed"
    """A group became ready without all its episodes: cancel ``episodes``."""
    TRAINED = "trained"
    """A group was acknowledged."""
    SPACE = "space"
    """Producers that were told ``full`` may offer again."""


class QueueEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in the queue."""

    kind: EventKind
    group_id: str = ""
    reason: str = ""
    episodes: list[str] = msgspec.field(default_factory=list)


class LeasedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group delivered to a consumer, who owes an ack for it."""

    header: GroupHeader
    episodes: list[EpisodeEntry]
    version: int
    """The learner version it was delivered for."""

    @property
    def group_id(self) -> str:
        return self.header.group_id

    @property
    def tokens(self) -> int:
        """Sampled tokens of all episodes."""
        return sum(entry.tokens for entry in self.episodes)

    def encode(self) -> bytes:
        """The group as a message for ``wire.decode_group``; no trajectory is decoded on the way."""
        return pack_group(self.header, self._trajectories)

    def encode_parts(self) -> list[Buffer]:
        """What ``encode`` makes, in pieces that lie one after the other, without a copy."""
        return group_parts(self.header, self._trajectories)

    @property
    def _trajectories(self) -> list[bytes]:
        return [data for entry in self.episodes for data in entry.trajectories]


class InFlight(msgspec.Struct, frozen=True, kw_only=True):
    """A group still being generated, with the episodes that have neither arrived nor been given up."""

    header: GroupHeader
    missing: list[str]
