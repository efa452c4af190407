"""The fleet over real engines with requests in flight: updates, joining, draining. No Ray; kills are in test_fleet_runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from local_fleet import LENGTH, TIMEOUT_S, local_fleet, turn, whole

from orchestrator.fleet import EngineGone
from rollout_workers.engines.protocol import FinishReason
from weight_sync.errors import TransitionError

VERSIONS = 3


@pytest.mark.parametrize("rolling", [True, False])
@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_updates_reach_all_engines_and_every_token_carries_its_version(
    tmp_path: Path, rolling: bool, kv: str
) -> None:
    async with local_fleet(tmp_path, rolling=rolling, kv=kv) as local:
        for name in ("a", "b", "c"):
            await local.join(name)
        for engine in local.engines.values():
            engine.most_tokens = 8 * LENGTH // 2  # no request ends before the last update, however long these take
        calls = [asyncio.create_task(local.client.generate(turn(number))) for number in range(24)]
        await local.under_way("a")
        for version in range(1, VERSIONS + 1):
            await local.fleet.publish(version)
        for engine in local.engines.values():
            engine.most_tokens = None
        results = await asyncio.gather(*calls)
        assert whole(results)
        assert {result.finish_reason for result in results} == {FinishReason.LENGTH}
        for result in results:
            assert (np.diff(result.versions) >= 0).all()
            assert result.versions[-1] == VERSIONS
        seen = {int(version) for result in results for version in result.versions}
        assert {0, VERSIONS} <= seen <= set(range(VERSIONS + 1))
        assert local.served[-VERSIONS:] == [1, 2, 3]
        for engine in local.engines.values():
            assert engine._engine.weights.version == VERSIONS
            assert engine._engine.counters.generated_tokens == 8 * LENGTH
        assert local.most_committing == (1 if rolling else 3)


async def test_an_engine_that_joins_serves_only_what_is_current(tmp_path: Path) -> None:
    async with local_fleet(tmp_path) as local:
        await local.join("a")
        await local.fleet.publish(1)
        await local.fleet.publish(2)
        await local.join("b")
        assert local.states[-3:] == [("b", "starting", None), ("b", "loading", 2), ("b", "serving", 2)]
        results = await asyncio.gather(*(local.client.generate(turn(number)) for number in range(8)))
        assert whole(results)
        assert {int(version) for result in results for version in result.versions} == {2}
        assert local.engines["b"]._engine.counters.generated_tokens == 4 * LENGTH


async def test_joining_waits_for_the_version_on_its_way_and_loads_it(tmp_path: Path) -> None:
    async with local_fleet(tmp_path) as local:
        await local.join("a")
        calls = [asyncio.create_task(local.client.generate(turn(number))) for number in range(8)]
        await local.under_way("a")
        await asyncio.gather(local.fleet.publish(1), local.join("b"))
        assert local.fleet.held("a") == local.fleet.held("b") == 1
        assert whole(await asyncio.gather(*calls))


@pytest.mark.parametrize(("grace_s", "moved"), [(20.0, 0), (0.0, 8)])
async def test_a_drained_engine_loses_no_token_and_takes_updates_until_it_leaves(
    tmp_path: Path, grace_s: float, moved: int
) -> None:
    async with local_fleet(tmp_path, kv="keep") as local:
        await local.join("a")
        undisturbed = await asyncio.gather(*(local.client.generate(turn(number)) for number in range(16)))
        for number in range(16):
            local.client.release(f"s{number}")
        await local.join("b", stream_every=LENGTH)
        calls = [asyncio.create_task(local.client.generate(turn(number))) for number in range(16)]
        await local.under_way("b")
        ended, elsewhere = await local.leave("b", grace_s)
        assert (ended, elsewhere) == (8 - moved, moved)
        assert local.states[-2:] == [("b", "draining", 0), ("b", "dead", None)]
        results = await asyncio.gather(*calls)
        assert [r.tokens.tolist() for r in results] == [r.tokens.tolist() for r in undisturbed]
        assert local.client.continued == moved
        await local.fleet.publish(1)
        assert local.fleet.membership.alive() == ["a"]


async def test_an_update_reaches_an_engine_that_drains(tmp_path: Path) -> None:
    async with local_fleet(tmp_path, kv="keep") as local:
        await local.join("a")
        await local.join("b")
        calls = [asyncio.create_task(local.client.generate(turn(number))) for number in range(8)]
        await local.under_way("b")
        leaving = asyncio.create_task(local.leave("b", 20.0))
        await asyncio.sleep(0)
        await local.fleet.publish(1)
        await leaving
        results = await asyncio.gather(*calls)
        assert whole(results)
        assert {int(result.versions[-1]) for result in results} == {1}, "the drained engine was left behind"


async def test_an_engine_that_does_not_take_weights_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    async with local_fleet(tmp_path) as local:
        await local.join("a")
        broken = await local.join("b")
        broken.refuses = True
        await local.fleet.publish(1)
        assert local.broken == ["b"]
        assert local.fleet.membership.serving() == ["a"]
        assert local.fleet.held("a") == 1
        assert local.fleet.held("b") is None
        assert local.fleet.lost("b", "again") is False
        assert local.fleet.lost("nobody", "never there") is False
        with pytest.raises(TransitionError, match="engine b is dead"):
            local.fleet.drain("b", "too late")


@pytest.mark.parametrize("silent_at", ["stage", "commit"])
async def test_a_publication_waits_no_longer_for_an_engine_that_is_lost(tmp_path: Path, silent_at: str) -> None:
    """The call of the lost engine never ends; after `weights.timeout_s` alone it would be given up, too."""
    async with local_fleet(tmp_path) as local:
        lost = await local.join("a")
        await local.join("b")
        lost.silent_at = silent_at
        publishing = asyncio.create_task(local.fleet.publish(1))
        async with asyncio.timeout(TIMEOUT_S / 4):
            await lost.silent.wait()
            local.fleet.lost("a", "its process died")
            await publishing
        assert local.fleet.held("b") == 1
        assert local.broken == []
        with pytest.raises(EngineGone, match="a is gone"):
            await local.fleet.while_there("a", answer := asyncio.Event().wait())
        answer.close()


async def test_an_engine_lost_while_it_joins_does_not_serve(tmp_path: Path) -> None:
    async with local_fleet(tmp_path) as local:
        await local.join("a")
        await local.fleet.publish(1)
        local.fleet.starting("b")
        local.fleet.lost("b", "its process died")
        with pytest.raises(TransitionError, match="begin_load refused"):
            await local.fleet.join("b", None, 0)
        assert local.fleet.membership.serving() == ["a"]
