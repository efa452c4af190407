"""An episode that ended, as a line of the run's workload trace."""

from __future__ import annotations

from experience.entries import EpisodeEntry
from experience.workload_trace import TraceEpisode, TraceTurn
from rollout_workers.episode_context import EpisodeContext
from rollout_workers.trajectory_builder import TrajectoryBuilder


def trace_episode(context: EpisodeContext, index: int, entry: EpisodeEntry, began_at: float) -> TraceEpisode:
    """What the episode did, in tokens and seconds as carried. ``began_at`` is when its first attempt began."""
    builder = context.builders[0]
    versions = None
    if entry.oldest_version is not None and entry.newest_version is not None:
        versions = (entry.oldest_version, entry.newest_version)
    return TraceEpisode(
        id=context.episode_id,
        index=index,
        member=context.member,
        arrived_at=round(began_at, 3),
        prompt_tokens=_prompt_tokens(builder),
        reset_s=round(context.waits.get(0, 0.0), 4),
        turns=_turns(builder, context.waits),
        versions=versions,
        status=entry.status.value,
        reward=entry.reward,
        trajectories=len(context.builders),
    )


def _prompt_tokens(builder: TrajectoryBuilder) -> int:
    first = next((turn.start for turn in builder.turns if turn.role == "model"), len(builder))
    return max(1, first)


def _turns(builder: TrajectoryBuilder, waits: dict[int, float]) -> list[TraceTurn]:
    """One entry a generation, with all context that follows it up to the next one."""
    turns = [turn for turn in builder.turns if turn.role == "model" and turn.end > turn.start]
    ends = [turn.start for turn in turns[1:]] + [len(builder)]
    return [
        TraceTurn(turn.end - turn.start, round(waits.get(number, 0.0), 4), end - turn.end)
        for number, (turn, end) in enumerate(zip(turns, ends, strict=True), start=1)
    ]
