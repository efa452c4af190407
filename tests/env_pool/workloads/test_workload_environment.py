"""The workload environment through the real pool and actor, without Ray."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest
from pool_fixtures import LocalActor

from env_pool.actor import EnvironmentActor
from env_pool.config import EnvironmentsConfig
from env_pool.errors import EnvironmentFault
from env_pool.pool import EnvironmentPool
from env_pool.registry import TaskSource
from env_pool.workloads.environment import WorkloadEnvironment, script_of
from env_pool.workloads.scripts import suite_script
from experience.records import Task


def task_of(index: int = 0, member: int = 0, attempt: int = 0, **options: Any) -> Task:
    task = TaskSource("workload", "train", 1, options).task(index)
    return msgspec.structs.replace(task, payload={**task.payload, "member": member, "attempt": attempt})


async def play(task: Task) -> tuple[list[str], dict[str, Any], float]:
    """Observations, outcome and seconds of one episode."""
    config = EnvironmentsConfig()
    pool = EnvironmentPool([LocalActor(EnvironmentActor(config))], config, "test")
    began_at = time.monotonic()
    try:
        env = await pool.lease(task)
        seen = [(await env.reset()).messages[0]["content"]]
        while not env.done:
            seen.append((await env.step("x")).observation)
        outcome = await env.outcome()
        await env.close()
    finally:
        await pool.aclose()
    return seen, outcome, time.monotonic() - began_at


async def test_it_plays_the_script_of_its_member() -> None:
    task = task_of(5, member=2, suite="swe", time_scale=2000, token_scale=100)
    script = suite_script("swe", 1, 5, 2)
    seen, outcome, seconds = await play(task)
    carried = [len(text.split()) for text in seen]
    assert carried[0] == 40
    assert carried[1:-1] == [max(1, round(turn.observation_tokens / 100)) for turn in script.turns[:-1]]
    assert carried[-1] == 0
    assert outcome == {"member": 2, "turns": len(script.turns)}
    assert seconds >= script.tool_s / 2000


async def test_a_lost_environment_is_a_fault_of_the_environment_once() -> None:
    index = next(i for i in range(200) if suite_script("fault", 1, i, 0).lost_at is not None)
    options = {"suite": "fault", "time_scale": 1e6, "token_scale": 1e4}
    with pytest.raises(EnvironmentFault, match="the script loses its environment"):
        await play(task_of(index, **options))
    _, outcome, _ = await play(task_of(index, attempt=1, **options))
    assert outcome["turns"] == len(suite_script("fault", 1, index, 0).turns)


async def test_thousands_wait_at_once() -> None:
    """2,000 environments of `burst` start beside each other: the whole takes as long as the slowest, and some work."""
    config = EnvironmentsConfig()
    pool = EnvironmentPool([LocalActor(EnvironmentActor(config))], config, "test")
    tasks = [task_of(index, suite="burst", time_scale=20, token_scale=100) for index in range(2000)]

    async def start(task: Task) -> None:
        env = await pool.lease(task)
        await env.reset()

    began_at = time.monotonic()
    await asyncio.gather(*(start(task) for task in tasks))
    assert time.monotonic() - began_at >= 60 / 20
    assert pool.leases == 2000
    await pool.aclose()


def test_rewards_come_from_the_verifier() -> None:
    task = task_of(3, success=0.5)
    rewards = [WorkloadEnvironment.verify(task, {"member": member, "turns": 1}).reward for member in range(64)]
    assert set(rewards) == {0.0, 1.0}
    assert rewards == [WorkloadEnvironment.verify(task, {"member": member, "turns": 9}).reward for member in range(64)]


def test_longest_first_orders_blocks_and_loses_no_task() -> None:
    source = TaskSource("workload", "train", 1, {"suite": "swe", "longest_first": 16, "group_size": 4})
    places = [source.task(index).payload["index"] for index in range(48)]
    for block in (places[:16], places[16:32], places[32:]):
        lengths = [max(suite_script("swe", 1, place, member).seconds() for member in range(4)) for place in block]
        assert lengths == sorted(lengths, reverse=True)
    assert sorted(places) == list(range(48))


def test_held_out_tasks_are_others() -> None:
    train, held_out = (TaskSource("workload", split, 0, {"suite": "swe"}).task(0) for split in ("train", "held_out"))
    assert script_of(train.payload, 0) != script_of(held_out.payload, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "sew"}, r"tasks.options.suite must be one of.*got 'sew'.*swe"),
        ({"siute": "swe"}, r"tasks.options.siute: environment 'workload' has no such option"),
        ({"time_scale": 0}, r"tasks.options.time_scale must be a positive number, got 0"),
        ({"token_scale": "a"}, r"tasks.options.token_scale must be a positive number, got 'a'"),
        ({"longest_first": -1}, r"tasks.options.longest_first must be a whole number >= 0, got -1"),
        ({"success": 2}, r"tasks.options.success must lie between 0 and 1"),
        ({"suite": "replay"}, r"tasks.options.file='' with suite='replay'"),
        ({"suite": "swe", "file": "a.csv"}, r"tasks.options.file='a.csv' with suite='swe'"),
        (
            {"suite": "replay", "file": "/no/such.csv"},
            r"tasks.options.file: '/no/such.csv' cannot be read: No such file",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(0, **options)
