"""The pool against the real actor class, in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pool_fixtures import AsyncCounter, Broken, Counter, Forgetful, Liar, LocalActor, make_task

from env_pool.actor import EXIT_EXHAUSTED, EnvironmentActor
from env_pool.config import EnvironmentsConfig
from env_pool.errors import Blame, EnvironmentFault, SystemFault
from env_pool.pool import EnvironmentPool


@asynccontextmanager
async def serve(
    config: EnvironmentsConfig | None = None, actors: int = 1
) -> AsyncIterator[tuple[EnvironmentPool, list[LocalActor]]]:
    config = config or EnvironmentsConfig()
    handles = [LocalActor(EnvironmentActor(config, index)) for index in range(actors)]
    pool = EnvironmentPool(handles, config, "worker")
    try:
        yield pool, handles
    finally:
        await pool.aclose()


@pytest.mark.parametrize("kind", [Counter, AsyncCounter])
async def test_an_episode_runs_through_the_pool(kind: type[Counter]) -> None:
    async with serve() as (pool, handles):
        async with pool.lease(make_task(kind)) as env:
            observation = await env.reset()
            assert observation.messages == [{"role": "user", "content": "Count up to 3."}]
            assert (await env.step("add 1")).observation == "1"
            assert (await env.step("add 2")).messages == [{"role": "tool", "content": "3"}]
            assert (await env.step("subtract 1")).done
            assert env.done
            outcome = await env.outcome()
        assert outcome["value"] == 3
        await pool.aclose()
        assert pool.leases == 0
        assert (await handles[0].target.health())["leases"] == 0


async def test_many_episodes_share_few_round_trips() -> None:
    async def episode(pool: EnvironmentPool, number: int) -> int:
        env = await pool.lease(make_task(Counter))
        await env.reset()
        await env.step(f"add {number}")
        outcome = await env.outcome()
        await env.close()
        return int(outcome["value"])

    async with serve() as (pool, handles):
        assert await asyncio.gather(*(episode(pool, n) for n in range(100))) == list(range(100))
        assert handles[0].round_trips < 40  # 400 calls


async def test_leases_spread_over_the_actors() -> None:
    async with serve(actors=3) as (pool, handles):
        leases = [await pool.lease(make_task(Counter)) for _ in range(9)]
        await asyncio.gather(*(lease.reset() for lease in leases))
        assert [(await handle.target.health())["leases"] for handle in handles] == [3, 3, 3]


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise", "KeyError: 'row 7'"),
        ("own time-out", "TimeoutError: the shop did not answer"),
        ("nonsense", "must return a StepResult, got str"),
    ],
)
async def test_what_environment_code_does_wrong_is_its_fault_and_named(action: str, reason: str) -> None:
    async with serve() as (pool, _):
        async with pool.lease(make_task(Broken)) as env:
            await env.reset()
            with pytest.raises(EnvironmentFault) as caught:
                await env.step(action)
        assert (caught.value.environment, caught.value.method) == ("broken", "step")
        assert reason in str(caught.value)
        assert caught.value.blame is Blame.ENVIRONMENT


async def test_a_traceback_comes_along() -> None:
    async with serve() as (pool, _), pool.lease(make_task(Broken)) as env:
        await env.reset()
        with pytest.raises(EnvironmentFault, match=r"pool_fixtures.py.*in step"):
            await env.step("raise")


async def test_a_failing_reset_and_an_unknown_class_are_named() -> None:
    async with serve() as (pool, _):
        with pytest.raises(EnvironmentFault, match="'broken', reset: RuntimeError: no database"):
            await (await pool.lease(make_task(Broken, target=0))).reset()
        task = make_task(Broken)
        missing = type(task)(task_id="t", environment="pool_fixtures:Nothing", payload={})
        with pytest.raises(EnvironmentFault, match=r"import: ValueError.*has no 'Nothing'"):
            await (await pool.lease(missing)).reset()


async def test_a_hang_ends_in_its_time_out_and_holds_up_nobody() -> None:
    async with serve(EnvironmentsConfig(step_timeout_s=2.0)) as (pool, handles):
        bad, good = await pool.lease(make_task(Broken)), await pool.lease(make_task(Counter))
        await asyncio.gather(bad.reset(), good.reset())
        hanging = asyncio.create_task(bad.step("hang"))
        for _ in range(10):
            await good.step("add 1")
        assert not hanging.done()
        with pytest.raises(EnvironmentFault, match=r"'broken', step: hung: no return within 2 s"):
            await hanging
        assert (await good.step("add 1")).observation == "11"
        health = await handles[0].target.health()
        assert (health["hung"], health["healthy"], health["leases"]) == (1, True, 1)


async def test_slow_environments_run_beside_each_other() -> None:
    async with serve() as (pool, _):
        leases = [await pool.lease(make_task(Broken)) for _ in range(10)]
        await asyncio.gather(*(lease.reset() for lease in leases))
        began = time.monotonic()
        results = await asyncio.gather(*(lease.step("wait 1.0") for lease in leases))
        assert [result.observation for result in results] == ["wait 1.0"] * 10
        assert time.monotonic() - began < 5


async def test_an_actor_with_too_many_hung_threads_ends_itself() -> None:
    config, exits = EnvironmentsConfig(step_timeout_s=0.1, max_hung=2), asyncio.Queue[int]()
    pool = EnvironmentPool([LocalActor(EnvironmentActor(config, 0, exits.put_nowait))], config, "worker")
    for _ in range(2):
        env = await pool.lease(make_task(Broken))
        await env.reset()
        with pytest.raises(EnvironmentFault, match="hung"):
            await env.step("hang")
    assert await asyncio.wait_for(exits.get(), 20) == EXIT_EXHAUSTED
    await pool.aclose()


async def test_a_deterministic_environment_is_replayed_when_its_actor_dies() -> None:
    lost: list[int] = []
    config = EnvironmentsConfig()
    handles = [LocalActor(EnvironmentActor(config, index)) for index in range(2)]
    pool = EnvironmentPool(handles, config, "worker", on_lost=lambda index, reason: lost.append(index))
    leases = [await pool.lease(make_task(Counter)) for _ in range(6)]
    for lease in leases:
        await lease.reset()
        await lease.step("add 2")
        await lease.step("wrong tool")  # an answer: the episode is over
    running = [await pool.lease(make_task(Counter)) for _ in range(6)]
    for lease in running:
        await lease.reset()
        await lease.step("add 2")
        await lease.step("add x")
    handles[0].dead.set()
    results = await asyncio.gather(*(lease.step("add 1") for lease in running))
    assert [result.observation for result in results] == ["3"] * 6
    outcomes = await asyncio.gather(*(lease.outcome() for lease in leases))
    assert outcomes == [{"answer": "wrong tool", "calls": 1, "faults": 0, "value": 2}] * 6
    assert [lease.recoveries for lease in running].count(1) == 3
    assert lost == [0]
    assert pool.alive == [1]
    await pool.aclose()


async def test_with_no_actor_left_an_episode_goes_on_once_there_is_a_replacement() -> None:
    lost, config = asyncio.Queue[int](), EnvironmentsConfig()
    handle = LocalActor(EnvironmentActor(config, 0))
    pool = EnvironmentPool([handle], config, "worker", on_lost=lambda index, reason: lost.put_nowait(index))
    env = await pool.lease(make_task(Counter))
    await env.reset()
    await env.step("add 2")
    handle.dead.set()
    step = asyncio.create_task(env.step("add 1"))
    assert await asyncio.wait_for(lost.get(), 20) == 0
    assert pool.alive == []
    pool.replace(0, LocalActor(EnvironmentActor(config, 0)))
    assert (await step).observation == "3"
    await pool.aclose()


async def test_with_no_replacement_the_wait_ends_and_is_named() -> None:
    async with serve(EnvironmentsConfig(recovery_timeout_s=0.1)) as (pool, handles):
        env = await pool.lease(make_task(Counter))
        await env.reset()
        handles[0].dead.set()
        with pytest.raises(SystemFault, match=r"no environment actor is alive, and none came back within 0.1 s"):
            await env.step("add 1")


async def test_an_episode_that_keeps_losing_actors_is_given_up() -> None:
    async with serve(EnvironmentsConfig(max_recoveries=1), actors=3) as (pool, handles):
        env = await pool.lease(make_task(Counter))
        await env.reset()
        for handle in handles:
            handle.dead.set()
        with pytest.raises(SystemFault, match="lost its environment 2 times"):
            await env.step("add 1")


async def test_a_snapshot_brings_back_what_is_not_deterministic() -> None:
    async with serve(actors=2) as (pool, handles):
        env = await pool.lease(make_task(Forgetful))
        await env.reset()
        await env.step("add 2")
        assert await env.snapshot()
        for handle in handles:
            if (await handle.target.health())["leases"]:
                handle.dead.set()
        assert (await env.step("add 1")).observation == "3"


async def test_what_is_neither_deterministic_nor_in_a_snapshot_is_a_system_fault() -> None:
    async with serve(actors=2) as (pool, handles):
        env = await pool.lease(make_task(Forgetful))
        await env.reset()
        await env.snapshot()
        await env.step("add 2")
        for handle in handles:
            if (await handle.target.health())["leases"]:
                handle.dead.set()
        with pytest.raises(SystemFault, match="not deterministic and has no snapshot of step 1"):
            await env.step("add 1")


async def test_a_restarted_actor_that_forgot_the_lease_is_noticed() -> None:
    async with serve() as (pool, handles):
        env = await pool.lease(make_task(Counter))
        await env.reset()
        await env.step("add 2")
        handles[0].target = EnvironmentActor(pool.config, 0)
        assert (await env.step("add 1")).observation == "3"
        assert env.recoveries == 1


async def test_a_replay_that_does_not_repeat_itself_is_the_environments_fault() -> None:
    async with serve() as (pool, _):
        env = await pool.lease(make_task(Liar))
        await env.reset()
        result = await env.step("add 1")
        recorded = type(result)(observation="1234567")
        other = await pool.lease(make_task(Liar))
        with pytest.raises(EnvironmentFault, match="did not repeat itself"):
            await other.replay(env.observation, [type(env.steps[0])("add 1", recorded)])  # type: ignore[arg-type]


async def test_a_recorded_episode_goes_on_elsewhere() -> None:
    async with serve() as (pool, _):
        first = await pool.lease(make_task(Counter))
        observation = await first.reset()
        await first.step("add 2")
        second = await pool.lease(make_task(Counter))
        await second.replay(observation, first.steps)
        assert (await second.step("add 1")).observation == "3"
        unsteady = await pool.lease(make_task(Forgetful))
        with pytest.raises(SystemFault, match="not deterministic: it cannot be replayed"):
            await unsteady.replay(observation, [])


async def test_calls_out_of_order_are_refused() -> None:
    async with serve() as (pool, _):
        env = await pool.lease(make_task(Counter))
        with pytest.raises(RuntimeError, match="has not been reset"):
            await env.step("add 1")
        await env.reset()
        with pytest.raises(RuntimeError, match="was reset before"):
            await env.reset()
        await env.step("done")
        with pytest.raises(RuntimeError, match="is over"):
            await env.step("add 1")
        await env.close()
        with pytest.raises(RuntimeError, match="given back"):
            await env.outcome()


async def test_noise_disturbs_steps_and_survives_a_replay() -> None:
    noise = {"error": 0.3, "timeout": 0.3}
    async with serve(EnvironmentsConfig(noise=noise), actors=2) as (pool, handles):
        env = await pool.lease(make_task(Counter), seed=5)
        await env.reset()
        seen = [(await env.step("add 1")).observation for _ in range(12)]
        told = [text for text in seen if text.startswith("error: the tool")]
        assert 3 <= len(told) <= 10
        assert [text for text in seen if text not in told] == [str(n + 1) for n in range(12 - len(told))]
        for handle in handles:
            if (await handle.target.health())["leases"]:
                handle.dead.set()
        assert (await env.outcome())["value"] == 12 - len(told)
        assert env.recoveries == 1


async def test_what_a_dead_worker_left_is_closed() -> None:
    async with serve() as (pool, handles):
        for _ in range(3):
            await (await pool.lease(make_task(Counter))).reset()
        actor = handles[0].target
        assert await actor.forget_client("worker") == 3
        assert (await actor.health())["leases"] == 0


async def test_an_environment_nobody_calls_any_more_is_closed() -> None:
    async with serve(EnvironmentsConfig(idle_lease_s=0.05)) as (pool, handles):
        abandoned = await pool.lease(make_task(Counter))
        await abandoned.reset()
        await asyncio.sleep(0.1)
        other = await pool.lease(make_task(Counter))
        await other.reset()
        actor = handles[0].target
        assert await actor.forget_client("nobody") == 0
        assert (await actor.health())["leases"] == 1
