"""The same through real Ray actors, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from pool_fixtures import Broken, Counter, make_sample, make_task

from env_pool.actor import EnvironmentActor
from env_pool.config import EnvironmentsConfig, RewardConfig
from env_pool.errors import EnvironmentFault
from env_pool.pool import EnvironmentPool
from env_pool.rewards.actor import RewardActor
from env_pool.rewards.client import RewardClient

pytestmark = pytest.mark.usefixtures("ray_local")


def spawn(kind: type, *args: Any) -> Any:
    import ray

    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}}
    return ray.remote(num_cpus=0, runtime_env=environment)(kind).remote(*args)


async def kill(handle: Any) -> None:
    os.kill((await handle.health.remote())["pid"], signal.SIGKILL)


async def test_kill_9_of_an_environment_actor_is_replayed_on_its_replacement() -> None:
    config = EnvironmentsConfig()
    pool: EnvironmentPool
    replaced: list[str] = []

    def on_lost(index: int, reason: str) -> None:
        replaced.append(reason)
        pool.replace(index, spawn(EnvironmentActor, config, index))

    first = spawn(EnvironmentActor, config, 0)
    pool = EnvironmentPool([first], config, "worker", on_lost)
    leases = [await pool.lease(make_task(Counter)) for _ in range(20)]
    await asyncio.gather(*(lease.reset() for lease in leases))
    for number in range(3):
        await asyncio.gather(*(lease.step(f"add {number}") for lease in leases))
    before = await leases[0].step("whoami")
    del leases[0].steps[-1]  # its answer is another in every process
    await kill(first)
    results = await asyncio.wait_for(asyncio.gather(*(lease.step("add 7") for lease in leases)), 60)
    assert [result.observation for result in results] == ["10"] * 20
    assert (await leases[0].step("whoami")).observation != before.observation
    assert [lease.recoveries for lease in leases] == [1] * 20
    assert len(replaced) == 1
    assert "ActorDied" in replaced[0]
    await pool.aclose()


async def test_a_hang_in_a_real_actor_is_named_and_the_others_go_on() -> None:
    config = EnvironmentsConfig(step_timeout_s=0.5)
    pool = EnvironmentPool([spawn(EnvironmentActor, config, 0)], config, "worker")
    bad, good = await pool.lease(make_task(Broken)), await pool.lease(make_task(Counter))
    await asyncio.gather(bad.reset(), good.reset())
    hanging = asyncio.create_task(bad.step("hang"))
    assert (await good.step("add 1")).observation == "1"
    with pytest.raises(EnvironmentFault, match="hung"):
        await asyncio.wait_for(hanging, 30)
    assert (await good.step("add 1")).observation == "2"
    await pool.aclose()


async def test_kill_9_of_a_reward_actor_sends_its_samples_to_the_replacement(tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    configs = [RewardConfig(kind="pool_fixtures:slow_process_id", args={"until": str(marker)})]
    client: RewardClient
    first = spawn(RewardActor, configs, 0)
    pid = float((await first.health.remote())["pid"])

    def on_lost(index: int, reason: str) -> None:
        client.replace(index, spawn(RewardActor, configs, index))

    client = RewardClient([first], configs, "worker", on_lost)
    scoring = [asyncio.create_task(client.score(make_sample())) for _ in range(8)]
    await asyncio.sleep(0)
    assert client.pending == 8
    await kill(first)
    marker.touch()
    results = await asyncio.wait_for(asyncio.gather(*scoring), 60)
    assert [result.error for result in results] == [None] * 8
    assert all(result.reward not in (None, pid) for result in results)
    await client.aclose()
