from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from env_pool.pacing import Pacer, in_slices


async def turns_of(size: int, callers: int) -> list[int]:
    """In which turn of the event loop each caller was let through."""
    pacer, turn, found = Pacer(size), 0, []

    async def call() -> None:
        await pacer.turn()
        found.append(turn)

    tasks = [asyncio.create_task(call()) for _ in range(callers)]
    while len(found) < callers:
        await asyncio.sleep(0)
        turn += 1
        assert turn < 10 * callers + 10, "a caller was forgotten"
    await asyncio.gather(*tasks)
    return found


@given(st.integers(1, 7), st.integers(1, 60))
def test_no_turn_lets_more_through_than_its_size(size: int, callers: int) -> None:
    found = asyncio.run(turns_of(size, callers))
    assert len(found) == callers
    assert (
        max(found.count(turn) for turn in set(found)) <= 2 * size
    )  # the end of one refill and the beginning of the next
    assert len(set(found)) >= callers / (2 * size)


async def test_a_cancelled_caller_takes_nobodys_place() -> None:
    pacer = Pacer(1)
    await pacer.turn()
    waiting = [asyncio.create_task(pacer.turn()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait_for(asyncio.gather(waiting[0], waiting[2]), 5)
    assert waiting[1].cancelled()


async def test_slices_let_others_run() -> None:
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    seen = [number async for number in in_slices(range(100), 10)]
    assert seen == list(range(100))
    assert ran >= 10
    task.cancel()
