from __future__ import annotations

import asyncio

import numpy as np

from experience import wire
from experience.config import QueueConfig, QueueOrder, StalenessConfig
from experience.entries import Added, EpisodeEntry, EventKind, QueueEvent, make_entry
from experience.records import GroupHeader, Task, Trajectory
from orchestrator.queue_actor import QueueActor


def header(index: int) -> GroupHeader:
    task = Task(task_id="task", environment="shop", payload={})
    return GroupHeader(group_id=f"g{index}", index=index, task=task, size=2, version_floor=0, seed=0)


def episodes(group: GroupHeader) -> list[EpisodeEntry]:
    ones = np.ones(4, np.int32)
    return [
        make_entry(
            [
                Trajectory(
                    trajectory_id=f"{episode_id}.0",
                    episode_id=episode_id,
                    group_id=group.group_id,
                    task_id="task",
                    tokens=ones,
                    trainable=ones > 0,
                    logprobs=-ones.astype(np.float32),
                    versions=ones - 1,
                )
            ]
        )
        for episode_id in group.episode_ids
    ]


async def test_a_consumer_that_lacks_groups_lets_refused_producers_go_on() -> None:
    """The head of the window is refused while a later group fills the budget: asking must make room at once."""
    config = QueueConfig(order=QueueOrder.windowed, window=1, budget_mb=1e-6)
    actor = QueueActor(config, StalenessConfig(), 2, None)
    await actor.begin(None)
    await actor.open(wire.encode([header(0), header(1)]))
    await actor.add(wire.encode(episodes(header(1))))
    refused = asyncio.create_task(actor.add(wire.encode(episodes(header(0)))))
    await asyncio.wait([refused], timeout=0.05)
    assert not refused.done()
    leased: list[bytes] = []
    async with asyncio.timeout(20):
        while len(leased) < 2:
            leased += await actor.lease("learner", 2 - len(leased), 0, timeout_s=60)
        assert wire.decode(await refused, list[Added]) == [Added.ACCEPTED, Added.ACCEPTED]
    assert [wire.decode_group(group).group_id for group in leased] == ["g0", "g1"]


async def test_groups_dropped_while_a_consumer_asks_are_announced_at_once() -> None:
    actor = QueueActor(QueueConfig(), StalenessConfig(max_lag=1), 2, None)
    await actor.begin(None)
    await actor.open(wire.encode([header(0)]))
    await actor.add(wire.encode(episodes(header(0))))
    await actor.events(timeout_s=0)
    asking = asyncio.create_task(actor.lease("learner", 1, 5, timeout_s=30))
    events = wire.decode(await actor.events(timeout_s=20), list[QueueEvent])
    assert [(event.kind, event.reason) for event in events] == [(EventKind.RETURNED, "stale")]
    asking.cancel()
