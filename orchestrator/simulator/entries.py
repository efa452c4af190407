"""Episodes as the simulated queue holds them: counts and versions instead of arrays."""

from __future__ import annotations

from experience.entries import EpisodeEntry, LeasedGroup
from orchestrator.planning.memory import TOKEN_BYTES, TRAJECTORY_BYTES

Segments = list[tuple[int, int]]
"""(version, sampled tokens), in order."""


class SimulatedEntry(EpisodeEntry, frozen=True, kw_only=True):
    """A finished episode; ``segments`` tell how many of its tokens each version sampled."""

    segments: Segments
    context_tokens: int
    """Carried tokens of the whole trajectory."""
    counted_bytes: int

    @property
    def size_bytes(self) -> int:
        """What its trajectory would count against the queue's budget."""
        return self.counted_bytes


def simulated_entry(group_id: str, episode_id: str, segments: Segments, context_tokens: int) -> SimulatedEntry:
    """The entry of an episode that sampled ``segments``."""
    versions = [version for version, _ in segments]
    return SimulatedEntry(
        group_id=group_id,
        episode_id=episode_id,
        trajectories=[],
        tokens=sum(tokens for _, tokens in segments),
        oldest_version=min(versions, default=None),
        newest_version=max(versions, default=None),
        reward=0.0,
        segments=segments,
        context_tokens=context_tokens,
        counted_bytes=context_tokens * TOKEN_BYTES + TRAJECTORY_BYTES,
    )


def entries_of(groups: list[LeasedGroup]) -> list[SimulatedEntry]:
    """The episodes of delivered groups."""
    entries = [entry for group in groups for entry in group.episodes]
    assert all(isinstance(entry, SimulatedEntry) for entry in entries), "the simulated queue holds simulated entries"
    return entries  # type: ignore[return-value]


def merge(segments: Segments, more: Segments) -> None:
    """Append ``more``, joining tokens of one version that follow each other."""
    for version, tokens in more:
        if segments and segments[-1][0] == version:
            segments[-1] = (version, segments[-1][1] + tokens)
        else:
            segments.append((version, tokens))
