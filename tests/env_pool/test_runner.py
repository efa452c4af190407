from __future__ import annotations

import asyncio
import threading
import time

import pytest

from env_pool.runner import HungError, Runner, within


async def test_quick_calls_share_one_thread_and_keep_their_order() -> None:
    runner, order = Runner("test", takeover_s=5.0), []

    def call(number: int) -> tuple[int, int]:
        order.append(number)
        return number, threading.get_ident()

    results = await asyncio.gather(*(runner.submit(lambda n=n: call(n), 1.0) for n in range(200)))
    assert order == [number for number, _ in results] == list(range(200))
    assert len({thread for _, thread in results}) == 1
    runner.close()


async def test_an_exception_reaches_only_its_caller() -> None:
    runner = Runner("test")
    failing, fine = runner.submit(lambda: 1 // 0, 1.0), runner.submit(lambda: 1, 1.0)
    assert await fine == 1
    with pytest.raises(ZeroDivisionError):
        await failing
    runner.close()


async def test_slow_calls_run_beside_each_other_and_quick_ones_pass_them() -> None:
    runner, release = Runner("test", takeover_s=0.01), threading.Event()
    slow = [runner.submit(lambda: release.wait(20), 30.0) for _ in range(5)]
    assert await asyncio.wait_for(runner.submit(lambda: "quick", 30.0), 10) == "quick"
    assert not any(future.done() for future in slow)
    release.set()
    assert await asyncio.wait_for(asyncio.gather(*slow), 10) == [True] * 5
    assert runner.hung == 0
    runner.close()


async def test_a_hung_call_is_given_up_counted_and_its_late_return_is_ignored() -> None:
    runner, release, returned = Runner("test", takeover_s=0.01), threading.Event(), threading.Event()

    def hang() -> None:
        release.wait(20)
        returned.set()

    began = time.monotonic()
    with pytest.raises(HungError, match=r"no return within 0.1 s"):
        await runner.submit(hang, 0.1)
    assert time.monotonic() - began < 5
    assert runner.hung == 1
    release.set()
    assert await asyncio.to_thread(returned.wait, 10)
    assert await asyncio.wait_for(runner.submit(lambda: "on", 1.0), 10) == "on"
    runner.close()


async def test_hung_calls_block_nobody_even_when_no_thread_is_left() -> None:
    runner, release = Runner("test", takeover_s=0.01, max_threads=2), threading.Event()
    hung = [runner.submit(lambda: release.wait(20), 0.2) for _ in range(4)]
    last = runner.submit(lambda: "served", 0.2)
    results = await asyncio.wait_for(asyncio.gather(*hung, return_exceptions=True), 20)
    assert [type(result) for result in results] == [HungError] * 4
    assert await asyncio.wait_for(last, 10) == "served"
    assert runner.hung == 4
    release.set()
    runner.close()


async def test_the_codes_own_timeout_is_not_taken_for_a_hang() -> None:
    async def own() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await within(own(), 5.0)
    with pytest.raises(HungError):
        await within(asyncio.Event().wait(), 0.01)
