"""The outside of a worker: where environments and rewards come from, and where finished episodes go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from env_pool.rewards.records import RewardResult, RewardSample
from experience.entries import EpisodeEntry
from rollout_workers.assignments import EpisodeReport
from rollout_workers.episode_context import EnvironmentProvider


class RewardScorer(Protocol):
    async def score(self, sample: RewardSample) -> RewardResult: ...


class Deliverer(Protocol):
    """Where finished and failed episodes go; every call carries a batch."""

    async def add(self, entries: list[EpisodeEntry]) -> None: ...

    async def fail(self, failures: list[tuple[str, str, str]]) -> None: ...

    async def report(self, reports: list[EpisodeReport]) -> None: ...


@dataclass(frozen=True)
class WorkerPorts:
    """The outside of a worker."""

    environments: EnvironmentProvider
    rewards: RewardScorer
    deliverer: Deliverer


class LoopRewards:
    """The scorer of a run without reward branches: the loops give the rewards themselves."""

    async def score(self, sample: RewardSample) -> RewardResult:
        return RewardResult(reward=0.0, parts={})


def with_loop_parts(result: RewardResult, parts: dict[str, float]) -> RewardResult:
    """The branches' reward plus what the loop gave; no reward when neither gave anything."""
    if result.reward is None:
        return result
    if not result.parts and not parts:
        return RewardResult(
            reward=None,
            error="there are no reward branches (rewards: []) and the rollout loop did not call episode.reward(...)",
        )
    return RewardResult(reward=result.reward + sum(parts.values()), parts={**result.parts, **parts})
