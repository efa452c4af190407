from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from env_pool.errors import SystemFault
from env_pool.fleet import Fleet, PoolState


class PoolStateMachine(RuleBasedStateMachine):
    """A lease is held by one alive actor or nobody, and a new one goes to the least loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.state = PoolState(3, offset=1)
        self.alive = {0, 1, 2}
        self.held: dict[str, int] = {}
        self.made = 0

    @rule()
    def acquire(self) -> None:
        self.made += 1
        lease = str(self.made)
        loads = {index: self.state.load(index) for index in self.alive}
        index = self.state.acquire(lease)
        if index is None:
            assert not self.alive
        else:
            assert loads[index] == min(loads.values())
            self.held[lease] = index

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            lease = data.draw(st.sampled_from(sorted(self.held)))
            self.state.release(lease)
            del self.held[lease]

    @rule(index=st.integers(0, 3))
    def lose(self, index: int) -> None:
        leases = self.state.lost(index)
        assert leases == sorted(lease for lease, holder in self.held.items() if holder == index)
        self.held = {lease: holder for lease, holder in self.held.items() if holder != index}
        self.alive.discard(index)

    @rule(index=st.integers(0, 3))
    def join(self, index: int) -> None:
        self.state.joined(index)
        self.held = {lease: holder for lease, holder in self.held.items() if holder != index}
        self.alive.add(index)

    @invariant()
    def agrees(self) -> None:
        assert self.state.alive == sorted(self.alive)
        assert all(self.state.holder(lease) == index for lease, index in self.held.items())
        for index in self.alive:
            assert self.state.load(index) == list(self.held.values()).count(index)


TestPoolState = PoolStateMachine.TestCase
TestPoolState.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_lease_is_not_given_twice() -> None:
    state = PoolState(1)
    state.acquire("a")
    with pytest.raises(ValueError, match="held by actor 0 already"):
        state.acquire("a")


def test_clients_do_not_all_begin_with_the_same_actor() -> None:
    assert {PoolState(4, offset).acquire("a") for offset in range(4)} == {0, 1, 2, 3}


async def test_waiting_for_an_actor_ends_with_an_error_that_names_it() -> None:
    fleet = Fleet([], "w", "environment actor", wait_timeout_s=0.05)
    with pytest.raises(SystemFault, match=r"no environment actor is alive, and none came back within 0.05 s"):
        await fleet.acquire("a")


async def test_a_replacement_wakes_those_who_wait() -> None:
    fleet = Fleet([], "w", "environment actor", wait_timeout_s=20)
    waiting = asyncio.create_task(fleet.acquire("a"))
    await asyncio.sleep(0)
    fleet.replace(0, object())
    assert await waiting == 0
