"""Reward branches, actor and client, in one process; failure is never a zero."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import pytest
from pool_fixtures import Judge, LocalActor, make_sample

from env_pool.config import RewardConfig
from env_pool.rewards.actor import EXIT_EXHAUSTED, RewardActor
from env_pool.rewards.branches import RetryOnFailure, load_branches
from env_pool.rewards.client import RewardClient
from env_pool.rewards.records import RewardResult

RULE = RewardConfig()


async def score(configs: Sequence[RewardConfig], **sample: int) -> RewardResult:
    client = RewardClient([LocalActor(RewardActor(configs))], configs, "worker")
    result = await client.score(make_sample(**sample))
    await client.aclose()
    return result


@pytest.mark.parametrize(("value", "reward"), [(3, 1.0), (2, 0.0)])
async def test_the_rule_is_the_environments_own_verifier(value: int, reward: float) -> None:
    result = await score([RULE], value=value)
    assert (result.reward, result.parts) == (reward, {"rule": reward, "rule/value": float(value)})


async def test_branches_add_up_by_weight_and_the_parts_are_kept() -> None:
    length = RewardConfig(kind="pool_fixtures:quick_length", weight=0.5, name="length", args={"scale": 3.0})
    result = await score([RewardConfig(weight=2.0), length])
    assert result.reward == 2.0 * 1.0 + 0.5 * 3.0
    assert result.parts == {"rule": 1.0, "rule/value": 3.0, "length": 3.0}


async def test_a_branch_that_recovers_within_its_retries_gives_its_value() -> None:
    result = await score([RewardConfig(kind="pool_fixtures:Flaky", args={"failures": 2}, retries=2)])
    assert result.reward == 0.5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            RewardConfig(kind="pool_fixtures:Flaky", args={"failures": 3}),
            "'Flaky', attempt 3: ConnectionError: judge is away",
        ),
        (RewardConfig(kind="pool_fixtures:not_a_number"), "'not_a_number'.*the reward is nan, it must be finite"),
        (RewardConfig(kind="pool_fixtures:make_task", retries=0), "'make_task', attempt 1: .*"),
        (RewardConfig(kind="pool_fixtures:hanging", timeout_s=0.1, retries=1), "'hanging', attempt 2: no return"),
        (
            RewardConfig(kind="pool_fixtures:Judge", timeout_s=0.1, retries=1),
            "'Judge', attempt 2: no return within 0.1",
        ),
    ],
)
async def test_failure_and_time_out_are_no_reward_never_zero(config: RewardConfig, reason: str) -> None:
    result = await asyncio.wait_for(score([RULE, config]), 20)
    assert result.reward is None
    assert result.parts == {}
    assert result.error is not None
    assert re.search(reason, result.error), result.error


async def test_a_failed_branch_cancels_the_slow_judge_of_the_same_sample() -> None:
    before = Judge.cancelled
    failing = RewardConfig(kind="pool_fixtures:Flaky", args={"failures": 9}, retries=0)
    result = await asyncio.wait_for(score([RewardConfig(kind="pool_fixtures:Judge"), failing]), 20)
    assert result.reward is None
    assert Judge.cancelled == before + 1


async def test_cancelling_the_caller_cancels_the_branches() -> None:
    configs = [RewardConfig(kind="pool_fixtures:Judge")]
    actor = RewardActor(configs)
    client = RewardClient([LocalActor(actor)], configs, "worker")
    Judge.started, cancelled = asyncio.Queue(), Judge.cancelled
    waiting = asyncio.create_task(client.score(make_sample()))
    assert await asyncio.wait_for(Judge.started.get(), 20) == "e"
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await client.aclose()
    assert Judge.cancelled == cancelled + 1
    assert (await actor.health())["cancelled"] == 1
    assert client.pending == 0


async def test_a_dead_actors_samples_are_scored_by_another() -> None:
    configs = [RewardConfig(kind="pool_fixtures:slow_process_id")]
    handles = [LocalActor(RewardActor(configs, index)) for index in range(2)]
    lost: list[int] = []
    client = RewardClient(handles, configs, "worker", on_lost=lambda index, reason: lost.append(index))
    scoring = [asyncio.create_task(client.score(make_sample())) for _ in range(4)]
    await asyncio.sleep(0.1)
    handles[0].dead.set()
    results = await asyncio.wait_for(asyncio.gather(*scoring), 30)
    assert all(result.reward is not None for result in results)
    assert lost == [0]
    await client.aclose()


async def test_without_any_actor_there_is_an_error_that_names_the_branches() -> None:
    client = RewardClient([], [RULE], "worker", wait_timeout_s=0.05)
    result = await client.score(make_sample())
    assert result.reward is None
    assert result.error == "branches rule: no reward actor is alive, and none came back within 0.05 s"


async def test_a_dead_workers_scorings_are_cancelled() -> None:
    configs = [RewardConfig(kind="pool_fixtures:Judge")]
    actor = RewardActor(configs)
    client = RewardClient([LocalActor(actor)], configs, "worker")
    Judge.started = asyncio.Queue()
    waiting = asyncio.create_task(client.score(make_sample()))
    assert await asyncio.wait_for(Judge.started.get(), 20) == "e"
    assert await actor.forget_client("worker") == 1
    waiting.cancel()
    await client.aclose()


async def test_an_actor_with_too_many_hung_branches_ends_itself() -> None:
    configs = [RewardConfig(kind="pool_fixtures:hanging", timeout_s=0.05, retries=1)]
    exits = asyncio.Queue[int]()
    client = RewardClient([LocalActor(RewardActor(configs, 0, 2, exits.put_nowait))], configs, "worker")
    assert (await client.score(make_sample())).reward is None
    assert await asyncio.wait_for(exits.get(), 20) == EXIT_EXHAUSTED
    await client.aclose()


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "at least one branch"),
        ([RULE, RULE], "two branches are called 'rule'"),
        ([RewardConfig(kind="pool_fixtures:Flaky")], "does not take args"),
        ([RewardConfig(kind="pool_fixtures:HERE")], "neither a function nor a class"),
        ([RewardConfig(kind="pool_fixtures:Counter")], "no method score"),
        ([RewardConfig(kind="pool_fixtures:quick_lenght")], "Did you mean 'quick_length'"),
    ],
)
def test_a_branch_that_cannot_be_built_is_refused_at_once(configs: list[RewardConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_branches(configs)


def test_retries_end() -> None:
    assert [RetryOnFailure(2).again(attempt) for attempt in range(4)] == [True, True, False, False]
